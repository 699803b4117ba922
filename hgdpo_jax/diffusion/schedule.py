"""The noise schedule and the forward process, from scheduler_config.json.

x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε (Ho et al. 2020); v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0 (Salimans and Ho 2022).
Legend: `b` examples, `h w c` latent, `n` training timesteps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hgdpo_jax.diffusion import solvers
from hgdpo_jax.diffusion.process import Latent, Scale, Steps, Timesteps
from hgdpo_jax.run.errors import UserError

# diffusers' classes for networks that were trained on steps of β, and what each takes for keys that the file leaves
# out: beta_start, beta_end, beta_schedule.
_LINEAR = """DDIMInverse DDIMParallel DDIM DDPMParallel DDPM DEISMultistep DPMSolverMultistepInverse DPMSolverMultistep
DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete LMSDiscrete PNDM SASolver UniPCMultistep"""
_LINEAR_LATER = "DPMSolverSDE HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete"
_BETAS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(_LINEAR.split(), (1e-4, 0.02, "linear")),
    **dict.fromkeys(_LINEAR_LATER.split(), (0.00085, 0.012, "linear")),
    **dict.fromkeys(("LCM", "TCD"), (0.00085, 0.012, "scaled_linear")),
}
# The first value is what an absent key means. The last three are of EDM (Karras et al. 2022) and of flow matching.
_ONLY: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "rescale_betas_zero_snr": (False, True),
    "trained_betas": (None,),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "sigma_data": (None,),
    "shift": (None,),
}


_MOST = 100_000  # timesteps; every Stable Diffusion has 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t for the training timesteps, and what the network predicts.

    Attributes:
        alphas_cumprod: ᾱ_t, float32, decreasing in [0, 1); the last is 0 with `rescale_betas_zero_snr`.
        prediction_type: `epsilon` or `v_prediction`.
        config: scheduler_config.json, of which :mod:`hgdpo_jax.diffusion.solvers` reads the rest.
    """

    alphas_cumprod: Float[np.ndarray, "n"]
    prediction_type: str = "epsilon"
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "") -> "NoiseSchedule":
        """Reads diffusers' scheduler_config.json.

        Raises:
            UserError: a setting that is not computed; the line begins with `source`.
        """
        scheduler = str(config.get("_class_name", "DDPMScheduler")).removesuffix("Scheduler")
        if scheduler not in _BETAS:
            raise UserError(f"{source}{scheduler}Scheduler: not supported, only those whose networks were trained on "
                            "steps of beta, as DDIMScheduler; EDM and flow matching are not")  # fmt: skip
        for key, values in _ONLY.items():
            if config.get(key, values[0]) not in values:
                raise UserError(f"{source}scheduler config {key}={config[key]!r}: expects one of {values}")
        names = ("beta_start", "beta_end", "beta_schedule")
        start, end, shape = (config.get(name, default) for name, default in zip(names, _BETAS[scheduler], strict=True))
        count = config.get("num_train_timesteps", 1000)
        if not (isinstance(count, int) and isinstance(start, float) and isinstance(end, float)
                and 0 < count <= _MOST and 0 < start < end < 1):  # fmt: skip
            raise UserError(f"{source}scheduler config num_train_timesteps={count!r}, beta_start={start!r}, "
                            f"beta_end={end!r}: expects a count, and numbers that rise between 0 and 1")  # fmt: skip
        # float32 as in diffusers: the tables agree to the last bits.
        if shape == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, count, dtype=np.float64).astype(np.float32) ** 2
        elif shape == "linear":
            betas = np.linspace(start, end, count, dtype=np.float64).astype(np.float32)
        else:
            raise UserError(f"{source}scheduler config beta_schedule={shape!r}: expects scaled_linear or linear")
        alphas, prediction = np.cumprod(1.0 - betas, dtype=np.float32), config.get("prediction_type", "epsilon")
        if alphas[-1] < np.finfo(np.float32).tiny:
            raise UserError(f"{source}scheduler config num_train_timesteps={count}, beta_start={start}, "
                            f"beta_end={end}: leave no signal at the last timestep; expects smaller ones")  # fmt: skip
        if config.get("rescale_betas_zero_snr"):
            if prediction == "epsilon":
                raise UserError(f"{source}scheduler config rescale_betas_zero_snr=True with prediction_type='epsilon': "
                                "of pure noise the noise says nothing; expects v_prediction")  # fmt: skip
            # √ᾱ shifted so that the last is 0, and scaled so that the first stays (Lin et al. 2024, algorithm 1).
            roots = np.sqrt(alphas)
            alphas = np.square((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1]))
        return cls(alphas, prediction, config)

    @property
    def num_train_timesteps(self) -> int:
        """T, 1000 for every Stable Diffusion."""
        return len(self.alphas_cumprod)

    def draw_times(self, keys: Key[Array, "b"]) -> Timesteps:
        """All timesteps are drawn alike."""
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_train_timesteps))(keys)

    def in_training(self, spread: str, shift: float) -> "NoiseSchedule":
        """Of a flow. Raises UserError."""
        raise UserError(f"config keys train.noise_levels={spread}, train.noise_shift={shift:g}: are of a flow model; "
                        "this one is trained on steps of beta, all alike: expects uniform and 1")  # fmt: skip

    def bin_of(self, t: Timesteps, count: int) -> Int[Array, "b"]:
        """See :class:`hgdpo_jax.diffusion.process.Process`."""
        return t * count // self.num_train_timesteps

    def signal_and_noise(self, t: Timesteps) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
        """(√ᾱ_t, √(1−ᾱ_t)), shaped to multiply latents."""
        alpha = jnp.asarray(self.alphas_cumprod)[t][:, None, None, None]
        return jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)

    def add_noise(self, x_0: Latent, noise: Latent, t: Timesteps) -> Latent:
        """x_t."""
        signal, sigma = self.signal_and_noise(t)
        return signal * x_0 + sigma * noise

    def target(self, x_0: Latent, noise: Latent, t: Timesteps) -> Latent:
        """What the network should predict: ε, or v."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self.signal_and_noise(t)
        return signal * noise - sigma * x_0

    def x_0_at(self, prediction: Latent, x_t: Latent, signal: Scale, sigma: Scale) -> Latent:
        """The x_0 that a prediction stands for where x_t = signal · x_0 + sigma · ε."""
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def mean_shift(self, t: Timesteps) -> Float[Array, "b 1 1 1"]:
        """c_t with l^θ_{t−1} − l^ref_{t−1} = c_t · (prediction_ref − prediction_θ) in one ancestral DDPM step.

        The posterior mean is √ᾱ_{t−1} β_t/(1−ᾱ_t) · x̂_0 + … · x_t (Ho et al. 2020, eq. 7), with ᾱ_{−1} = 1, and only
        x̂_0 depends on the prediction: by √((1−ᾱ_t)/ᾱ_t) for ε, by √(1−ᾱ_t) for v.
        """
        table = np.asarray(self.alphas_cumprod, np.float64)
        before = np.concatenate([[1.0], table[:-1]])
        beta = 1.0 - table / before
        x_0 = np.sqrt(before) * beta / (1.0 - table)
        per_prediction = np.sqrt(1.0 - table)
        if self.prediction_type == "epsilon":
            per_prediction = per_prediction / np.sqrt(table)
        return jnp.asarray(x_0 * per_prediction, jnp.float32)[t][:, None, None, None]

    def of_latents(self, height: int, width: int) -> "NoiseSchedule":
        """The same for images of every size."""
        del height, width
        return self

    def make_steps(self, solver: str, steps: int, last: int | None = None) -> Steps:
        """DDPM, DDIM or DPM-Solver++(2M); see :class:`hgdpo_jax.diffusion.process.Process`."""
        return solvers.make_steps(self.alphas_cumprod, self.config, solver, steps, last)

    def level(self, thousandths: float) -> float:
        """See :class:`hgdpo_jax.diffusion.process.Process`."""
        return thousandths * self.num_train_timesteps / 1000
