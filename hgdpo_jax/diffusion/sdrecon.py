"""SDRecon: a photograph noised to an intermediate timestep and denoised from there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from hgdpo_jax.diffusion.samplers import Denoise, make_steps, sample
from hgdpo_jax.diffusion.schedule import NoiseSchedule

Latent = Float[Array, "b h w c"]


def sdrecon(
    denoise: Denoise,
    schedule: NoiseSchedule,
    latents: Latent,
    keys: PRNGKeyArray,
    strength: int,
    sampler: str,
    steps: int,
) -> Latent:
    """Reconstruction at strength t1…t10 = timesteps 100, 200, …, 1000 of 1000.

    The last round(steps · strength / 10) steps of the sampler are run, at least one, from the photograph's latent
    noised to the first of them. t1 is almost the photograph, t10 almost a fresh sample.

    Args:
        denoise: (x_t, t) → prediction of ε_base, guidance included.
        latents: scaled latents of the photographs.
        keys: one PRNG key per example [b].
        strength: 1…10.
    """
    last = max(1, round(steps * strength / 10))
    start = make_steps(schedule, sampler, steps, last).t[0]
    pair = jax.vmap(jax.random.split)(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(pair[:, 0])
    t = jnp.full(latents.shape[0], start)
    return sample(denoise, schedule, schedule.add_noise(latents, noise, t), pair[:, 1], sampler, steps, last)
