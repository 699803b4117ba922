"""DDPM, DDIM and DPM-Solver++(2M) as one program: each is a table of coefficients for the same update

    x_{i+1} = a_i · x_i + b_i · x̂_0(x_i, t_i) + c_i · x̂_0(x_{i−1}, t_{i−1}) + d_i · noise_i.

Tables are made in float64 and equal diffusers' schedulers step by step. Legend: `b` examples, `h w c` latent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.errors import UserError

Latent = Float[Array, "b h w c"]
Denoise = Callable[[Latent, Int[Array, "b"]], Latent]
State = tuple[Latent, Latent]  # x_t, and the last x̂_0


class Steps(NamedTuple):
    """Timesteps int32 [n], from noise to image, and the coefficients of the update, float32 [n] each."""

    t: np.ndarray
    x: np.ndarray
    x_0: np.ndarray
    previous_x_0: np.ndarray
    noise: np.ndarray


class Trajectory(NamedTuple):
    """Where a sampler starts, x = signal · latent + noise · ε, and the first `count` rows of a table that it then runs.

    All of it is an argument of the program that draws. The table has a row for every training timestep, whatever it
    holds, so that one program does for all samplers, steps and strengths.
    """

    signal: np.float32
    noise: np.float32
    count: np.int32
    steps: Steps


def from_noise(schedule: NoiseSchedule, sampler: str, steps: int) -> Trajectory:
    """A drawing from nothing: all steps of a sampler.

    Raises:
        UserError: an unknown sampler, or more steps than training timesteps.
    """
    return _trajectory(schedule, make_steps(schedule, sampler, steps), 0.0, 1.0)


def sdrecon(schedule: NoiseSchedule, sampler: str, steps: int, strength: int) -> Trajectory:
    """SDRecon: a photograph's latent noised to t1…t10 = timesteps 100, 200, …, 1000 of 1000, and denoised from there.

    The last round(steps · strength / 10) steps of the sampler are run, at least one. t1 is almost the photograph, t10
    almost a fresh sample.
    """
    table = make_steps(schedule, sampler, steps, max(1, round(steps * strength / 10)))
    signal = schedule.alphas_cumprod[table.t[0]]
    return _trajectory(schedule, table, np.sqrt(signal), np.sqrt(1.0 - signal))


def _trajectory(schedule: NoiseSchedule, table: Steps, signal: float, noise: float) -> Trajectory:
    rest = schedule.num_train_timesteps - len(table.t)
    padded = Steps(*(np.pad(column, (0, rest)) for column in table))
    return Trajectory(np.float32(signal), np.float32(noise), np.int32(len(table.t)), padded)


def timesteps(schedule: NoiseSchedule, sampler: str, steps: int) -> np.ndarray:
    """The timesteps int [steps], decreasing, as diffusers lays them out for this sampler and spacing.

    Raises:
        UserError: more steps than training timesteps.
    """
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise UserError(f"sampler steps={steps}: expects 1 to {total}")
    if schedule.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1
    # The multistep solver counts the end of the last step too.
    points = steps + 1 if sampler == "dpmpp_2m" else steps
    if schedule.timestep_spacing == "linspace":
        grid = np.linspace(0, total - 1, points).round()
    else:
        grid = np.arange(points) * (total // points) + schedule.steps_offset
    return grid[::-1][:steps].astype(np.int64)


def make_steps(schedule: NoiseSchedule, sampler: str, steps: int, last: int | None = None) -> Steps:
    """The table of a sampler; `last` keeps only that many steps at the end, for starting from a noised image.

    Raises:
        UserError: an unknown sampler.
    """
    t = timesteps(schedule, sampler, steps)[-(last or steps) :]
    alphas = schedule.alphas_cumprod.astype(np.float64)
    make = {"ddpm": _ddpm, "ddim": _ddim, "dpmpp_2m": _dpmpp_2m}.get(sampler)
    if make is None:
        raise UserError(f"sampler {sampler!r}: expects ddpm, ddim or dpmpp_2m")
    table = make(schedule, alphas, t, schedule.num_train_timesteps // steps)
    return Steps(t.astype(np.int32), *(column.astype(np.float32) for column in table))


def _at(alphas: np.ndarray, t: np.ndarray, final: float) -> np.ndarray:
    """ᾱ at the timesteps that steps lead to; `final` past the last."""
    return np.where(t >= 0, alphas[np.maximum(t, 0)], final)


def _ddpm(schedule: NoiseSchedule, alphas: np.ndarray, t: np.ndarray, stride: int) -> tuple[np.ndarray, ...]:
    """Ancestral sampling (Ho et al. 2020, eq. 7): posterior mean, and its variance except at t = 0."""
    del schedule, stride
    now, after = alphas[t], _at(alphas, np.append(t[1:], -1), 1.0)
    ratio = now / after
    x_0 = np.sqrt(after) * (1 - ratio) / (1 - now)
    x = np.sqrt(ratio) * (1 - after) / (1 - now)
    variance = np.maximum((1 - after) / (1 - now) * (1 - ratio), 1e-20)
    return x, x_0, np.zeros_like(x), np.where(t > 0, np.sqrt(variance), 0.0)


def _ddim(schedule: NoiseSchedule, alphas: np.ndarray, t: np.ndarray, stride: int) -> tuple[np.ndarray, ...]:
    """Deterministic DDIM (Song et al. 2021, eq. 12, η = 0)."""
    final = 1.0 if schedule.set_alpha_to_one else alphas[0]
    now, after = alphas[t], _at(alphas, t - stride, final)
    x = np.sqrt((1 - after) / (1 - now))
    return x, np.sqrt(after) - x * np.sqrt(now), np.zeros_like(x), np.zeros_like(x)


def _dpmpp_2m(schedule: NoiseSchedule, alphas: np.ndarray, t: np.ndarray, stride: int) -> tuple[np.ndarray, ...]:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); first and last step are of first order."""
    del schedule, stride
    alpha, sigma = np.append(np.sqrt(alphas[t]), 1.0), np.append(np.sqrt(1 - alphas[t]), 0.0)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))  # the last is infinite: exp(-h) = 0
    x = sigma[1:] / sigma[:-1]
    first = alpha[1:] * (1 - np.exp(-h))
    correction = np.zeros_like(x)
    if len(t) > 2:
        correction[1:-1] = 0.5 * first[1:-1] * h[1:-1] / h[:-2]
    return x, first + correction, -correction, np.zeros_like(x)


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    trajectory: Trajectory,
    latents: Latent,
    keys: PRNGKeyArray,
    anchor: Denoise | None = None,
) -> Latent:
    """Runs a trajectory in one loop.

    Args:
        denoise: (x_t, t [b]) → the network's prediction, guidance included.
        schedule: that the trajectory was made for.
        trajectory: see :func:`from_noise` and :func:`sdrecon`.
        latents: of the photographs, scaled; of no account where the trajectory starts from noise.
        keys: one PRNG key per example [b], so that an example does not depend on its batch.
        anchor: ε_base for latent adaptive normalisation: a second trajectory from the same latents and noise, to whose
            channel means and standard deviations each step's latents are brought.

    Returns:
        Scaled latents of the images, float32.
    """
    pair = jax.vmap(jax.random.split)(keys)

    def normal(keys: PRNGKeyArray) -> Latent:
        return jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)

    def step(index: Int[Array, ""], states: tuple[State, ...]) -> tuple[State, ...]:
        now = jax.tree.map(lambda column: jnp.asarray(column)[index], trajectory.steps)
        noise = now.noise * normal(jax.vmap(lambda key: jax.random.fold_in(key, index))(pair[:, 1]))

        def advance(denoise: Denoise, state: State) -> State:
            x, previous = state
            t = jnp.full(x.shape[0], now.t)
            x_0 = schedule.to_x_0(denoise(x, t), x, t)
            return now.x * x + now.x_0 * x_0 + now.previous_x_0 * previous + noise, x_0

        states = [advance(one, state) for one, state in zip(denoisers, states, strict=True)]
        if anchor is not None:
            (x, x_0), (x_anchor, _) = states
            states[0] = (match_statistics(x, x_anchor), x_0)
        return tuple(states)

    denoisers = [denoise] if anchor is None else [denoise, anchor]
    start = trajectory.signal * latents + trajectory.noise * normal(pair[:, 0])
    begin = ((start, jnp.zeros_like(start)),) * len(denoisers)
    (x, _), *_ = jax.lax.fori_loop(0, trajectory.count, step, begin)
    return x


def match_statistics(x: Latent, like: Latent) -> Latent:
    """x with the mean and the standard deviation of `like` in each channel of each example."""
    mean, deviation = x.mean((1, 2), keepdims=True), x.std((1, 2), keepdims=True)
    return (x - mean) / deviation * like.std((1, 2), keepdims=True) + like.mean((1, 2), keepdims=True)
