"""Schedule and samplers against diffusers' schedulers, step by step on the same predictions."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, schedulers

from hgdpo_jax.diffusion.guidance import guided, guided_within, side_by_side
from hgdpo_jax.diffusion.schedule import _BETAS, NoiseSchedule
from hgdpo_jax.diffusion.sdrecon import sdrecon
from hgdpo_jax.diffusion.trajectory import from_noise, sample
from hgdpo_jax.run.errors import UserError
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


def x_0_at(schedule: NoiseSchedule, *arguments: np.ndarray) -> np.ndarray:
    """The schedule's, of arrays of the host."""
    return np.asarray(schedule.x_0_at(*map(jnp.asarray, arguments)))


def assert_every_step_is(theirs, config: dict, sampler: str, steps: int, monkeypatch, tolerance: float) -> None:
    """Our table of a config against a scheduler of diffusers, each step from where theirs is."""
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(config)
    table, clip = schedule.make_steps(sampler, steps), from_noise(schedule, sampler, steps).clip
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
        x_0 = x_0_at(schedule, pred, before, table.signal[i], table.sigma[i])
        ours = table.x[i] * before + table.x_0[i] * x_0 + table.previous_x_0[i] * previous + table.noise[i] * noise[i]
        ours = ours + table.clipping[i] * (np.clip(x_0, -clip, clip) - x_0)
        previous = x_0
        assert_close(ours, x_t.numpy(), tolerance)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("prediction", "steps"), [("epsilon", 50), ("v_prediction", 7)])
@pytest.mark.parametrize("sampler", CLASSES)
def test_every_step_is_diffusers(sampler: str, prediction: str, spacing: str, steps: int, monkeypatch) -> None:
    theirs = scheduler(sampler, prediction, spacing)
    # A few roundings; x̂_0 divides them by √ᾱ, which is 0.068 at the first step.
    assert_every_step_is(theirs, dict(theirs.config), sampler, steps, monkeypatch, 5 * EPS / 0.068)


# scheduler_config.json as people have it, each written for another class than the one that samples.
PNDM = SD | {
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "num_train_timesteps": 1000,
}
CONFIGS = {
    "SD 1.5's": PNDM | {"clip_sample": False, "trained_betas": None},
    "without clip_sample": PNDM,
    "with another range": PNDM | {"clip_sample": True, "clip_sample_range": 0.3},
    "SDXL's": PNDM
    | {"_class_name": "EulerDiscreteScheduler", "clip_sample": False, "interpolation_type": "linear"}
    | {"sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False},
    "SD 2.1's": PNDM | {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"},
    "Karras": PNDM | {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "use_karras_sigmas": True},
    "without signal at last": PNDM
    | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sampler", CLASSES)
def test_a_config_is_read_as_its_class_reads_it(sampler: str, config: str, monkeypatch) -> None:
    theirs = CLASSES[sampler].from_config(CONFIGS[config])
    # A step from where the signal is 2⁻¹² loses as much in the solver's σ / √ᾱ, float32 there.
    tolerance = 5 * EPS * (2**12 if config == "without signal at last" else 1 / 0.068)
    assert_every_step_is(theirs, CONFIGS[config], sampler, 13, monkeypatch, tolerance)


@pytest.mark.parametrize(
    ("sampler", "key", "value"),
    [
        ("dpmpp_2m", "use_lu_lambdas", True),
        ("dpmpp_2m", "use_exponential_sigmas", True),
        ("dpmpp_2m", "use_beta_sigmas", True),
        ("dpmpp_2m", "final_sigmas_type", "sigma_min"),
        ("dpmpp_2m", "algorithm_type", "sde-dpmsolver++"),
        ("dpmpp_2m", "solver_order", 3),
        ("dpmpp_2m", "solver_type", "heun"),
        ("dpmpp_2m", "lambda_min_clipped", -5.1),
        ("dpmpp_2m", "variance_type", "learned_range"),
        ("ddpm", "variance_type", "fixed_large"),
        ("ddpm", "timestep_spacing", "karras"),
        *[(sampler, "thresholding", True) for sampler in CLASSES],
    ],
)
def test_what_is_not_computed_is_refused(sampler: str, key: str, value: object) -> None:
    schedule = NoiseSchedule.from_config(PNDM | {key: value})
    with pytest.raises(UserError, match=re.escape(f"scheduler_config.json {key}={value!r}: {sampler} expects")):
        schedule.make_steps(sampler, 20)


@pytest.mark.parametrize(
    "wrong",
    [{"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1]}, {"prediction_type": "sample"},
     {"rescale_betas_zero_snr": True}, {"sigma_data": 0.5}, {"shift": 3.0}, {"use_flow_sigmas": True},
     {"timestep_type": "continuous"}, {"prediction_type": "flow_prediction"}],
)  # fmt: skip
def test_another_schedule_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"model M: scheduler config {next(iter(wrong))}="):
        NoiseSchedule.from_config(PNDM | wrong, "model M: ")


@pytest.mark.parametrize(
    "wrong", [{"beta_start": "0.1"}, {"beta_end": 2.0}, {"num_train_timesteps": 0}, {"num_train_timesteps": None}]
)
def test_numbers_that_are_none_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="expects a count, and numbers that rise between 0 and 1"):
        NoiseSchedule.from_config(PNDM | wrong)


def test_every_class_of_diffusers_is_computed_with_its_own_defaults_or_refused_by_name() -> None:
    names = {name for name in dir(schedulers) if name.endswith("Scheduler")}
    computed = {f"{name}Scheduler" for name in _BETAS}
    for name in computed:
        if "beta_start" in inspect.signature(getattr(schedulers, name).__init__).parameters:  # else torchsde is missing
            expected = getattr(schedulers, name)().alphas_cumprod
            assert_close(NoiseSchedule.from_config({"_class_name": name}).alphas_cumprod, expected, 1000 * EPS)
    refused = names - computed
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"} <= refused
    for name in refused:
        with pytest.raises(UserError, match=f"^model M: {name}: not supported"):
            NoiseSchedule.from_config(PNDM | {"_class_name": name}, "model M: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps_offset", "1"), ("steps_offset", -1), ("steps_offset", None), ("steps_offset", True),
     ("steps_offset", 10**30), ("sigma_min", "x"), ("sigma_max", float("inf")), ("sigma_min", -1.0),
     ("num_train_timesteps", 10**30), ("clip_sample_range", None), ("clip_sample_range", "x"),
     ("clip_sample_range", 0.0), ("beta_end", 0.5), ("num_train_timesteps", 50_000)],
)  # fmt: skip
def test_a_number_that_no_scheduler_has_is_named(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key}={re.escape(repr(value))}"):
        schedule = NoiseSchedule.from_config(PNDM | {"use_karras_sigmas": True, key: value})
        schedule.make_steps("dpmpp_2m", 4)


