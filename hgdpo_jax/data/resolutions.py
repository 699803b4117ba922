"""Resolutions: which one a photograph has, and the few that suit a set of photographs.

Height stands before width everywhere. `data.resolutions=auto` leaves the choice to the first pairs of a run. What was
chosen stands in their building.json; the run's later stages, and all commands that go on with it, take it from there.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from hgdpo_jax.config import AUTO, is_auto
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written
from hgdpo_jax.run.folder import pair_stages, stage_command

STEP = 64  # pixels between the sides that are chosen from: SD1.5 takes no finer ones
MOST = 6  # resolutions that are chosen, each of which has to be compiled
_LOOKED_AT = 5000  # shapes, at least, that they are chosen by
_LEAST_GAIN = 0.01  # of what is kept of the photographs, by one more resolution
_ALIKE = math.log(1.05)  # shapes that differ by less are one

Size = tuple[int, int]  # height, width


def name_of(size: Size) -> str:
    """HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


def nearest(shapes: Sequence[Size], sizes: Sequence[Size]) -> Int[np.ndarray, "n"]:
    """For each photograph the number of the resolution whose height / width is nearest on a logarithmic scale; where
    others have the same to 5 %, the largest of them that does not enlarge it, or else the one that enlarges it least.

    Args:
        shapes: of n photographs, upright, in pixels.
        sizes: of the resolutions; of two that are equally near in shape the first counts.
    """
    pictures, targets = (np.array(found, np.float64).reshape(-1, 2) for found in (shapes, sizes))
    wanted, there = (np.array([math.log(h / w) for h, w in found], np.float64) for found in (shapes, sizes))
    distance = np.abs(wanted[:, None] - there)
    alike = np.abs(there[np.argmin(distance, axis=1)][:, None] - there) <= _ALIKE
    scale = np.min(pictures[:, None] / targets, axis=-1)  # below 1: it is enlarged
    worth = np.where(alike, np.where(scale >= 1.0, np.prod(targets, axis=1), scale - 1.0), -np.inf)
    return np.argmin(np.where(worth == np.max(worth, axis=1, keepdims=True), distance, np.inf), axis=1)


def choose(shapes: Sequence[Size], area: Size) -> list[Size]:
    """At most :data:`MOST` resolutions for photographs, that of the most photographs first.

    Sides are multiples of :data:`STEP` from half to twice that of a square of the area, and no resolution has more
    pixels than it. One after the other is taken that raises the most what the photographs keep, and at the end each is
    put where it does so beside the others. They keep the share of their view that is not cut off, times the share of
    their side (the root of their pixels, up to the area) that is drawn; nothing where they are enlarged, unless even
    the smallest square of these sides would enlarge them.

    Args:
        shapes: of the photographs, upright, in pixels; at least one.
        area: height and width, whose product counts.

    Raises:
        UserError: no resolution has so few pixels.
    """
    pixels = math.prod(area)
    side = math.sqrt(pixels)
    low = math.ceil(side / 2 / STEP) * STEP
    sides = range(low, int(2 * side) + 1, STEP)
    candidates = [(h, w) for h in sides for w in sides if h * w <= pixels]
    if not candidates:
        raise UserError(f"config key data.area={name_of(area)}: is too small for sides in steps of {STEP} pixels; "
                        "give data.resolutions instead of auto")  # fmt: skip
    candidates.sort(key=math.prod, reverse=True)  # of those that are as good the largest
    counted = Counter(_grown(shape, low) for shape in sorted(shapes)[:: max(1, len(shapes) // _LOOKED_AT)])
    seen, counts = list(counted), list(counted.values())
    pictures = np.array(seen, np.float64)

    def kept(sizes: Sequence[Size]) -> float:
        targets = np.array(sizes, np.float64)[nearest(seen, sizes)]
        low_scale, high_scale = np.sort(pictures / targets, axis=1).T
        drawn = np.sqrt(np.prod(targets, axis=1) / np.minimum(np.prod(pictures, axis=1), pixels))
        return float(np.average(np.where(low_scale >= 1.0, low_scale / high_scale * drawn, 0.0), weights=counts))

    def best_beside(others: Sequence[Size]) -> Size:
        return max(candidates, key=lambda size: kept([*others, size]))

    chosen = [best_beside([])]
    while len(chosen) < MOST:
        more = [*chosen, best_beside(chosen)]
        if kept(more) < kept(chosen) + _LEAST_GAIN:
            break
        chosen = more
    for i in range(len(chosen)):  # what was taken early may lie half-way between two that came later
        chosen[i] = best_beside([*chosen[:i], *chosen[i + 1 :]])
    numbers = Counter(nearest(shapes, chosen).tolist())
    return [chosen[number] for number in sorted(numbers, key=lambda number: (-numbers[number], number))]


def _grown(shape: Size, low: int) -> Size:
    """A shape whose sides are at least so long."""
    grown = max(1.0, low / min(shape))
    return math.ceil(shape[0] * grown), math.ceil(shape[1] * grown)


def with_resolutions(config: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """A config that has these resolutions."""
    own = config.copy_and_resolve_references()
    own.data.resolutions = tuple(names)
    return own


def found_in(workdir: Path, area: str) -> list[str] | None:
    """The resolutions that pairs of a run were begun with under `auto` and this `data.area`; None where none were.

    Raises:
        UserError: what notes it is damaged.
    """
    for path in sorted(workdir.glob("*/pairs/building.json")):
        with as_written(path, "remove the folder, and its shards are made again"):
            made_from = {**json.loads(path.read_text())}
            if made_from.get("data.area") == area:
                return [str(name) for name in made_from["data.resolutions"]]
    return None


def settled(config: ConfigDict, workdir: Path) -> ConfigDict:
    """A config with the resolutions that its run has, where it leaves them to the run.

    Raises:
        UserError: the run has none yet.
    """
    if not is_auto(config):
        return config
    area, stage = config.data.area, pair_stages(config)[0]
    found = processes.broadcast(lambda: found_in(workdir, area))
    if found is None:
        raise UserError(f"config key data.resolutions={AUTO}: no pairs of {workdir} were built with it and data.area="
                        f"{area}; build them with: {stage_command('pairs', stage, workdir)}")  # fmt: skip
    return with_resolutions(config, found)
