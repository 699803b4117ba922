"""Whether our rows stand in the paper's order: a statistic for each column, and the orders that must hold.

The paper states no deviations; how large a difference of it must be to mean anything was estimated from its tables of
one seed and of ten. Only pairs of rows that differ by more are compared, and by their order alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hgdpo_jax.config import ASSETS
from hgdpo_jax.run.files import atomic_path
from hgdpo_jax.scoring.bootstrap import Measure

Table = Mapping[str, Mapping[str, float]]  # row → column → value
# The same of ours, for each of s training seeds: the value, and that of each resample of the prompts, which all rows
# and seeds share.
Samples = Mapping[str, Mapping[str, Float[np.ndarray, "s r"]]]
DRAWS, PERMUTATIONS = 2000, 9999
SHARE, LOWEST = 0.8, 0.5  # a column passes from this share of pairs, and with its interval above that
_SAME = 1e-9  # differences of the paper's decimals that are equal but for rounding


class Order(NamedTuple):
    """`more` must have more than `less` in some columns; `barely`: the paper itself decides it barely."""

    more: str
    less: str
    columns: Sequence[str]
    barely: bool = False


@dataclass(frozen=True)
class Paper:
    """What a paper's tables say.

    Attributes:
        rows: its numbers.
        thresholds: column → the least difference that counts.
        statistic: rows of the statistic; the others serve the orders alone.
        must_hold: orders without which nothing was reproduced.
    """

    rows: Table
    thresholds: Mapping[str, float]
    statistic: Sequence[str]
    must_hold: Sequence[Order]


class Column(NamedTuple):
    """How far a column stands in the paper's order.

    Attributes:
        decided: pairs of rows that the paper decides, of those that were measured.
        share: of them in the same order here; by chance one half.
        interval: 95 %, over training seeds and prompts.
        p: how often rows with permuted labels have such a share.
        tau: Kendall's τ-b of all rows that were measured, decided or not.
    """

    decided: int
    share: float
    interval: tuple[float, float]
    p: float
    tau: float

    @property
    def passes(self) -> bool:
        """Whether the share is high enough, and its interval above chance."""
        return self.share >= SHARE and self.interval[0] > LOWEST


class Held(NamedTuple):
    """An order in a column: whether it holds here, in which share of the draws, and whether it is barely decided."""

    more: str
    less: str
    column: str
    holds: bool
    share: float
    barely: bool


def read_paper(path: Path = ASSETS / "paper.json") -> Paper:
    """HG-DPO's Tables 2, 3, 7 and 9."""
    values = json.loads(path.read_text(encoding="utf-8"))
    orders = [Order(**order) for order in values["must_hold"]]
    return Paper(values["rows"], values["thresholds"], values["statistic"], orders)


def decided_pairs(rows: Table, column: str, threshold: float) -> list[tuple[str, str]]:
    """(row with more, row with less) of all pairs that differ by the threshold or more in a column."""
    there = [row for row in rows if column in rows[row]]
    pairs = [(a, b) if rows[a][column] > rows[b][column] else (b, a) for a, b in combinations(there, 2)]
    return [(a, b) for a, b in pairs if rows[a][column] - rows[b][column] >= threshold - _SAME]


def columns(paper: Paper, ours: Samples) -> dict[str, Column]:
    """Column → its statistic, of those in which some pair is decided and measured.

    Args:
        paper: whose order is the measure.
        ours: with the paper's names of rows and columns, such as there are.
    """
    found = {}
    for column, threshold in paper.thresholds.items():
        names = [row for row in paper.statistic if row in ours and column in ours[row] and column in paper.rows[row]]
        theirs = {row: {column: paper.rows[row][column]} for row in names}
        pairs = decided_pairs(theirs, column, threshold)
        if pairs:
            place = {row: number for number, row in enumerate(names)}
            numbers = np.array([[place[a], place[b]] for a, b in pairs])
            found[column] = _column(numbers, [theirs[row][column] for row in names], _draws(ours, names, column))
    return found


def must_hold(paper: Paper, ours: Samples) -> list[Held]:
    """Each order that must hold, column by column, of those whose rows were both measured."""
    found = []
    for order in paper.must_hold:
        for column in order.columns:
            if all(column in ours.get(row, {}) for row in (order.more, order.less)):
                values = _draws(ours, [order.more, order.less], column)
                more = values[:, 0] > values[:, 1]
                share = float(more[1:].mean())
                found.append(Held(order.more, order.less, column, bool(more[0]), share, order.barely))
    return found


def passes(columns: Mapping[str, Column], held: Sequence[Held]) -> bool:
    """Whether the paper's tables were reproduced: each column passes, and each order holds that it does not decide
    barely. False where nothing was measured."""
    orders = [order for order in held if not order.barely]
    return bool(columns) and all(c.passes for c in columns.values()) and all(order.holds for order in orders)


def _column(pairs: Int[np.ndarray, "n 2"], theirs: Sequence[float], draws: Float[np.ndarray, "r m"]) -> Column:
    from scipy.stats import kendalltau  # takes half a second, and every evaluation imports this module

    shares = _shares(draws, pairs)
    random = np.random.default_rng(0)
    permuted = random.permuted(np.tile(draws[0], (PERMUTATIONS, 1)), axis=1)
    extreme = np.count_nonzero(_shares(permuted, pairs) >= shares[0] - _SAME)
    low, high = np.quantile(shares[1:], (0.025, 0.975))
    return Column(
        decided=len(pairs),
        share=float(shares[0]),
        interval=(float(low), float(high)),
        p=float(1 + extreme) / (1 + PERMUTATIONS),
        tau=float(kendalltau(theirs, draws[0]).statistic),
    )


def _shares(values: Float[np.ndarray, "r m"], pairs: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, "r"]:
    """Share of the pairs whose first has more; a tie is half."""
    difference = values[:, pairs[:, 0]] - values[:, pairs[:, 1]]
    return (0.5 + 0.5 * np.sign(difference)).mean(1)


def _draws(ours: Samples, rows: Sequence[str], column: str) -> Float[np.ndarray, "_ m"]:
    """The rows' means over training seeds: as measured, then :data:`DRAWS` times over seeds drawn with replacement and
    one resample of the prompts, the same for all rows."""
    values = np.stack([np.asarray(ours[row][column], np.float64) for row in rows])  # [m s r]
    _, seeds, resamples = values.shape
    random = np.random.default_rng(0)
    chosen = random.integers(seeds, size=(DRAWS, seeds))
    prompts = random.integers(min(1, resamples - 1), resamples, size=DRAWS)
    drawn = values[:, chosen, prompts[:, None]].mean(2).T
    return np.concatenate([values[:, :, 0].mean(1)[None], drawn])


def write_resamples(path: Path, models: Mapping[str, Mapping[str, Measure]]) -> None:
    """Keeps measures with all their resamples: model → metric → measure."""
    arrays: Any = {json.dumps([name, key]): m.values for name, row in models.items() for key, m in row.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_resamples(paths: Sequence[Path]) -> dict[str, dict[str, Float[np.ndarray, "s r"]]]:
    """Model → metric → what :func:`write_resamples` kept of each training seed, of those that all files have.

    Raises:
        OSError, ValueError: a file cannot be read, or has another number of resamples.
    """
    files: list[dict[str, Any]] = [dict(np.load(path)) for path in paths]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in files[0]:
        if all(name in file for file in files):
            model, metric = json.loads(name)
            found.setdefault(model, {})[metric] = np.stack([file[name] for file in files])
    return found
