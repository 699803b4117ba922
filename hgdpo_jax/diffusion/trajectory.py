"""A trajectory from a noisy latent to an image, run in one loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hgdpo_jax.diffusion.guidance import Denoise
from hgdpo_jax.diffusion.process import Latent, Process, Steps

Given = Float[Array | np.ndarray, "b h w c"]
State = tuple[Latent, Latent]  # x_t, and the last x̂_0


class Trajectory(NamedTuple):
    """Where a solver starts, x = signal · latent + noise · ε, and the rows of the table that it runs: from `first` to
    before `length`.

    All of it is an argument of the program that draws. The table has a row for every training timestep, so that one
    program does for all solvers, steps and strengths. Where the table says so, x̂_0 is clipped to [-clip, clip].
    """

    signal: np.float32
    noise: np.float32
    length: np.int32
    clip: np.float32
    table: Steps
    first: np.int32 = np.int32(0)

    @classmethod
    def of_table(
        cls, schedule: Process, table: Steps, signal: float | np.float32, noise: float | np.float32
    ) -> "Trajectory":
        """A trajectory that runs a whole table."""
        rest = schedule.num_train_timesteps - len(table.t)
        clip = schedule.config.get("clip_sample_range", 1.0)
        padded = Steps(*(np.pad(column, (0, rest)) for column in table))
        return cls(np.float32(signal), np.float32(noise), np.int32(len(table.t)), np.float32(clip), padded)


def from_noise(schedule: Process, solver: str, steps: int) -> Trajectory:
    """A fresh sample: all steps of a solver.

    Raises:
        UserError: see :class:`hgdpo_jax.diffusion.process.Process`.
    """
    return Trajectory.of_table(schedule, schedule.make_steps(solver, steps), signal=0.0, noise=1.0)


def sample(
    denoise: Denoise,
    schedule: Process,
    trajectory: Trajectory,
    latents: Given,
    keys: Key[Array, "b"],
    anchor: Denoise | None = None,
    redrawn: Float[Array | np.ndarray, "b h w 1"] | None = None,
    state: tuple[Given, Given] | None = None,
) -> State:
    """Runs a trajectory.

    Args:
        denoise: (x_t, t [b]) → the network's prediction, guidance included.
        schedule: that the trajectory was made for.
        trajectory: see :func:`from_noise` and :func:`hgdpo_jax.diffusion.sdrecon.sdrecon`.
        latents: of the photographs, scaled; a trajectory from noise uses their shape alone.
        keys: one for each example, so that an example does not depend on its batch.
        anchor: ε_base for latent adaptive normalisation: it runs a second trajectory from the same latents and noise,
            to whose channel means and standard deviations the latents are brought in each step.
        redrawn: 1 where a photograph is redrawn. Where it is 0 every step begins with the photograph's own latent,
            noised to its timestep, and the result is that latent.
        state: after the steps before the trajectory's first, where that is not 0; without `anchor`.

    Returns:
        Scaled latents, float32: those of the images after the last step of the table; and the x̂_0 of the last step.
    """
    pair = jax.vmap(jax.random.split)(keys)
    denoisers = [denoise] if anchor is None else [denoise, anchor]

    def normal(keys: Key[Array, "b"]) -> Latent:
        return jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)

    def beside(x: Latent, signal: Float[Array, ""] | float, sigma: Float[Array, ""] | float) -> Latent:
        """x in what is redrawn, the photograph elsewhere."""
        if redrawn is None:
            return x
        kept = signal * latents + sigma * normal(pair[:, 0])
        return jnp.where(redrawn > 0, x, kept)

    def step(index: Int[Array, ""], states: tuple[State, ...]) -> tuple[State, ...]:
        now = jax.tree.map(lambda column: jnp.asarray(column)[index], trajectory.table)
        noise = now.noise * normal(jax.vmap(lambda key: jax.random.fold_in(key, index))(pair[:, 1]))

        def advance(denoise: Denoise, state: State) -> State:
            x, previous = state
            x = beside(x, now.signal, now.sigma)
            t = jnp.full(x.shape[0], now.t)
            x_0 = schedule.x_0_at(denoise(x, t), x, now.signal, now.sigma)
            clipped = now.clipping * (jnp.clip(x_0, -trajectory.clip, trajectory.clip) - x_0)
            return now.x * x + now.x_0 * x_0 + now.previous_x_0 * previous + noise + clipped, x_0

        (x, x_0), *others = [advance(one, state) for one, state in zip(denoisers, states, strict=True)]
        for x_anchor, _ in others:
            x = match_statistics(x, x_anchor)
        return (x, x_0), *others

    start = trajectory.signal * latents + trajectory.noise * normal(pair[:, 0])
    begin = start, jnp.zeros_like(start)
    if state is not None:
        begin = jax.tree.map(lambda before, fresh: jnp.where(trajectory.first > 0, before, fresh), state, begin)
    (x, x_0), *_ = jax.lax.fori_loop(trajectory.first, trajectory.length, step, (begin,) * len(denoisers))
    return beside(x, 1.0, 0.0), x_0


def match_statistics(x: Latent, like: Latent) -> Latent:
    """x with the mean and the standard deviation of `like` in each channel of each example."""
    mean, deviation = x.mean((1, 2), keepdims=True), x.std((1, 2), keepdims=True)
    return (x - mean) / deviation * like.std((1, 2), keepdims=True) + like.mean((1, 2), keepdims=True)
