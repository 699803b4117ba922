"""DDPM, DDIM and DPM-Solver++(2M) as one program: each is a table of coefficients for the same update

    x_{i+1} = a_i · x_i + b_i · x̂_0(x_i, t_i) + c_i · x̂_0(x_{i−1}, t_{i−1}) + d_i · noise_i + e_i · (clip(x̂_0) − x̂_0).

Tables are made in float64 and equal diffusers' schedulers step by step; each of them reads scheduler_config.json in a
way of its own. Legend: `b` examples, `h w c` latent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.run.errors import UserError

Latent = Float[Array, "b h w c"]
Denoise = Callable[[Latent, Int[Array, "b"]], Latent]
State = tuple[Latent, Latent]  # x_t, and the last x̂_0


# What scheduler_config.json may say to the class that diffusers has for a sampler; first what that class takes where it
# says nothing. Other keys the class does not read, or only beside what is refused here.
_SPACINGS = ("leading", "trailing", "linspace")
_ANCESTORS: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": _SPACINGS,
    "clip_sample": (True, False),
    "thresholding": (False,),
}
_READ: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddpm": _ANCESTORS | {"variance_type": ("fixed_small",)},
    "ddim": _ANCESTORS | {"set_alpha_to_one": (True, False)},
    "dpmpp_2m": {
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "algorithm_type": ("dpmsolver++", "deis"),  # it takes the second for the first
        "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (-float("inf"),),
        "solver_order": (2,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and these for midpoint
        "thresholding": (False,),
        "use_beta_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_flow_sigmas": (False,),
        "use_karras_sigmas": (False, True),
        "use_lu_lambdas": (False,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # of no account
    },
}
SAMPLERS = tuple(_READ)
_KARRAS_RHO = 7.0
_ALMOST_NO_SIGNAL = 2.0**-24  # ᾱ where there is none, so that the solver's σ/√ᾱ is finite


class Steps(NamedTuple):
    """Timesteps int32 [n], from noise to image; what x is made of at each, signal · x_0 + sigma · ε, and the
    coefficients of the update, float32 [n] each."""

    t: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    x: np.ndarray
    x_0: np.ndarray
    previous_x_0: np.ndarray
    noise: np.ndarray
    clipping: np.ndarray


class Trajectory(NamedTuple):
    """Where a sampler starts, x = signal · latent + noise · ε, and the first `count` rows of a table that it then runs;
    where its table says so, x̂_0 is clipped to [-clip, clip].

    All of it is an argument of the program that draws. The table has a row for every training timestep, whatever it
    holds, so that one program does for all samplers, steps and strengths.
    """

    signal: np.float32
    noise: np.float32
    count: np.int32
    clip: np.float32
    steps: Steps


def from_noise(schedule: NoiseSchedule, sampler: str, steps: int) -> Trajectory:
    """A drawing from nothing: all steps of a sampler.

    Raises:
        UserError: see :func:`timesteps`.
    """
    return _trajectory(schedule, make_steps(schedule, sampler, steps), 0.0, 1.0)


def sdrecon(schedule: NoiseSchedule, sampler: str, steps: int, strength: int) -> Trajectory:
    """SDRecon: a photograph's latent noised to t1…t10 = timesteps 100, 200, …, 1000 of 1000, and denoised from there.

    It begins at the sampler's timestep that is nearest to that, the lower one of two. t1 is almost the photograph, t10
    almost a fresh sample.
    """
    rising = make_steps(schedule, sampler, steps).t[::-1]
    nearest = int(np.argmin(np.abs(rising - strength * schedule.num_train_timesteps / 10)))
    table = make_steps(schedule, sampler, steps, nearest + 1)
    return _trajectory(schedule, table, table.signal[0], table.sigma[0])


def _trajectory(schedule: NoiseSchedule, table: Steps, signal: float, noise: float) -> Trajectory:
    rest = schedule.num_train_timesteps - len(table.t)
    padded = Steps(*(np.pad(column, (0, rest)) for column in table))
    clip = np.float32(schedule.config.get("clip_sample_range", 1.0))
    return Trajectory(np.float32(signal), np.float32(noise), np.int32(len(table.t)), clip, padded)


def _settings(schedule: NoiseSchedule, sampler: str) -> dict[str, Any]:
    """What the scheduler's config says to a sampler.

    Raises:
        UserError: an unknown sampler, or something that it does not compute.
    """
    if sampler not in _READ:
        raise UserError(f"sampler {sampler!r}: expects {', '.join(SAMPLERS)}")
    found = {}
    for key, values in _READ[sampler].items():
        found[key] = schedule.config.get(key, values[0])
        if found[key] not in values:
            raise UserError(f"scheduler_config.json {key}={found[key]!r}: {sampler} expects "
                            f"{' or '.join(map(repr, values))}")  # fmt: skip
    return found


def timesteps(schedule: NoiseSchedule, sampler: str, steps: int) -> Int[np.ndarray, "n"]:
    """The timesteps, decreasing, as diffusers lays them out for this sampler and spacing.

    Raises:
        UserError: an unknown sampler, something that it does not compute, or more steps than training timesteps.
    """
    total, spacing = schedule.num_train_timesteps, _settings(schedule, sampler)["timestep_spacing"]
    if not 1 <= steps <= total:
        raise UserError(f"sampler steps={steps}: expects 1 to {total}")
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1
    # The multistep solver counts the end of the last step too.
    points, offset = (steps + 1 if sampler == "dpmpp_2m" else steps), schedule.config.get("steps_offset", 0)
    if spacing == "linspace":
        grid = np.linspace(0, total - 1, points).round()
    else:
        grid = np.arange(points) * (total // points) + offset
    if grid[-1] >= total:
        raise UserError(f"sampler steps={steps}: with steps_offset={offset} they begin beyond the {total} timesteps; "
                        "expects fewer")  # fmt: skip
    return grid[::-1][:steps].astype(np.int64)


def make_steps(schedule: NoiseSchedule, sampler: str, steps: int, last: int | None = None) -> Steps:
    """The table of a sampler; `last` keeps only that many steps at the end, for starting from a noised image.

    Raises:
        UserError: see :func:`timesteps`.
    """
    t, settings = timesteps(schedule, sampler, steps), _settings(schedule, sampler)
    alphas = schedule.alphas_cumprod.astype(np.float64)
    if sampler == "dpmpp_2m":
        alphas = np.maximum(alphas, _ALMOST_NO_SIGNAL)
        t, now = _karras(schedule, alphas, steps) if settings["use_karras_sigmas"] else (t, alphas[t])
        t, now = t[-(last or steps) :], now[-(last or steps) :]
        columns = _dpmpp_2m(now)
    else:
        t = t[-(last or steps) :]
        now = alphas[t]
        after = np.append(t[1:], -1) if sampler == "ddpm" else t - schedule.num_train_timesteps // steps
        final = alphas[0] if sampler == "ddim" and not settings["set_alpha_to_one"] else 1.0
        after = np.where(after >= 0, alphas[np.maximum(after, 0)], final)
        columns = _ddpm(now, after, t) if sampler == "ddpm" else _ddim(now, after)
        columns = (*columns[:-1], settings["clip_sample"] * columns[-1])
    table = (np.sqrt(now), np.sqrt(1 - now), *columns)
    return Steps(t.astype(np.int32), *(column.astype(np.float32) for column in table))


def _karras(schedule: NoiseSchedule, alphas: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The timesteps nearest to Karras et al.'s (2022, eq. 5) σ between the smallest and the largest, and ᾱ at the σ."""
    sigmas = np.sqrt((1 - alphas) / alphas)
    low, high = (schedule.config.get(key) or sigmas[i] for key, i in (("sigma_min", 0), ("sigma_max", -1)))
    ends = np.array([high, low]) ** (1 / _KARRAS_RHO)
    wanted = np.linspace(*ends, steps) ** _KARRAS_RHO
    t = np.interp(np.log(wanted), np.log(sigmas), np.arange(len(sigmas)))
    return t.round().astype(np.int64), 1 / (1 + wanted**2)


