"""The flow process against diffusers' scheduler and pipeline, and its step against the definition of the path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from hgdpo_jax.diffusion.flow import FlowSchedule
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.sdrecon import sdrecon
from hgdpo_jax.diffusion.trajectory import from_noise, sample
from hgdpo_jax.run.errors import UserError
from tests.rounding import EPS

SHIFTED = {"use_dynamic_shifting": True}


def predict(x: np.ndarray, sigma: float) -> np.ndarray:
    """Any smooth function of x and σ stands for a network."""
    return (np.sin(x * 1.3) * 0.7 + 0.2 * x + sigma / 4).astype(np.float32)


@pytest.mark.parametrize("config, latent", [
    (SHIFTED, (32, 32)), (SHIFTED, (64, 64)), (SHIFTED, (64, 68)), ({"shift": 3.0}, (8, 8)), ({}, (8, 8)),
])  # fmt: skip
def test_every_step_is_diffusers(config: dict, latent: tuple[int, int]) -> None:
    theirs, steps = FlowMatchEulerDiscreteScheduler(**config), 20
    mu = compute_empirical_mu(latent[0] * latent[1], steps)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    table = FlowSchedule.from_config(dict(theirs.config)).of_latents(*latent).make_steps("euler", steps)
    np.testing.assert_allclose(table.t, theirs.sigmas[:-1].numpy(), rtol=4 * EPS)
    x = torch.tensor(np.random.default_rng(0).standard_normal((1, 4, 3, 3)).astype(np.float32))
    for i, t in enumerate(theirs.timesteps):
        before = x.numpy()
        velocity = predict(before, float(table.t[i]))
        x = theirs.step(torch.tensor(velocity), t, x).prev_sample
        x_0 = before - table.sigma[i] * velocity
        ours = table.x[i] * before + table.x_0[i] * x_0
        np.testing.assert_allclose(ours, x.numpy(), atol=8 * EPS * np.abs(before).max())


def test_a_trajectory_ends_where_the_steps_lead() -> None:
    schedule = FlowSchedule.from_config(SHIFTED).of_latents(4, 6)
    trajectory, keys = from_noise(schedule, "euler", 5), jax.random.split(jax.random.key(0), 2)
    seen = []

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), sigma)
        return jnp.sin(x) * sigma[:, None, None, None]

    found, x_0 = sample(denoise, schedule, trajectory, jnp.zeros((2, 4, 6, 3)), keys)
    noise = jax.vmap(lambda pair: jax.random.normal(pair[0], (4, 6, 3)))(jax.vmap(jax.random.split)(keys))
    x, grid = np.asarray(noise, np.float64), [*schedule.make_steps("euler", 5).t.astype(np.float64), 0.0]
    for now, after in zip(grid, grid[1:], strict=False):
        x = x + (after - now) * np.sin(x) * now
    np.testing.assert_allclose(found, x, atol=64 * EPS)
    np.testing.assert_allclose(x_0, found, atol=64 * EPS)  # the last step ends at what it predicts
    jax.effects_barrier()
    np.testing.assert_allclose(sorted({float(value[0]) for value in seen}, reverse=True), grid[:-1], rtol=EPS)


def test_a_prediction_of_the_target_gives_the_image_back() -> None:
    schedule, key = FlowSchedule(), jax.random.key(1)
    x_0, noise = jax.random.normal(key, (2, 3, 4, 4, 2))
    t = jnp.asarray([0.0, 0.3, 1.0])
    x = schedule.add_noise(x_0, noise, t)
    np.testing.assert_array_equal(x[0], x_0[0])
    np.testing.assert_array_equal(x[2], noise[2])
    sigma = t[:, None, None, None]
    found = schedule.x_0_at(schedule.target(x_0, noise, t), x, 1 - sigma, sigma)
    np.testing.assert_allclose(found, x_0, atol=8 * EPS)


def test_the_mean_shift_is_that_of_a_step() -> None:
    """Monte Carlo over images and noise: the difference of two velocities moves the mean of the next latent by c."""
    schedule, rng = FlowSchedule(num_train_timesteps=50), np.random.default_rng(0)
    x_0, noise = rng.standard_normal((2, 4000, 3, 3, 2))
    v_ref = noise - x_0
    v = v_ref + 0.3 + 0.1 * rng.standard_normal(v_ref.shape)
    for sigma in (0.01, 0.5, 1.0):
        after = max(sigma - 1 / 50, 0.0)
        x = (1 - sigma) * x_0 + sigma * noise
        moved = (x + (after - sigma) * v) - (x + (after - sigma) * v_ref)
        c = float(schedule.mean_shift(jnp.full(1, sigma, jnp.float32))[0, 0, 0, 0])
        np.testing.assert_allclose(moved.mean((0, 1, 2)), c * (v_ref - v).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("spread, shift", [("uniform", 1.0), ("logit_normal", 1.0), ("logit_normal", 3.0)])
def test_training_draws_noise_levels_as_told(spread: str, shift: float) -> None:
    schedule = FlowSchedule(spread=spread, train_shift=shift)
    drawn = np.sort(np.asarray(schedule.draw_times(jax.random.split(jax.random.key(0), 20_000))))
    assert drawn[0] >= 0 and drawn[-1] <= 1
    unshifted = drawn / (shift - (shift - 1) * drawn)
    if spread == "logit_normal":  # its logit is normal
        logit = np.log(unshifted / (1 - unshifted))
        np.testing.assert_allclose([logit.mean(), logit.std()], [0, 1], atol=0.03)
    else:
        np.testing.assert_allclose(unshifted, (np.arange(len(drawn)) + 0.5) / len(drawn), atol=0.02)
    shares = np.bincount(np.asarray(schedule.bin_of(jnp.asarray(drawn), 10)), minlength=10)
    np.testing.assert_array_equal(shares, np.histogram(drawn, np.linspace(0, 1, 11, dtype=np.float32))[0])


def test_strengths_have_as_much_signal_as_stable_diffusions() -> None:
    flow = FlowSchedule.from_config(SHIFTED).of_latents(32, 32)
    sd = NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    alpha = sd.alphas_cumprod[np.arange(100, 1000, 100)].astype(np.float64)
    ours = np.array([flow.level(100 * k) for k in range(1, 10)])
    np.testing.assert_allclose(((1 - ours) / ours) ** 2, alpha / (1 - alpha), rtol=1e-9)
    assert (flow.level(0), flow.level(1000)) == (0.0, 1.0)
    begins = [sdrecon(flow, "euler", 50, k) for k in range(1, 11)]
    near = [abs(trajectory.table.t[0] - flow.level(100 * k)) for k, trajectory in enumerate(begins, 1)]
    assert max(near) < 0.05 and begins[-1].signal == 0 and begins[-1].noise == 1


@pytest.mark.parametrize("config, message", [
    ({"time_shift_type": "linear"}, "time_shift_type='linear'"),
    ({"stochastic_sampling": True}, "stochastic_sampling=True"),
    ({"shift": 0}, "shift=0"),
    ({"num_train_timesteps": 1.5}, "num_train_timesteps=1.5"),
])  # fmt: skip
def test_settings_that_are_not_computed_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowSchedule.from_config(config)


def test_other_solvers_and_too_many_steps_are_refused() -> None:
    with pytest.raises(UserError, match="expects euler"):
        FlowSchedule().make_steps("ddim", 4)
    with pytest.raises(UserError, match="expects 1 to 1000"):
        FlowSchedule().make_steps("euler", 1001)
