"""DDPM, DDIM and DPM-Solver++(2M) as one program: each is a table of coefficients for the same update

    x_{i+1} = a_i · x_i + b_i · x̂_0(x_i, t_i) + c_i · x̂_0(x_{i−1}, t_{i−1}) + d_i · noise_i + e_i · (clip(x̂_0) − x̂_0).

Tables are made in float64 and equal diffusers' schedulers step by step. Each of those reads scheduler_config.json in a
way of its own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hgdpo_jax.diffusion.process import Steps
from hgdpo_jax.run.errors import UserError

# What scheduler_config.json may say to diffusers' class of a solver. The first value is the class's default. The class
# reads no other keys, or only beside a value that is refused here.
_ANCESTORS: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
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
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # not used
    },
}
_KARRAS_RHO = 7.0
_ALMOST_NO_SIGNAL = 2.0**-24  # ᾱ where there is none, so that the solver's σ/√ᾱ is finite

Config = Mapping[str, Any]  # scheduler_config.json
Alphas = Float[np.ndarray, "n"]
Coefficients = tuple[Alphas, Alphas, Alphas | float, Alphas | float, Alphas | float]  # a, b, c, d, e of the update


def make_steps(table: Alphas, config: Config, solver: str, steps: int, last: int | None = None) -> Steps:
    """The table of a solver; see :class:`hgdpo_jax.diffusion.process.Process`.

    Args:
        table: ᾱ_t of all training timesteps.
        config: scheduler_config.json.
        solver: `ddpm`, `ddim` or `dpmpp_2m`.
        steps: of a whole trajectory.
        last: as many at its end are kept.

    Raises:
        UserError: an unknown solver, a setting that it does not compute, or more steps than training timesteps.
    """
    settings = _settings(config, solver, len(table))
    t, alphas = _timesteps(config, solver, steps, settings["timestep_spacing"], len(table)), table.astype(np.float64)
    if solver == "dpmpp_2m":
        alphas = np.maximum(alphas, _ALMOST_NO_SIGNAL)
    t, now = _karras(config, alphas, steps) if settings.get("use_karras_sigmas") else (t, alphas[t])
    t, now = t[-(last or steps) :], now[-(last or steps) :]
    if solver == "dpmpp_2m":
        *coefficients, clipping = _dpmpp_2m(now)
    elif solver == "ddpm":
        *coefficients, clipping = _ddpm(now, np.append(alphas[t[1:]], 1.0), t)
    else:
        after, final = t - len(table) // steps, 1.0 if settings["set_alpha_to_one"] else alphas[0]
        *coefficients, clipping = _ddim(now, np.where(after >= 0, alphas[np.maximum(after, 0)], final))
    columns = (np.sqrt(now), np.sqrt(1 - now), *coefficients, settings.get("clip_sample", False) * clipping)
    return Steps(t.astype(np.int32), *(np.broadcast_to(column, t.shape).astype(np.float32) for column in columns))


def _settings(config: Config, solver: str, total: int) -> dict[str, Any]:
    """What scheduler_config.json says to a solver."""
    if solver not in _READ:
        raise UserError(f"sampler {solver!r}: expects {', '.join(_READ)}")
    found = {key: config.get(key, values[0]) for key, values in _READ[solver].items()}
    for key, values in _READ[solver].items():
        if found[key] not in values:
            expected = " or ".join(map(repr, values))
            raise UserError(f"scheduler_config.json {key}={found[key]!r}: {solver} expects {expected}")
    offset = config.get("steps_offset", 0)
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset <= total:
        raise UserError(f"scheduler_config.json steps_offset={offset!r}: expects a whole number from 0")
    limit = config.get("clip_sample_range", 1.0)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        raise UserError(f"scheduler_config.json clip_sample_range={limit!r}: expects a number above 0")
    for key in ("sigma_min", "sigma_max") if found.get("use_karras_sigmas") else ():
        sigma = config.get(key)
        if sigma is not None and (not isinstance(sigma, int | float) or not 0 <= sigma < float("inf")):
            raise UserError(f"scheduler_config.json {key}={sigma!r}: expects a number above 0, or null")
    return found


def _timesteps(config: Config, solver: str, steps: int, spacing: str, total: int) -> Int[np.ndarray, "n"]:
    """The timesteps, decreasing, as diffusers lays them out."""
    offset = config.get("steps_offset", 0)
    if not 1 <= steps <= total:
        raise UserError(f"sampler steps={steps}: expects 1 to {total}")
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1
    points = steps + 1 if solver == "dpmpp_2m" else steps  # the multistep solver counts the end of the last step too
    if spacing == "linspace":
        grid = np.linspace(0, total - 1, points).round()
    else:
        grid = np.arange(points) * (total // points) + offset
    if grid[-1] >= total:
        raise UserError(f"sampler steps={steps}: with steps_offset={offset} they begin beyond the {total} timesteps; "
                        "expects fewer")  # fmt: skip
    return grid[::-1][:steps].astype(np.int64)


def _karras(config: Config, alphas: Alphas, steps: int) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """The timesteps nearest to Karras et al.'s (2022, eq. 5) σ between the smallest and the largest, and ᾱ at the σ."""
    sigmas = np.sqrt((1 - alphas) / alphas)
    low, high = (config.get(key) or sigmas[i] for key, i in (("sigma_min", 0), ("sigma_max", -1)))
    ends = np.array([high, low]) ** (1 / _KARRAS_RHO)
    wanted = np.linspace(ends[0], ends[1], steps) ** _KARRAS_RHO
    t = np.interp(np.log(wanted), np.log(sigmas), np.arange(len(sigmas)))
    return t.round().astype(np.int64), 1 / (1 + wanted**2)


def _ddpm(now: Alphas, after: Alphas, t: Int[np.ndarray, "n"]) -> Coefficients:
    """Ancestral sampling (Ho et al. 2020, eq. 7): posterior mean, and its variance except at t = 0."""
    ratio = now / after
    x_0 = np.sqrt(after) * (1 - ratio) / (1 - now)
    x = np.sqrt(ratio) * (1 - after) / (1 - now)
    variance = np.maximum((1 - after) / (1 - now) * (1 - ratio), 1e-20)
    return x, x_0, 0.0, np.where(t > 0, np.sqrt(variance), 0.0), x_0


def _ddim(now: Alphas, after: Alphas) -> Coefficients:
    """Deterministic DDIM (Song et al. 2021, eq. 12, η = 0); its ε is that of the x̂_0 before it is clipped."""
    x = np.sqrt((1 - after) / (1 - now))
    return x, np.sqrt(after) - x * np.sqrt(now), 0.0, 0.0, np.sqrt(after)


def _dpmpp_2m(now: Alphas) -> Coefficients:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); first and last step are of first order."""
    alpha, sigma = np.append(np.sqrt(now), 1.0), np.append(np.sqrt(1 - now), 0.0)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))  # the last is infinite: exp(-h) = 0
    first = alpha[1:] * (1 - np.exp(-h))
    correction = np.zeros_like(first)
    if len(now) > 2:
        correction[1:-1] = 0.5 * first[1:-1] * h[1:-1] / h[:-2]
    return sigma[1:] / sigma[:-1], first + correction, -correction, 0.0, 0.0
