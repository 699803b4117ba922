"""How many forward passes of the UNet the pictures of a prompt take."""

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from hgdpo_jax.config import ALWAYS, has_finalists
from hgdpo_jax.diffusion.process import Process


def race_steps(pairs: ConfigDict) -> int:
    """The steps after which a pool is scored for the first time, one at least."""
    return max(1, round(pairs.race * pairs.steps))


def pool_forwards(config: ConfigDict, schedule: Process) -> int:
    """Forward passes for one prompt's pool: one for each step of each picture, and another for the empty caption where
    there is guidance.

    Raises:
        UserError: see :class:`hgdpo_jax.diffusion.process.Process`.
    """
    pairs = config.pairs
    full, finalists = _of_steps(pairs, schedule, pairs.steps), 2 * pairs.finalists
    if not has_finalists(config):
        return pairs.pool_size * int(full.sum())
    if pairs.draft_steps:
        return pairs.pool_size * int(_of_steps(pairs, schedule, pairs.draft_steps).sum()) + finalists * int(full.sum())
    first = race_steps(pairs)
    return pairs.pool_size * int(full[:first].sum()) + finalists * int(full[first:].sum())


def pool_drawings(config: ConfigDict) -> float:
    """How many pictures, drawn in all steps, take as many steps as a prompt's pool."""
    pairs = config.pairs
    if not has_finalists(config):
        return pairs.pool_size
    first, finalists = race_steps(pairs) / pairs.steps, 2 * pairs.finalists
    if pairs.draft_steps:
        return pairs.pool_size * pairs.draft_steps / pairs.steps + finalists
    return pairs.pool_size * first + finalists * (1 - first)


def saving(config: ConfigDict, schedule: Process) -> list[str]:
    """A line that says what a pool takes beside one that is drawn whole; none where it is."""
    whole = config.copy_and_resolve_references()
    whole.pairs.update(race=0.0, draft_steps=0, guidance_interval=ALWAYS)
    least, most = (pool_forwards(each, schedule) for each in (config, whole))
    pooled = "pool" in (config.pairs.winner, config.pairs.loser)
    return [f"a pool takes {least:,} forward passes instead of {most:,}"] if pooled and least < most else []


def _of_steps(pairs: ConfigDict, schedule: Process, steps: int) -> Int[np.ndarray, "n"]:
    """The passes of each step of a picture."""
    t = schedule.make_steps(pairs.sampler, steps).t
    low, high = map(schedule.level, pairs.guidance_interval)
    return 1 + ((pairs.guidance > 1) & (low <= t) & (t <= high))