def test_more_steps_than_there_are_timesteps_are_refused() -> None:
    schedule = NoiseSchedule.from_config(PNDM)
    for steps, reason in ((1000, "with steps_offset=1 they begin beyond the 1000"), (1001, "expects 1 to 1000")):
        with pytest.raises(UserError, match=reason):
            schedule.make_steps("ddpm", steps)


def drawing(schedule: NoiseSchedule, denoise=lambda x, t: jnp.tanh(x)):
    """The program of trajectories, latents and keys."""
    return jax.jit(lambda trajectory, x, keys: sample(denoise, schedule, trajectory, x, keys)[0])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_the_loop_runs_the_table(sampler: str, monkeypatch) -> None:
    theirs, steps = scheduler(sampler, "epsilon", "linspace"), 20
    theirs.set_timesteps(steps)
    keys = jax.random.split(jax.random.key(0), 2)
    first, later = jax.vmap(jax.random.split, out_axes=1)(keys)
    normal = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (4, 3, 3))))
    noise = [normal(jax.vmap(jax.random.fold_in, (0, None))(later, i)) for i in range(steps)]
    drawn = iter(np.asarray(noise))
    monkeypatch.setattr(f"{CLASSES['ddpm'].__module__}.randn_tensor", lambda *a, **k: torch.tensor(next(drawn)))
    x_t = torch.tensor(np.asarray(normal(first)))
    for t in theirs.timesteps:
        x_t = theirs.step(torch.tensor(predict(x_t.numpy(), int(t))), t, x_t).prev_sample
    denoise = lambda x, t: jnp.sin(x * 1.3) * 0.7 + 0.2 * x + t[:, None, None, None] / 4000  # noqa: E731
    schedule = NoiseSchedule.from_config(dict(theirs.config))
    found = drawing(schedule, denoise)(from_noise(schedule, sampler, steps), jnp.zeros((2, 4, 3, 3)), keys)
    assert_close(found, x_t.numpy(), steps * 5 * EPS)


def test_one_program_draws_with_every_sampler_from_everywhere_and_an_example_does_not_depend_on_its_batch() -> None:
    schedule = NoiseSchedule.from_config(SD)
    draw = drawing(schedule)
    x, keys = jax.random.normal(jax.random.key(1), (4, 3, 3, 2)), jax.random.split(jax.random.key(0), 4)
    others = jnp.concatenate([x[2:], 3 * x[:2]]), jnp.concatenate([keys[2:], keys[:2]])
    trajectories = [from_noise(schedule, sampler, steps) for sampler in CLASSES for steps in (3, 8, 400)]
    trajectories += [sdrecon(schedule, sampler, 8, strength) for sampler in CLASSES for strength in (1, 7, 10)]
    found = [np.asarray(draw(trajectory, x, keys)) for trajectory in trajectories]
    for a, trajectory in zip(found, trajectories, strict=True):
        np.testing.assert_array_equal(a[2:], draw(trajectory, *others)[:2])
    assert draw._cache_size() == 1
    assert all(np.isfinite(a).all() for a in found)
    assert len({a.tobytes() for a in found}) == len(found)


