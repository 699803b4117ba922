"""Rectified flow, as FLUX.2 was trained: a straight line from an image to noise, from scheduler_config.json.

x_σ = (1 − σ) · x_0 + σ · ε, and the network predicts the velocity v = dx/dσ = ε − x_0 (Liu et al. 2023; Esser et al.
2024). Noise levels are σ in [0, 1], float32. Legend: `b` examples, `h w c` latent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hgdpo_jax.diffusion.process import Latent, Scale, Steps, Timesteps
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.run.errors import UserError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# What diffusers' class of this name may be told. The first value is its default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "time_shift_type": ("exponential",),
    "use_beta_sigmas": (False,),
    "use_dynamic_shifting": (False, True),
    "use_exponential_sigmas": (False,),
    "use_karras_sigmas": (False,),
}
# FLUX.2's shift: μ at 10 and at 200 steps is a line in the number of tokens; from so many tokens on the second alone.
_AT_10, _AT_200, _LARGE = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300
# Stable Diffusion's: its timesteps name noise levels for all models.
_SD = NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


@dataclass(frozen=True)
class FlowSchedule:
    """How σ is laid out in drawing and drawn in training.

    Attributes:
        config: scheduler_config.json.
        num_train_timesteps: T.
        shift: of the steps in drawing where the file has no `use_dynamic_shifting`.
        tokens: of an image's latent, on which the shift depends otherwise.
        spread: how training draws σ, `uniform` or `logit_normal`, before it is shifted by `train_shift`.
        train_shift: σ → shift · σ / (1 + (shift − 1) · σ); 1 leaves them.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    num_train_timesteps: int = 1000
    shift: float = 1.0
    tokens: int = 0
    spread: str = "uniform"
    train_shift: float = 1.0
    prediction_type: str = "flow"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "") -> "FlowSchedule":
        """Reads diffusers' scheduler_config.json.

        Raises:
            UserError: a setting that is not computed; the line begins with `source`.
        """
        for key, values in _ONLY.items():
            if config.get(key, values[0]) not in values:
                raise UserError(f"{source}scheduler config {key}={config[key]!r}: expects one of {values}")
        count, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= 100_000:
            raise UserError(f"{source}scheduler config num_train_timesteps={count!r}: expects a count")
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
            raise UserError(f"{source}scheduler config shift={shift!r}: expects a number above 0")
        return cls(config, count, float(shift))

    def in_training(self, spread: str, shift: float) -> "FlowSchedule":
        """See :class:`hgdpo_jax.diffusion.process.Process`."""
        return replace(self, spread=spread, train_shift=float(shift))

    def draw_times(self, keys: Key[Array, "b"]) -> Timesteps:
        """σ of each key, as `spread` and `train_shift` say (Esser et al. 2024, section 3.1)."""
        if self.spread == "uniform":
            sigma = jax.vmap(jax.random.uniform)(keys)
        else:
            sigma = jax.nn.sigmoid(jax.vmap(jax.random.normal)(keys))
        return self.train_shift * sigma / (1.0 + (self.train_shift - 1.0) * sigma)

    def bin_of(self, t: Timesteps, count: int) -> Int[Array, "b"]:
        """See :class:`hgdpo_jax.diffusion.process.Process`."""
        return jnp.minimum((t * count).astype(jnp.int32), count - 1)

    def add_noise(self, x_0: Latent, noise: Latent, t: Timesteps) -> Latent:
        """x_σ."""
        sigma = t[:, None, None, None]
        return (1.0 - sigma) * x_0 + sigma * noise

    def target(self, x_0: Latent, noise: Latent, t: Timesteps) -> Latent:
        """v, the same at all σ."""
        del t
        return noise - x_0

    def x_0_at(self, prediction: Latent, x_t: Latent, signal: Scale, sigma: Scale) -> Latent:
        """x_σ − σ · v."""
        del signal
        return x_t - sigma * prediction

    def mean_shift(self, t: Timesteps) -> Float[Array, "b 1 1 1"]:
        """c_σ with x^θ − x^ref = c_σ · (v_ref − v_θ) after one of T equal steps.

        A step of the solver, Euler's, is x + (σ' − σ) · v, so that c is σ − σ' = 1/T, but σ below that: the last step
        ends at the image. (An ancestral step with shared noise, as the DDPM's is, would have almost twice as much.)
        """
        return jnp.minimum(t, 1.0 / self.num_train_timesteps)[:, None, None, None]

    def of_latents(self, height: int, width: int) -> "FlowSchedule":
        """The process as images of so many latent cells are drawn: their number decides the shift."""
        return replace(self, tokens=height * width)

    def make_steps(self, solver: str, steps: int, last: int | None = None) -> Steps:
        """Euler's steps on a shifted grid; see :class:`hgdpo_jax.diffusion.process.Process`.

        x + (σ' − σ) · v is the DDIM-like update (σ'/σ) · x + (1 − σ'/σ) · x̂_0.
        """
        if solver != "euler":
            raise UserError(f"sampler {solver!r}: this model is a flow; expects euler")
        if not 1 <= steps <= self.num_train_timesteps:
            raise UserError(f"sampler steps={steps}: expects 1 to {self.num_train_timesteps}")
        ratio = math.exp(self._mu(steps)) if self.config.get("use_dynamic_shifting") else self.shift
        grid = np.linspace(1.0, 1.0 / steps, steps)
        now = (ratio * grid / (1.0 + (ratio - 1.0) * grid))[-(last or steps) :]
        kept = np.append(now[1:], 0.0) / now
        columns = (now, 1.0 - now, now, kept, 1.0 - kept, 0.0, 0.0, 0.0)
        return Steps(*(np.broadcast_to(column, now.shape).astype(np.float32) for column in columns))

    def _mu(self, steps: int) -> float:
        """ln of FLUX.2's shift: a line in the number of steps between two that were measured."""
        at_10, at_200 = (slope * self.tokens + start for slope, start in (_AT_10, _AT_200))
        return at_200 if self.tokens > _LARGE else at_200 + (at_10 - at_200) * (200 - steps) / 190

    def level(self, thousandths: float) -> float:
        """σ with as much signal beside the noise as at a timestep of Stable Diffusion; 0 at 0, 1 at 1000."""
        signal = np.sqrt([1.0, *_SD.alphas_cumprod[1:].astype(np.float64), 0.0])
        noise = np.sqrt(1.0 - signal**2)
        return float(np.interp(thousandths, np.arange(len(signal)), noise / (signal + noise)))
