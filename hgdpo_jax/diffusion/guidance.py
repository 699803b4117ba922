"""Classifier-free guidance (Ho and Salimans 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from hgdpo_jax.diffusion.process import Latent, Timesteps

Denoise = Callable[[Latent, Timesteps], Latent]  # (x_t, t) → what the network predicts
Number = float | np.float32 | Float[Array, ""]
DenoiseBoth = Callable[[Latent, Timesteps], Float[Array, "2*b h w c"]]


def side_by_side(uncond: Shaped[Array, "b *n"], cond: Shaped[Array, "b *n"]) -> Shaped[Array, "2*b *n"]:
    """Rows in turn, so that both of an example lie on its device."""
    return jnp.stack([uncond, cond], axis=1).reshape(-1, *cond.shape[1:])


def guided(denoise: DenoiseBoth, scale: Number) -> Denoise:
    """uncond + scale · (cond − uncond), in one forward pass for both.

    Args:
        denoise: predicts for each example without and with its text, which are :func:`side_by_side`.
        scale: 1 is no guidance.
    """

    def prediction(x: Latent, t: Timesteps) -> Latent:
        both = denoise(x, t)
        uncond, cond = both[0::2], both[1::2]
        return uncond + scale * (cond - uncond)

    return prediction


def guided_within(interval: tuple[Number, Number], guided: Denoise, alone: Denoise) -> Denoise:
    """Guidance in an interval of noise levels only (Kynkäänniemi et al. 2024), where it makes pictures better.

    Args:
        interval: the lowest and the highest timestep with guidance.
        guided: predicts at these.
        alone: at the others, from the text without its opposite, which is half the work.
    """

    def prediction(x: Latent, t: Timesteps) -> Latent:
        acts = (interval[0] <= t[0]) & (t[0] <= interval[1])  # it is the same in all
        return jax.lax.cond(acts, guided, alone, x, t)

    return prediction
