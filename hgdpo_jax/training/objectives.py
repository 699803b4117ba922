"""The losses of HG-DPO as pure functions of arrays: no model, no config, no randomness.

Legend: `b` pairs, `h w c` latent; suffix `_w` winner, `_l` loser; prefix `ref_` the reference. All float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Latent = Float[Array, "b h w c"]
PerPair = Float[Array, "b"]


class DPO(NamedTuple):
    """Per pair: the loss −log σ(z), the margin z, whether z > 0 (a tie counts ½), and the four mean squared errors."""

    loss: PerPair
    margin: PerPair
    accuracy: PerPair
    error_w: PerPair
    error_l: PerPair
    ref_error_w: PerPair
    ref_error_l: PerPair


def mean_squared_error(prediction: Latent, target: Latent) -> PerPair:
    """Mean over the elements of each latent."""
    return jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))


def diffusion_dpo(
    pred_w: Latent, pred_l: Latent, ref_w: Latent, ref_l: Latent, target_w: Latent, target_l: Latent, beta: float
) -> DPO:
    """Diffusion-DPO (Wallace et al. 2023, eq. 14), for winner and loser at one timestep with one noise.

      z = −κ · [(m_θ^w − m_θ^l) − (m_ref^w − m_ref^l)],  L = −log σ(z),  κ = β/2

    with m = mean((target − prediction)²). κ = β/2 is that of the authors' code at β = 5000; a script that writes
    κ = β means the same with β = 2500, as does the paper of HG-DPO. m_θ − m_ref is evaluated as
    mean((p − r)·(p + r − 2·target)): the difference of two nearly equal means would lose what DPO learns from, and
    p = r gives exactly 0.
    """

    def gain(pred: Latent, ref: Latent, target: Latent) -> PerPair:
        return jnp.mean((pred - ref) * (pred + ref - 2.0 * target), axis=(1, 2, 3))

    margin = -0.5 * beta * (gain(pred_w, ref_w, target_w) - gain(pred_l, ref_l, target_l))
    return DPO(
        loss=-jax.nn.log_sigmoid(margin),
        margin=margin,
        accuracy=0.5 * (1.0 + jnp.sign(margin)),
        error_w=mean_squared_error(pred_w, target_w),
        error_l=mean_squared_error(pred_l, target_l),
        ref_error_w=mean_squared_error(ref_w, target_w),
        ref_error_l=mean_squared_error(ref_l, target_l),
    )


def statistics_loss(pred_w: Latent, base_w: Latent, mean_shift: Float[Array, "b 1 1 1"]) -> PerPair:
    """L_stat = ‖μ(l^θ_{t−1}) − μ(l^base_{t−1})‖², μ the channel means after one DDPM step from the winner's l_t.

    Both steps share their noise, so the difference is c_t · (base − policy) of the predictions, with
    c_t = `NoiseSchedule.mean_shift(t)`; the sum runs over the channels.
    """
    difference = jnp.mean(mean_shift * (base_w - pred_w), axis=(1, 2))
    return jnp.sum(jnp.square(difference), axis=-1)
