"""What a model was trained to undo, noise by noise: the interface of a diffusion and of a flow.

Both mix x = signal · x_0 + sigma · ε, and both predict something from which x_0 follows. What differs is how noise
levels are counted and drawn, what is predicted, and which steps lead back. Legend: `b` examples, `h w c` latent.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key

Latent = Float[Array, "b h w c"]
Timesteps = Int[Array, "b"] | Float[Array, "b"]  # noise levels, as the network reads them
Scale = Float[Array, ""] | Float[Array, "b 1 1 1"]  # multiplies latents


class Steps(NamedTuple):
    """The n steps of a solver, from noise to image.

    Attributes:
        t: noise levels as the network reads them, int32 or float32 [n].
        signal, sigma: of x = signal · x_0 + sigma · ε at each, float32 [n].
        x, x_0, previous_x_0, noise, clipping: the coefficients a…e of the update, float32 [n]; see
            :mod:`hgdpo_jax.diffusion.solvers`.
    """

    t: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    x: np.ndarray
    x_0: np.ndarray
    previous_x_0: np.ndarray
    noise: np.ndarray
    clipping: np.ndarray


@runtime_checkable
class Process(Protocol):
    """A noise schedule, and what the network predicts.

    Attributes:
        config: scheduler_config.json.
        num_train_timesteps: T.
        prediction_type: `epsilon`, `v_prediction` or `flow`.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def num_train_timesteps(self) -> int: ...

    @property
    def prediction_type(self) -> str: ...

    def draw_times(self, keys: Key[Array, "b"]) -> Timesteps:
        """A noise level for each key, as training draws them."""

    def in_training(self, spread: str, shift: float) -> "Process":
        """The process whose levels are drawn otherwise than uniformly: the settings `train.noise_levels` and
        `train.noise_shift`. Raises UserError where they cannot be."""

    def bin_of(self, t: Timesteps, count: int) -> Int[Array, "b"]:
        """In which of `count` equal parts noise levels lie, the first that of least noise."""

    def add_noise(self, x_0: Latent, noise: Latent, t: Timesteps) -> Latent:
        """x_t."""

    def target(self, x_0: Latent, noise: Latent, t: Timesteps) -> Latent:
        """What the network should predict."""

    def x_0_at(self, prediction: Latent, x_t: Latent, signal: Scale, sigma: Scale) -> Latent:
        """The x_0 that a prediction stands for where x_t = signal · x_0 + sigma · ε."""

    def mean_shift(self, t: Timesteps) -> Float[Array, "b 1 1 1"]:
        """c_t with x^θ − x^ref = c_t · (prediction_ref − prediction_θ) after one of T steps from the same x_t."""

    def of_latents(self, height: int, width: int) -> "Process":
        """The process as images whose latents are of this size are drawn."""

    def make_steps(self, solver: str, steps: int, last: int | None = None) -> Steps:
        """The table of a solver; `last` keeps only that many steps at the end, for starting from a noised image.

        Raises:
            UserError: an unknown solver, a setting that it does not compute, or more steps than T.
        """

    def level(self, thousandths: float) -> float:
        """The noise level, as `t` of a table has it, for a timestep of 0…1000 in Stable Diffusion's count: settings and
        SDRecon's t1…t10, which are 100…1000, name noise levels so for all models."""
