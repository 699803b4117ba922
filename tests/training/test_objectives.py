"""The losses against independent evaluations of their formulas."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from jax.typing import ArrayLike
from jaxtyping import Array
from torch import Tensor

from hgdpo_jax.config import PREFERENCE
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.training import objectives
from hgdpo_jax.training.objectives import Compared, WinnerLoser, statistics_loss
from tests.rounding import EPS, assert_close

SHAPE = (6, 5, 4, 3)
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def arrays(count: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(count)]


def sides(*arrays: ArrayLike) -> WinnerLoser:
    return WinnerLoser(*map(jnp.asarray, arrays))


def test_the_margin_is_the_formula_in_float64() -> None:
    pred_w, pred_l, target_w, target_l, d_w, d_l = arrays(6)
    ref_w, ref_l = pred_w + 1e-3 * d_w, pred_l + 1e-3 * d_l
    beta = 5000.0
    pairs = Compared(sides(pred_w, pred_l), sides(ref_w, ref_l), sides(target_w, target_l))
    m = lambda p, t: np.mean((np.float64(t) - np.float64(p)) ** 2, axis=(1, 2, 3))  # noqa: E731
    z = -beta / 2 * ((m(pred_w, target_w) - m(pred_l, target_l)) - (m(ref_w, target_w) - m(ref_l, target_l)))
    # The mean of 60 products, of a few roundings each; κ = β/2 multiplies the largest.
    largest = float(jnp.abs((pred_w - ref_w) * (pred_w + ref_w - 2 * target_w)).max())
    found = objectives.margin(pairs, beta)
    assert_close(found, z, 10 * EPS, size=beta / 2 * largest)
    assert_close(
        objectives.dpo(found), np.logaddexp(0, -z), 10 * EPS, size=beta / 2 * largest
    )  # its slope is at most 1
    assert_close(pairs.error_reference.loser, m(ref_l, target_l), 10 * EPS)


def test_policy_equal_to_reference_gives_ln_2_and_margin_0() -> None:
    pred, target = sides(*arrays(2)), sides(*arrays(2, seed=1))
    found = objectives.margin(Compared(pred, pred, target), 5000.0)
    # x − x and 0 · x round nothing, on any processor; exp and log are approximated.
    assert np.array_equal(found, np.zeros(6))
    assert_close(objectives.dpo(found), np.full(6, np.log(2)), 4 * EPS)


# Errors of three pairs, κ = 100: the values are those of an independent evaluation of each formula in float64.
BETA = 200.0
M_W, R_W, M_L, R_L = np.array([[0.1, 0.11, 0.205, 0.2], [0.13, 0.12, 0.15, 0.155], [0.12, 0.11, 0.26, 0.2]]).T


def of_errors() -> Compared:
    """Pairs with these errors, in latents of one number whose target is 0."""
    m_w, r_w, m_l, r_l = (np.sqrt(x).reshape(-1, 1, 1, 1) for x in (M_W, R_W, M_L, R_L))
    zero = np.zeros_like(m_w)
    return Compared(sides(m_w, m_l), sides(r_w, r_l), sides(zero, zero))


GOLDEN: dict[str, tuple[Callable[[Compared, Array], Any], list[float]]] = {
    "dpo": (lambda pairs, z: objectives.dpo(z), [0.201413278, 1.701413278, 0.00671534849]),
    "hinge": (lambda pairs, z: objectives.hinge(z), [0.0, 2.5, 0.0]),
    "ipo": (lambda pairs, z: objectives.ipo(pairs.gain, BETA), [1e-4, 4e-4, 2.025e-3]),
    "mapo's margin": (lambda pairs, z: objectives.mapo_margin(pairs.error), [25.5829571, 4.88335248, 33.8920452]),
    "mapo": (lambda pairs, z: objectives.mapo(pairs.error, 0.1), [0.1, 0.130754307, 0.12]),
    "smpo": (
        lambda pairs, z: objectives.smpo(z, sides(np.full(3, 0.8), np.full(3, 0.3)), 10.0),
        [0.0250636192, 3.69884356, 4.80460597e-6],
    ),
    "auto β": (
        lambda pairs, z: objectives.dpo(objectives.margin(pairs, found_beta(pairs))).mean(),
        0.535434447,  # type: ignore[dict-item]
    ),
}


def found_beta(pairs: Compared) -> Array:
    """After one batch, for σ(−z) = 0.2."""
    lead = objectives.running_lead(0.0, objectives.mean_lead(pairs.gain))
    return objectives.beta_for(lead, 0.2, BETA)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    with jax.enable_x64(True):
        pairs = of_errors()
        z = objectives.margin(pairs, BETA)
        np.testing.assert_allclose(z, [1.5, -1.5, 5.0], rtol=1e-12)
        f, expected = GOLDEN[name]
        # The printed values have nine digits.
        np.testing.assert_allclose(f(pairs, z), expected, rtol=5e-9, atol=1e-9 if name == "mapo" else 1e-14)


@pytest.mark.parametrize(("row", "value"), [(0, 0.320821301), (1, 0.676758955), (2, 0.366765601)])
def test_golden_values_of_kto_whose_threshold_is_of_the_batch(row: int, value: float) -> None:
    with jax.enable_x64(True):
        gain = WinnerLoser(*(x[row : row + 1] for x in of_errors().gain))
        np.testing.assert_allclose(objectives.kto(gain, BETA), [value], rtol=5e-9)


# Differences of predictions and targets of a pair, [1 2 2 1].
P_W, P_L, O_W, O_L = (
    np.array(x).reshape(1, 2, 2, 1)
    for x in (
        [0.2, -0.1, 0.4, 0.1], [0.3, 0.1, 0.2, -0.2], [0.25, -0.2, 0.35, 0.2], [0.2, 0.2, 0.1, -0.1]
    )
)  # fmt: skip


def test_golden_values_of_dspo_and_of_the_safeguard() -> None:
    with jax.enable_x64(True):
        zero = sides(np.zeros_like(P_W), np.zeros_like(P_W))
        pairs = Compared(sides(P_W, P_L), sides(O_W, O_L), zero)
        z = objectives.margin(pairs, BETA)
        np.testing.assert_allclose(objectives.dpo(z), [0.0429990792], rtol=5e-9)
        for weight, value in ((0.001, 0.0550025015), (0.5, 0.0566326964)):
            np.testing.assert_allclose(objectives.dspo(pairs, weight), [value], rtol=5e-9)

        def guarded(policy: WinnerLoser, strength: float) -> Array:
            safe, _ = objectives.safeguard(policy, zero, strength)
            return objectives.dpo(objectives.margin(pairs._replace(policy=safe), BETA)).sum()

        for strength, share, slope in ((0.9, 0.2, -0.126263184), (0.6, 0.8, -0.505052735), (0.2, 1.0, -0.631315919)):
            (of_winner, of_loser), (_, found) = (
                jax.grad(guarded)(pairs.policy, strength),
                objectives.safeguard(pairs.policy, zero, strength),
            )
            np.testing.assert_allclose(found, [share], rtol=1e-9)
            np.testing.assert_allclose([of_winner[0, 0, 0, 0], of_loser[0, 0, 0, 0]], [0.420877279, slope], rtol=5e-9)
        # A second pair, whose winner and loser are swapped, has a share of its own.
        both = sides(np.concatenate([P_W, P_L]), np.concatenate([P_L, P_W]))
        _, found = objectives.safeguard(both, sides(*np.zeros((2, 2, 2, 2, 1))), 0.9)
        np.testing.assert_allclose(found, [0.2, 0.163636364], rtol=5e-9)


def in_torch(name: str, p: list[Tensor], o: list[Tensor], t: list[Tensor], scores: Tensor) -> Tensor:
    """The mean loss over a batch, written once more."""
    m, r = ([((x - y) ** 2).mean((1, 2, 3)) for x, y in zip(both, t, strict=True)] for both in (p, o))
    g, kappa = [x - y for x, y in zip(m, r, strict=True)], BETA / 2
    z = kappa * (g[1] - g[0])
    if name == "ipo":
        return ((z / kappa - 1 / (2 * kappa)) ** 2).mean()
    if name == "kto":
        q = (-torch.cat(g)).mean().clamp(min=0).detach()
        good, bad = (torch.sigmoid(sign * kappa * (-x - q)) for sign, x in zip((1, -1), g, strict=True))
        return (1 - torch.cat([good, bad])).mean()
    if name == "dspo":
        weight = (0.5 * torch.sigmoid(-z * 0.5 / BETA))[:, None, None, None]
        return ((p[0] - t[0] - weight * (p[0] - o[0])) ** 2).mean()
    if name == "mapo":
        phi = [0.5 * x / (torch.exp(0.5 * x) - 1) for x in m]
        return (m[0] - 0.1 * torch.nn.functional.logsigmoid(1000 * (phi[0] - phi[1]))).mean()
    if name == "smpo":
        scores = (scores - scores.min()) / (scores.max() - scores.min())
        z = (2 * 10 * torch.softmax(scores, 0)[0] - 10) * z
    if name == "hinge":
        return torch.clamp(1 - z, min=0).mean()
    if name == "smoothed":
        return -(0.9 * torch.nn.functional.logsigmoid(z) + 0.1 * torch.nn.functional.logsigmoid(-z)).mean()
    return -torch.nn.functional.logsigmoid(z).mean()


def in_jax(name: str, pairs: Compared, scores: WinnerLoser) -> Array:
    z = objectives.margin(pairs, BETA)
    found = {
        "mapo": lambda: objectives.mapo(pairs.error, 0.1),
        "dpo": lambda: objectives.dpo(z),
        "smoothed": lambda: objectives.dpo(z, 0.1),
        "hinge": lambda: objectives.hinge(z),
        "ipo": lambda: objectives.ipo(pairs.gain, BETA),
        "kto": lambda: objectives.kto(pairs.gain, BETA),
        "dspo": lambda: objectives.dspo(pairs, 0.5),
        "smpo": lambda: objectives.smpo(z, objectives.scaled_scores(scores), 10.0),
    }[name]()
    assert found.shape == SHAPE[:1]  # of each pair
    return found.mean()


@pytest.mark.parametrize("name", [*PREFERENCE, "smoothed"])
def test_values_and_gradients_are_those_of_the_formula_in_pytorch(name: str) -> None:
    """Of predictions, in float64, for pairs whose margins have both signs."""
    rng = np.random.default_rng(4)
    target, noise = rng.standard_normal((2, *SHAPE)), rng.standard_normal((2, *SHAPE))
    policy = target + 0.3 * noise
    reference = policy + 0.05 * rng.standard_normal((2, *SHAPE))
    scores = rng.standard_normal((2, len(noise[0])))
    theirs = [torch.tensor(x, requires_grad=True) for x in policy]
    value = in_torch(name, theirs, [*torch.tensor(reference)], [*torch.tensor(target)], torch.tensor(scores))
    value.backward()
    with jax.enable_x64(True):

        def loss(policy: WinnerLoser) -> Array:
            return in_jax(name, Compared(policy, sides(*reference), sides(*target)), sides(*scores))

        ours, gradient = jax.value_and_grad(loss)(sides(*policy))
        np.testing.assert_allclose(ours, value.detach(), rtol=1e-10)
        for found, expected in zip(gradient, theirs, strict=True):
            # DSPO's loser teaches through σ alone.
            np.testing.assert_allclose(found, expected.grad, rtol=1e-8, atol=1e-14)


def test_scores_of_a_batch_become_0_to_1() -> None:
    scaled = objectives.scaled_scores(sides(np.array([3.0, 1.0]), np.array([2.0, 5.0])))
    np.testing.assert_allclose(np.stack(scaled), [[0.5, 0.0], [0.25, 1.0]])


def test_the_safeguard_changes_no_value_and_no_gradient_of_the_winner() -> None:
    """Only the loser's gradient, by λ, which is a constant: as where it multiplies the loser's error."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(7)
        target, first = rng.standard_normal((2, *SHAPE)), 0.3 * rng.standard_normal((2, *SHAPE))
        policy, reference = target + first + 0.3 * first[::-1], target + 0.9 * first

        def loss(policy: WinnerLoser, strength: float | None) -> tuple[Array, Array]:
            safe, share = policy, jnp.ones(len(target[0]))
            if strength is not None:
                safe, share = objectives.safeguard(policy, sides(*target), strength)
            pairs = Compared(safe, sides(*reference), sides(*target))
            return objectives.dpo(objectives.margin(pairs, BETA)).mean(), share

        (plain, _), before = jax.value_and_grad(loss, has_aux=True)(sides(*policy), None)
        (safe, share), after = jax.value_and_grad(loss, has_aux=True)(sides(*policy), 0.6)
        assert 0.0 < float(share.min()) < 1.0 and plain == safe
        np.testing.assert_allclose(after.winner, before.winner, rtol=1e-12)
        np.testing.assert_allclose(after.loser, np.reshape(share, (-1, 1, 1, 1)) * before.loser, rtol=1e-12)