def _ddpm(now: np.ndarray, after: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ancestral sampling (Ho et al. 2020, eq. 7): posterior mean, and its variance except at t = 0."""
    ratio = now / after
    x_0 = np.sqrt(after) * (1 - ratio) / (1 - now)
    x = np.sqrt(ratio) * (1 - after) / (1 - now)
    variance = np.maximum((1 - after) / (1 - now) * (1 - ratio), 1e-20)
    return x, x_0, np.zeros_like(x), np.where(t > 0, np.sqrt(variance), 0.0), x_0


def _ddim(now: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, ...]:
    """Deterministic DDIM (Song et al. 2021, eq. 12, η = 0); its ε is that of the x̂_0 before it is clipped."""
    x = np.sqrt((1 - after) / (1 - now))
    return x, np.sqrt(after) - x * np.sqrt(now), np.zeros_like(x), np.zeros_like(x), np.sqrt(after)


def _dpmpp_2m(now: np.ndarray) -> tuple[np.ndarray, ...]:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); first and last step are of first order."""
    alpha, sigma = np.append(np.sqrt(now), 1.0), np.append(np.sqrt(1 - now), 0.0)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))  # the last is infinite: exp(-h) = 0
    x = sigma[1:] / sigma[:-1]
    first = alpha[1:] * (1 - np.exp(-h))
    correction = np.zeros_like(x)
    if len(now) > 2:
        correction[1:-1] = 0.5 * first[1:-1] * h[1:-1] / h[:-2]
    return x, first + correction, -correction, np.zeros_like(x), np.zeros_like(x)


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    trajectory: Trajectory,
    latents: Latent,
    keys: PRNGKeyArray,
    anchor: Denoise | None = None,
) -> Latent:
    """Runs a trajectory in one loop.

    Args:
        denoise: (x_t, t [b]) → the network's prediction, guidance included.
        schedule: that the trajectory was made for.
        trajectory: see :func:`from_noise` and :func:`sdrecon`.
        latents: of the photographs, scaled; of no account where the trajectory starts from noise.
        keys: one PRNG key per example [b], so that an example does not depend on its batch.
        anchor: ε_base for latent adaptive normalisation: a second trajectory from the same latents and noise, to whose
            channel means and standard deviations each step's latents are brought.

    Returns:
        Scaled latents of the images, float32.
    """
    pair = jax.vmap(jax.random.split)(keys)

    def normal(keys: PRNGKeyArray) -> Latent:
        return jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)

    def step(index: Int[Array, ""], states: tuple[State, ...]) -> tuple[State, ...]:
        now = jax.tree.map(lambda column: jnp.asarray(column)[index], trajectory.steps)
        noise = now.noise * normal(jax.vmap(lambda key: jax.random.fold_in(key, index))(pair[:, 1]))

        def advance(denoise: Denoise, state: State) -> State:
            x, previous = state
            t = jnp.full(x.shape[0], now.t)
            x_0 = schedule.x_0_at(denoise(x, t), x, now.signal, now.sigma)
            clipped = now.clipping * (jnp.clip(x_0, -trajectory.clip, trajectory.clip) - x_0)
            return now.x * x + now.x_0 * x_0 + now.previous_x_0 * previous + noise + clipped, x_0

        states = [advance(one, state) for one, state in zip(denoisers, states, strict=True)]
        if anchor is not None:
            (x, x_0), (x_anchor, _) = states
            states[0] = (match_statistics(x, x_anchor), x_0)
        return tuple(states)

    denoisers = [denoise] if anchor is None else [denoise, anchor]
    start = trajectory.signal * latents + trajectory.noise * normal(pair[:, 0])
    begin = ((start, jnp.zeros_like(start)),) * len(denoisers)
    (x, _), *_ = jax.lax.fori_loop(0, trajectory.count, step, begin)
    return x


def match_statistics(x: Latent, like: Latent) -> Latent:
    """x with the mean and the standard deviation of `like` in each channel of each example."""
    mean, deviation = x.mean((1, 2), keepdims=True), x.std((1, 2), keepdims=True)
    return (x - mean) / deviation * like.std((1, 2), keepdims=True) + like.mean((1, 2), keepdims=True)