@pytest.mark.parametrize("sampler", CLASSES)
def test_a_trajectory_goes_on_from_where_it_stood(sampler: str) -> None:
    """The noise of each step, and the x̂_0 of the step before, which the multistep solver uses again."""
    schedule, denoise = NoiseSchedule.from_config(SD), lambda x, t: jnp.tanh(x)
    run = jax.jit(lambda *given: sample(denoise, schedule, *given[:3], state=given[3]))
    x, keys = jnp.zeros((4, 3, 3, 2)), jax.random.split(jax.random.key(0), 4)
    whole = from_noise(schedule, sampler, 7)
    expected = run(whole, x, keys, (x, x))
    np.testing.assert_array_equal(expected[0], drawing(schedule, denoise)(whole, x, keys))
    state = run(whole._replace(length=np.int32(3)), x, keys, (x, x))
    rows = np.array([2, 0])  # of which the others are dropped
    state = [part[rows] for part in state]
    found = run(whole._replace(first=np.int32(3)), x[rows], keys[rows], (state[0], state[1]))
    np.testing.assert_array_equal(found[0], expected[0][rows])
    for lost in ((0 * state[0], state[1]), (state[0], 0 * state[1])):
        other, _ = run(whole._replace(first=np.int32(3)), x[rows], keys[rows], lost)
        assert (np.asarray(other) != found[0]).any() == (sampler == "dpmpp_2m" or lost[0] is not state[0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_forward_process_is_diffusers(prediction: str) -> None:
    theirs = scheduler("ddpm", prediction, "leading")
    schedule = NoiseSchedule.from_config(dict(theirs.config))
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 4, 3, 3)).astype(np.float32)
    t = np.array([0, 500, 999])
    x_t = theirs.add_noise(torch.tensor(x), torch.tensor(noise), torch.tensor(t)).numpy()
    (ours, ours_noise), ours_t = jnp.asarray([x, noise]), jnp.asarray(t)
    found = schedule.add_noise(ours, ours_noise, ours_t)
    assert_close(found, x_t, 5 * EPS)
    target = theirs.get_velocity(torch.tensor(x), torch.tensor(noise), torch.tensor(t)).numpy()
    expected = noise if prediction == "epsilon" else target
    assert_close(schedule.target(ours, ours_noise, ours_t), expected, 5 * EPS)
    signal = schedule.alphas_cumprod[t].min() ** 0.5  # divides, where noise is predicted
    assert_close(x_0_at(schedule, expected, found, *schedule.signal_and_noise(ours_t)), x, 10 * EPS / signal)


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "begins"),
    [
        ("dpmpp_2m", "linspace", 50, [100, 400, 500, 599, 699, 999]),  # SD1.5's
        ("dpmpp_2m", "leading", 50, [96, 400, 495, 609, 704, 951]),  # SDXL's; 19 apart
        ("ddpm", "linspace", 16, [67, 400, 533, 599, 733, 999]),  # the embedded base's; 66.6 apart
    ],
)
def test_sdrecon_begins_at_the_nearest_timestep(sampler: str, spacing: str, steps: int, begins: list[int]) -> None:
    schedule = NoiseSchedule.from_config(dict(scheduler(sampler, "epsilon", spacing).config))
    found = [sdrecon(schedule, sampler, steps, strength).table.t[0] for strength in (1, 4, 5, 6, 7, 10)]
    assert found == begins


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
    np.testing.assert_array_equal(found.ravel(), [0 + 3 * 1, 2 + 3 * 1])
    np.testing.assert_array_equal(side_by_side(both[0::2], both[1::2]), both)


def test_guidance_acts_in_an_interval_whose_ends_are_in_it() -> None:
    interval = np.float32(200), np.float32(800)
    denoise = jax.jit(guided_within(interval, lambda x, _: x + 2, lambda x, _: x + 1))
    found = [float(denoise(jnp.zeros((2, 1, 1, 1)), jnp.full(2, t))[0, 0, 0, 0]) for t in (0, 199, 200, 800, 801)]
    assert found == [1, 1, 2, 2, 1]


def test_normalised_latents_have_the_statistics_of_the_anchors() -> None:
    schedule, keys = NoiseSchedule.from_config(SD), jax.random.split(jax.random.key(0), 2)
    x, trajectory = jnp.zeros((2, 3, 3, 2)), from_noise(schedule, "ddim", 4)
    policy, anchor = lambda x, t: jnp.sin(2 * x) + 0.3, lambda x, t: jnp.sin(x)
    common = (schedule, trajectory, x, keys)
    each = (anchor, *common), (policy, *common), (policy, *common, anchor)
    draw = jax.jit(lambda: [sample(*one)[0] for one in each])
    wanted, drifted, found = (np.asarray(latents) for latents in draw())
    for statistic in (np.mean, np.std):
        a, b, c = (statistic(latents, axis=(1, 2)) for latents in (wanted, drifted, found))
        assert_close(c, a, 4 * 5 * EPS / 0.068)
        assert np.abs(b - a).max() > 0.01
    assert np.abs(found - wanted).max() > 0.01