def test_auto_beta_is_a_constant_and_follows_the_lead() -> None:
    with jax.enable_x64(True):
        assert found_beta(of_errors()) / 2 == pytest.approx(51.9860385, rel=5e-9)
        slope = jax.grad(lambda policy: objectives.mean_lead(of_errors()._replace(policy=policy).gain))
        assert not np.any(np.stack(slope(of_errors().policy)))
        assert objectives.running_lead(0.1, 0.2) == pytest.approx(0.101)
        assert objectives.beta_for(0.0, 0.2, BETA) == BETA


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_statistics_loss_is_that_of_really_sampled_latents(prediction: str) -> None:
    policy, base, x_t = arrays(3, seed=1)
    scheduler = DDPMScheduler(**SD, prediction_type=prediction, clip_sample=False)
    schedule = NoiseSchedule.from_config(dict(scheduler.config))
    ts = np.array([0, 1, 250, 500, 777, 999])
    expected = []
    for i, t in enumerate(ts):
        means = []
        for prediction_array in (policy, base):
            to_torch = lambda a, i=i: torch.tensor(np.float64(a[i].transpose(2, 0, 1)[None]))  # noqa: E731
            step = scheduler.step(
                to_torch(prediction_array), int(t), to_torch(x_t), generator=torch.Generator().manual_seed(3)
            )
            means.append(step.prev_sample.mean(dim=(2, 3))[0].numpy())
        expected.append(np.sum((means[0] - means[1]) ** 2))
    found = statistics_loss(policy, base, schedule.mean_shift(jnp.asarray(ts)))
    # diffusers computes β_t = 1 − ᾱ_t/ᾱ_{t−1} in float32 from numbers near 1: twice EPS/4, squared.
    np.testing.assert_allclose(found, expected, rtol=EPS / SD["beta_start"])
