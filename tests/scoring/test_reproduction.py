"""The statistic of a reproduction, on tables made by hand."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from hgdpo_jax.scoring.bootstrap import Measure
from hgdpo_jax.scoring.reproduction import (
    Column,
    Held,
    Order,
    Paper,
    columns,
    decided_pairs,
    must_hold,
    passes,
    read_paper,
    read_resamples,
    write_resamples,
)

ROWS = {"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"x": 3.0}, "d": {"x": 3.1}}
PAPER = Paper(ROWS, {"x": 1.0, "y": 1.0}, list("abcd"), [Order("b", "a", ["x"]), Order("d", "c", ["x"], True)])


def sure(**values: float) -> dict[str, dict[str, np.ndarray]]:
    """Two training seeds of three resamples that all agree."""
    return {row: {"x": np.full((2, 3), float(value))} for row, value in values.items()}


def test_pairs_are_decided_by_the_threshold() -> None:
    assert decided_pairs(ROWS, "x", 1.0) == [("b", "a"), ("c", "a"), ("d", "a"), ("c", "b"), ("d", "b")]
    assert decided_pairs(ROWS, "y", 1.0) == []


def test_rows_in_the_papers_order_and_in_the_other() -> None:
    same = columns(PAPER, sure(a=10, b=20, c=40, d=30))["x"]  # c and d may stand as they like
    assert (same.decided, same.share, same.interval, same.passes) == (5, 1.0, (1.0, 1.0), True)
    assert same.p == pytest.approx(2 / 24, abs=0.01)  # of 24 orders two agree
    assert same.tau == pytest.approx(kendalltau([1, 2, 3, 3.1], [10, 20, 40, 30]).statistic) == pytest.approx(2 / 3)
    other = columns(PAPER, sure(a=4, b=3, c=2, d=1))["x"]
    assert (other.share, other.p, other.tau, other.passes) == (0.0, 1.0, pytest.approx(-1.0), False)
    some = columns(PAPER, sure(a=1, b=1, c=0.5))["x"]  # d was not measured; a and b tie
    assert (some.decided, some.share) == (3, pytest.approx(0.5 / 3))


def test_the_interval_is_over_training_seeds_and_prompts() -> None:
    """One seed of three has b above c by far, as has one resample of the prompts of four."""
    ours = {"a": {"x": np.zeros((3, 5))}, "b": {"x": np.ones((3, 5))}, "c": {"x": np.full((3, 5), 2.0)}}
    ours["b"]["x"][0] = 3.5  # its mean is below c's, 1.83, unless the seed is drawn twice, in 7 of 27
    found = columns(PAPER, ours)["x"]
    assert found.share == 1.0 and found.interval == (pytest.approx(2 / 3), 1.0)
    (order,) = must_hold(Paper(ROWS, {}, [], [Order("c", "b", ["x"])]), ours)
    assert order.holds and order.share == pytest.approx(20 / 27, abs=0.03)
    ours["b"]["x"][:] = 1.0
    ours["b"]["x"][:, 4] = 9.0
    (order,) = must_hold(Paper(ROWS, {}, [], [Order("c", "b", ["x"])]), ours)
    assert order.holds and order.share == pytest.approx(3 / 4, abs=0.03)


def test_a_reproduction_passes_with_its_columns_and_its_orders() -> None:
    good, barely = Column(5, 0.8, (0.6, 1.0), 0.01, 0.7), Held("d", "c", "x", False, 0.2, True)
    held = must_hold(PAPER, sure(a=1, b=2, c=4, d=3))
    assert held == [Held("b", "a", "x", True, 1.0, False), barely._replace(share=0.0)]
    assert passes({"x": good}, held)
    assert not passes({"x": good._replace(share=0.79)}, held)
    assert not passes({"x": good._replace(interval=(0.5, 1.0))}, held)
    assert not passes({"x": good}, [*held, barely._replace(barely=False)])
    assert not passes({}, [])


def test_of_the_papers_table_2_so_many_pairs_are_decided() -> None:
    paper = read_paper()
    table = {row: paper.rows[row] for row in paper.statistic}
    found = {column: len(decided_pairs(table, column, least)) for column, least in paper.thresholds.items()}
    assert found == {"P": 57, "HPS": 54, "IR": 57, "AES": 50, "CLIP": 57, "FID": 51, "CI-Q": 47, "CI-S": 43,
                     "ATHEC": 62}  # fmt: skip
    itself = {row: {column: np.full((1, 2), value) for column, value in values.items()}
              for row, values in paper.rows.items()}  # fmt: skip
    statistic, held = columns(paper, itself), must_hold(paper, itself)
    assert {c.share for c in statistic.values()} == {1.0} and max(c.p for c in statistic.values()) == 1e-4
    assert all(order.holds for order in held) and len(held) == sum(len(order.columns) for order in paper.must_hold)
    assert passes(statistic, held)


def test_resamples_are_kept_for_several_training_seeds(tmp_path: Path) -> None:
    for seed in range(2):
        measures = {"easy": {"fid": Measure(np.arange(3.0) + seed)}}
        measures |= {"hard": {"fid": Measure(np.zeros(3))}} if seed else {}
        write_resamples(tmp_path / f"{seed}.npz", measures)
    found = read_resamples([tmp_path / "0.npz", tmp_path / "1.npz"])
    assert list(found) == ["easy"] and np.array_equal(found["easy"]["fid"], [[0, 1, 2], [1, 2, 3]])
