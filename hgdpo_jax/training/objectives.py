"""The losses of HG-DPO, and other objectives for pairs, as pure functions: no model, no config, no randomness.

Legend: `b` pairs, `h w c` latent. All float32. m is a mean squared error of the policy, r the reference's, g = m − r;
superscripts w and l: of the winner and the loser; u = g^l − g^w, z = κu with κ = β/2. docs/objectives.md says when to
take which.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Latent = Float[Array, "b h w c"]
PerPair = Float[Array, "b"]
Scalar = Float[ArrayLike, ""]


class WinnerLoser(NamedTuple):
    """The same thing of each pair's winner and loser: predictions, targets, errors or scores."""

    winner: Array
    loser: Array


def mean_squared_error(prediction: Latent, target: Latent) -> PerPair:
    """Mean over the elements of each latent."""
    return jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))


class Compared(NamedTuple):
    """The predictions for a batch of pairs, of policy and reference, and what they should be.

    `reference` is None for an objective that does without; then only `error` is defined of the errors.
    """

    policy: WinnerLoser
    reference: Any
    target: WinnerLoser

    @property
    def error(self) -> WinnerLoser:
        """m, per pair."""
        return WinnerLoser(*map(mean_squared_error, self.policy, self.target))

    @property
    def error_reference(self) -> WinnerLoser:
        """r, per pair."""
        return WinnerLoser(*map(mean_squared_error, self.reference, self.target))

    @property
    def gain(self) -> WinnerLoser:
        """g, per pair: negative where the policy predicts better.

        It is evaluated as mean((p − o)·(p + o − 2·target)), p and o the predictions: the difference of two nearly equal
        means would lose what DPO learns from, and p = o gives exactly 0.
        """

        def gain(pred: Latent, ref: Latent, target: Latent) -> PerPair:
            return jnp.mean((pred - ref) * (pred + ref - 2.0 * target), axis=(1, 2, 3))

        return WinnerLoser(*map(gain, *self))


def margin(pairs: Compared, beta: Scalar) -> PerPair:
    """z = −κ · (g^w − g^l), κ = β/2.

    That is the κ of the authors' code at β = 5000; a script that writes κ = β means the same with β = 2500, as does the
    paper of HG-DPO.
    """
    scale, gain = -0.5 * beta, pairs.gain
    return jnp.multiply(scale, gain.winner - gain.loser)


def dpo(z: PerPair, smoothing: Scalar | None = None) -> PerPair:
    """−log σ(z) (Wallace et al. 2023, eq. 14).

    With a smoothing s, the share of pairs that are taken to be labelled the wrong way round (conservative DPO, Mitchell
    2023): −(1 − s) log σ(z) − s log σ(−z), which is lowest at the finite z = log((1 − s)/s).
    """
    if smoothing is None:
        return -jax.nn.log_sigmoid(z)
    return jnp.multiply(smoothing, z) - jax.nn.log_sigmoid(z)  # log σ(−z) = log σ(z) − z


def hinge(z: PerPair) -> PerPair:
    """max(0, 1 − z) (SLiC, Zhao et al. 2023): a pair that is won by 1 teaches nothing more."""
    return jax.nn.relu(1.0 - z)


def ipo(gain: WinnerLoser, beta: Scalar) -> PerPair:
    """(u − 1/(2κ))² (Azar et al. 2023, eq. 17, with κ for its τ): the lead has an aim, and beyond it costs.

    Times κ² it is (z − ½)², which the step takes: at κ = 2500 its gradient would else be lost beside Adam's ε.
    """
    return jnp.square(gain.loser - gain.winner - 1.0 / beta)  # 2κ = β


def kto(gain: WinnerLoser, beta: Scalar) -> PerPair:
    """Diffusion-KTO (Li et al. 2024), with the winners as desirable and the losers as undesirable images.

    1 − σ(±κ(−g − Q)), + for winners, and the mean of the pair's two; Q = max(0, mean of −g) over all images of the
    batch is a constant.
    """
    threshold = jax.lax.stop_gradient(jax.nn.relu(-0.5 * (gain.winner.mean() + gain.loser.mean())))
    of_winner, of_loser = (0.5 * beta * (-g - threshold) for g in gain)
    return 1.0 - 0.5 * (jax.nn.sigmoid(of_winner) + jax.nn.sigmoid(-of_loser))


