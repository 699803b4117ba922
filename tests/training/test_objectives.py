"""The losses against independent evaluations of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.training.objectives import WinnerLoser, diffusion_dpo, statistics_loss
from tests.rounding import EPS, assert_close

SHAPE = (6, 5, 4, 3)
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def arrays(count: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(count)]


def test_dpo_is_the_formula_in_float64() -> None:
    pred_w, pred_l, target_w, target_l, d_w, d_l = arrays(6)
    ref_w, ref_l = pred_w + 1e-3 * d_w, pred_l + 1e-3 * d_l
    beta = 5000.0
    found = diffusion_dpo(WinnerLoser(pred_w, pred_l), WinnerLoser(ref_w, ref_l), WinnerLoser(target_w, target_l), beta)
    m = lambda p, t: np.mean((np.float64(t) - np.float64(p)) ** 2, axis=(1, 2, 3))  # noqa: E731
    z = -beta / 2 * ((m(pred_w, target_w) - m(pred_l, target_l)) - (m(ref_w, target_w) - m(ref_l, target_l)))
    # The mean of 60 products, of a few roundings each; κ = β/2 multiplies the largest.
    largest = float(jnp.abs((pred_w - ref_w) * (pred_w + ref_w - 2 * target_w)).max())
    assert_close(found.margin, z, 10 * EPS, size=beta / 2 * largest)
    assert_close(found.loss, np.logaddexp(0, -z), 10 * EPS, size=beta / 2 * largest)  # its slope is at most 1
    assert np.abs(z).min() > 1e-3  # so that every sign is certain
    np.testing.assert_array_equal(found.accuracy, (z > 0).astype(np.float32))
    assert_close(found.error_loser_reference, m(ref_l, target_l), 10 * EPS)


def test_policy_equal_to_reference_gives_ln_2_and_margin_0() -> None:
    pred, target = WinnerLoser(*arrays(2)), WinnerLoser(*arrays(2, seed=1))
    found = diffusion_dpo(pred, pred, target, 5000.0)
    # x − x and 0 · x round nothing, on any processor; exp and log are approximated.
    assert np.array_equal(found.margin, np.zeros(6)) and np.array_equal(found.accuracy, np.full(6, 0.5))
    assert_close(found.loss, np.full(6, np.log(2)), 4 * EPS)


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
