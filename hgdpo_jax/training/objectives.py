"""The losses of HG-DPO as pure functions of arrays: no model, no config, no randomness.

Legend: `b` pairs, `h w c` latent. All float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Latent = Float[Array, "b h w c"]
PerPair = Float[Array, "b"]


class WinnerLoser(NamedTuple):
    """The same thing of each pair's winner and loser: predictions or targets."""

    winner: Latent
    loser: Latent


class DPO(NamedTuple):
    """Per pair: the loss −log σ(z), the margin z, whether z > 0 (a tie counts ½), and the four mean squared errors."""

    loss: PerPair
    margin: PerPair
    accuracy: PerPair
    error_winner: PerPair
    error_loser: PerPair
    error_winner_reference: PerPair
    error_loser_reference: PerPair


def mean_squared_error(prediction: Latent, target: Latent) -> PerPair:
    """Mean over the elements of each latent."""
    return jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))


def diffusion_dpo(policy: WinnerLoser, reference: WinnerLoser, target: WinnerLoser, beta: Float[ArrayLike, ""]) -> DPO:
    """Diffusion-DPO (Wallace et al. 2023, eq. 14), for winner and loser at one timestep with one noise.

      z = −κ · [(m_θ^w − m_θ^l) − (m_ref^w − m_ref^l)],  L = −log σ(z),  κ = β/2

    with m = mean((target − prediction)²). κ = β/2 is that of the authors' code at β = 5000; a script that writes
    κ = β means the same with β = 2500, as does the paper of HG-DPO. m_θ − m_ref is evaluated as
    mean((p − r)·(p + r − 2·target)): the difference of two nearly equal means would lose what DPO learns from, and
    p = r gives exactly 0.

    Args:
        policy, reference: their predictions.
        target: what they should predict.
        beta: β, above 0.
    """

    def gain(pred: Latent, ref: Latent, target: Latent) -> PerPair:
        return jnp.mean((pred - ref) * (pred + ref - 2.0 * target), axis=(1, 2, 3))

    winner, loser = zip(policy, reference, target, strict=True)
    margin = jnp.multiply(-0.5 * beta, gain(*winner) - gain(*loser))
    return DPO(
        loss=-jax.nn.log_sigmoid(margin),
        margin=margin,
        accuracy=0.5 * (1.0 + jnp.sign(margin)),
        error_winner=mean_squared_error(policy.winner, target.winner),
        error_loser=mean_squared_error(policy.loser, target.loser),
        error_winner_reference=mean_squared_error(reference.winner, target.winner),
        error_loser_reference=mean_squared_error(reference.loser, target.loser),
    )


def statistics_loss(policy: Latent, base: Latent, mean_shift: Float[Array, "b 1 1 1"]) -> PerPair:
    """L_stat = ‖μ(l^θ_{t−1}) − μ(l^base_{t−1})‖², μ the channel means after one DDPM step from the winner's l_t.

    Both steps share their noise, so the difference is c_t · (base − policy) of the predictions; the sum runs over the
    channels.

    Args:
        policy, base: their predictions for the winner.
        mean_shift: c_t, see :meth:`hgdpo_jax.diffusion.schedule.NoiseSchedule.mean_shift`.
    """
    difference = jnp.mean(mean_shift * (base - policy), axis=(1, 2))
    return jnp.sum(jnp.square(difference), axis=-1)