def dspo(pairs: Compared, weight: Scalar) -> PerPair:
    """DSPO (Zhu et al. 2025, as its code trains SD1.5): mean of ((p^w − target^w) − β · σ(−z) · (p^w − o^w))².

    The winner's error, with a target that moves beyond the winner the more the pair is lost; the gradient goes through
    σ too. β = weight is small, and z is that of this β.
    """
    p, o = pairs.policy.winner, pairs.reference.winner
    lost = (weight * jax.nn.sigmoid(-margin(pairs, weight))).reshape(-1, 1, 1, 1)
    return jnp.mean(jnp.square(p - pairs.target.winner - lost * (p - o)), axis=(1, 2, 3))


def mapo_margin(error: WinnerLoser) -> PerPair:
    """T · (φ(m^w) − φ(m^l)) with φ(m) = sm/(e^{sm} − 1), s = 0.5, T = 1000: see :func:`mapo`."""
    of_winner, of_loser = (0.5 * m / jnp.expm1(0.5 * m) for m in error)
    return 1000.0 * (of_winner - of_loser)


def mapo(error: WinnerLoser, weight: Scalar) -> PerPair:
    """MaPO (Hong et al. 2024, as its code has it): m^w − weight · log σ(margin), without a reference."""
    return error.winner - weight * jax.nn.log_sigmoid(mapo_margin(error))


def smpo(z: PerPair, scores: WinnerLoser, weight: Scalar) -> PerPair:
    """SmPO (Lu et al. 2025): −log σ((2α − γ)z), α = γ · softmax of the winner's score against the loser's, γ = weight.

    Pairs that the scorer could not tell apart teach little. Without the paper's inversion of the latents.

    Args:
        z: margin.
        scores: per pair, from 0 to 1 in the batch.
        weight: γ.
    """
    return -jax.nn.log_sigmoid(weight * jnp.tanh(0.5 * (scores.winner - scores.loser)) * z)  # 2σ(x) − 1 = tanh(x/2)


def scaled_scores(scores: WinnerLoser) -> WinnerLoser:
    """The scores of a batch, the lowest of which becomes 0 and the highest 1."""
    low, high = (f(jnp.stack(scores)) for f in (jnp.min, jnp.max))
    return WinnerLoser(*((x - low) / jnp.maximum(high - low, 1e-12) for x in scores))


def safeguard(policy: WinnerLoser, target: WinnerLoser, strength: Scalar) -> tuple[WinnerLoser, PerPair]:
    """Diffusion-SDPO's safeguard of the winner (Fu et al. 2025): predictions whose loser teaches λ times as much.

    With the gradients G of the two errors by the predictions: λ = clip((1 − μ)‖G^w‖² / ⟨G^w, G^l⟩, 0, 1) where the
    product is positive, else 1: to first order a step in which the loser's error grows leaves the winner's falling by a
    share μ. One λ for each pair, so that it does not depend on the devices.

    Args:
        policy: its predictions, which keep their values.
        target: what they should be.
        strength: μ, from 0 to 1.

    Returns:
        The predictions, and λ.
    """
    of_winner, of_loser = (jax.lax.stop_gradient(p - t) for p, t in zip(policy, target, strict=True))
    product, square = (jnp.sum(of_winner * x, axis=(1, 2, 3)) for x in (of_loser, of_winner))
    share = jnp.where(product > 0.0, jnp.clip((1.0 - strength) * square / jnp.maximum(product, 1e-9), 0.0, 1.0), 1.0)
    constant = jax.lax.stop_gradient(policy.loser)
    return policy._replace(loser=constant + share.reshape(-1, 1, 1, 1) * (policy.loser - constant)), share


LEAD_DECAY = 0.99


def mean_lead(gain: WinnerLoser) -> Float[Array, ""]:
    """The mean of |u| over a batch, a constant."""
    return jax.lax.stop_gradient(jnp.abs(gain.loser - gain.winner).mean())


def running_lead(before: Scalar, lead: Scalar) -> Float[Array, ""]:
    """The running mean of |u| after another batch, which is the first where `before` is 0; the old one where the batch
    overflowed."""
    new = jnp.where(before > 0.0, LEAD_DECAY * before + (1.0 - LEAD_DECAY) * lead, lead)  # type: ignore[operator]
    return jnp.where(jnp.isfinite(new), new, before)


def beta_for(lead: Scalar, target: Scalar, beta: Scalar) -> Float[Array, ""]:
    """β at which a pair of the mean |u| has σ(−z) = target (SimpleTuner's auto β): 2 · log(1/target − 1) / lead. While
    there is no lead, since the policy is its reference, `beta`."""
    return jnp.where(lead > 0.0, 2.0 * jnp.log(1.0 / target - 1.0) / jnp.maximum(lead, 1e-30), beta)  # type: ignore[operator]


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
