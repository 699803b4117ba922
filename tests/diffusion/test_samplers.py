"""Schedule and samplers against diffusers' schedulers, step by step on the same predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from hgdpo_jax.diffusion.guidance import guided
from hgdpo_jax.diffusion.samplers import from_noise, make_steps, sample, sdrecon
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from tests.rounding import EPS, assert_close

CLASSES = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def scheduler(sampler: str, prediction: str, spacing: str):
    extra = {} if sampler == "dpmpp_2m" else {"clip_sample": False}
    if sampler == "ddim":
        extra["set_alpha_to_one"] = False
    return CLASSES[sampler](**SD, prediction_type=prediction, timestep_spacing=spacing, **extra)


def predict(x: np.ndarray, t: int) -> np.ndarray:
    """Any smooth function of x and t stands for a network."""
    return (np.sin(x * 1.3) * 0.7 + 0.2 * x + t / 4000).astype(np.float32)


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", CLASSES)
def test_every_step_is_diffusers(sampler: str, prediction: str, spacing: str, steps: int, monkeypatch) -> None:
    theirs = scheduler(sampler, prediction, spacing)
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(dict(theirs.config))
    table = make_steps(schedule, sampler, steps)
    np.testing.assert_array_equal(table.t, theirs.timesteps.numpy())
    noise = np.random.default_rng(1).standard_normal((steps, 2, 4, 3, 3)).astype(np.float32)
    drawn = iter(noise)
    monkeypatch.setattr(f"{CLASSES['ddpm'].__module__}.randn_tensor", lambda *a, **k: torch.tensor(next(drawn)))
    x = noise[0] * 0.5
    x_t, previous = torch.tensor(x), np.zeros_like(x)
    for i, t in enumerate(theirs.timesteps):
        before = x_t.numpy()
        pred = predict(before, int(t))
        x_t = theirs.step(torch.tensor(pred), t, x_t).prev_sample
        x_0 = np.asarray(schedule.to_x_0(jnp.asarray(pred), jnp.asarray(before), jnp.full(2, int(t))))
        ours = table.x[i] * before + table.x_0[i] * x_0 + table.previous_x_0[i] * previous + table.noise[i] * noise[i]
        previous = x_0
        # A few roundings; x̂_0 divides them by √ᾱ, which is 0.068 at the first step.
        assert_close(ours, x_t.numpy(), 5 * EPS / 0.068)


def drawing(schedule: NoiseSchedule, denoise=lambda x, t: jnp.tanh(x)):
    """The program of trajectories, latents and keys."""
    return jax.jit(lambda trajectory, x, keys: sample(denoise, schedule, trajectory, x, keys))


def test_the_loop_runs_the_table() -> None:
    theirs = scheduler("dpmpp_2m", "epsilon", "linspace")
    theirs.set_timesteps(20)
    keys = jax.random.split(jax.random.key(0), 2)
    first = jax.vmap(jax.random.split)(keys)[:, 0]
    x_t = torch.tensor(np.stack([jax.random.normal(key, (4, 3, 3)) for key in first]))
    for t in theirs.timesteps:
        x_t = theirs.step(torch.tensor(predict(x_t.numpy(), int(t))), t, x_t).prev_sample
    denoise = lambda x, t: jnp.sin(x * 1.3) * 0.7 + 0.2 * x + t[:, None, None, None] / 4000  # noqa: E731
    schedule = NoiseSchedule.from_config(dict(theirs.config))
    found = drawing(schedule, denoise)(from_noise(schedule, "dpmpp_2m", 20), np.zeros((2, 4, 3, 3)), keys)
    assert_close(found, x_t.numpy(), 20 * 5 * EPS)  # of twenty steps


def test_one_program_draws_with_every_sampler_from_everywhere() -> None:
    schedule = NoiseSchedule.from_config(SD)
    draw = drawing(schedule)
    x, keys = np.ones((2, 3, 3, 2), np.float32), jax.random.split(jax.random.key(0), 2)
    found = [draw(from_noise(schedule, sampler, steps), x, keys) for sampler in CLASSES for steps in (3, 8, 400)]
    found += [draw(sdrecon(schedule, "ddpm", 8, strength), x, keys) for strength in (1, 10)]
    assert draw._cache_size() == 1
    assert all(np.isfinite(a).all() for a in found)
    assert len({np.asarray(a).tobytes() for a in found}) == len(found)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_forward_process_is_diffusers(prediction: str) -> None:
    theirs = scheduler("ddpm", prediction, "leading")
    schedule = NoiseSchedule.from_config(dict(theirs.config))
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 4, 3, 3)).astype(np.float32)
    t = np.array([0, 500, 999])
    x_t = theirs.add_noise(torch.tensor(x), torch.tensor(noise), torch.tensor(t)).numpy()
    found = schedule.add_noise(x, noise, t)
    assert_close(found, x_t, 5 * EPS)
    target = theirs.get_velocity(torch.tensor(x), torch.tensor(noise), torch.tensor(t)).numpy()
    expected = noise if prediction == "epsilon" else target
    assert_close(schedule.target(x, noise, t), expected, 5 * EPS)
    assert_close(schedule.to_epsilon(expected, found, t), noise, 10 * EPS)
    signal = schedule.alphas_cumprod[t].min() ** 0.5  # divides, where noise is predicted
    assert_close(schedule.to_x_0(expected, found, t), x, 10 * EPS / signal)


@pytest.mark.parametrize("sampler", CLASSES)
def test_an_example_does_not_depend_on_its_batch(sampler: str) -> None:
    schedule = NoiseSchedule.from_config(SD)
    x = jax.random.normal(jax.random.key(1), (4, 3, 3, 2))
    keys = jax.random.split(jax.random.key(0), 4)
    draw, trajectory = drawing(schedule), sdrecon(schedule, sampler, 8, 7)
    among_others = draw(trajectory, jnp.concatenate([x[2:], 3 * x[:2]]), jnp.concatenate([keys[2:], keys[:2]]))
    np.testing.assert_array_equal(draw(trajectory, x, keys)[2:], among_others[:2])


def test_sdrecon_keeps_less_of_the_photograph_the_stronger_it_is() -> None:
    schedule = NoiseSchedule.from_config(SD)
    x = jax.random.normal(jax.random.key(1), (16, 4, 4, 2))
    keys = jax.random.split(jax.random.key(0), 16)
    # The exact denoiser of standard normal data: E[ε | x_t] = √(1−ᾱ_t) · x_t.
    denoise = lambda x_t, t: schedule.signal_and_noise(t)[1] * x_t  # noqa: E731
    draw = drawing(schedule, denoise)
    distances = [float(jnp.abs(draw(sdrecon(schedule, "dpmpp_2m", 20, k), x, keys) - x).mean()) for k in (1, 4, 7, 10)]
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[-1]


def test_guidance_extrapolates_from_unconditional_to_conditional() -> None:
    both = jnp.arange(4.0).reshape(4, 1, 1, 1)
    found = guided(lambda x, t: both, 3.0)(jnp.zeros((2, 1, 1, 1)), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(found.ravel(), [0 + 3 * 2, 1 + 3 * 2])
