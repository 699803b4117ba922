"""Pictures that several scorers choose among together."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata

from hgdpo_jax.curriculum.candidates import Candidates, mean_ranks
from hgdpo_jax.curriculum.winners import Group, Pool, Reconstruction
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.scoring.preference import Judgement
from hgdpo_jax.scoring.scorers import Scorer

PHOTOGRAPHS = [Photograph(name, Path(), name) for name in "abc"]
IDS = np.zeros((3, 77), np.int32)
# A scorer that prefers large numbers, and one that prefers numbers near 2 and is ten times as loud.
SCORERS = [
    Scorer("large", lambda images, ids: Judgement(images.mean((1, 2, 3)))),
    Scorer("near_2", lambda images, ids: Judgement(-10 * abs(images.mean((1, 2, 3)) - 2))),
]


def candidates(values: list[list[float]]) -> Candidates:
    """Latents that are each one number, and its scores."""
    found = np.asarray(values, np.float32)
    scores = np.stack([found, -10 * abs(found - 2)], axis=-1)
    return Candidates(found[..., None, None, None], scores, np.arange(found.shape[1]))


def made(kind: type, settings: dict, winners: Candidates, earlier: list[float]) -> list:
    """The records of a kind of winner whose candidates are given, with a sampler that decodes latents to themselves."""
    fixed = object.__new__(type("Fixed", (kind,), {"candidates": lambda self, group: lambda: winners}))
    fixed.settings = SimpleNamespace(scorer="two", redraw="all", least_gap=0.0, bucket=0, **settings)
    fixed.scorers = SCORERS
    fixed.sampler = SimpleNamespace(
        measure_latents=lambda latents, ids, measure, _: np.asarray(
            measure(jnp.repeat(latents, 3, -1), jnp.asarray(ids))
        )
    )
    lost = [{"winner": np.full((1, 1, 1), value, np.float16), "winner_score": 9.0} for value in earlier]
    return fixed.begin(Group(PHOTOGRAPHS, IDS, (8, 8), earlier=lost))()


def test_ranks_are_shares_of_the_others_and_even_ones_share_them() -> None:
    scores = np.random.default_rng(0).integers(0, 4, (5, 6, 2)).astype(np.float32)
    expected = ((rankdata(scores, axis=1) - 1) / 5) @ [1.001 / 2.001, 1 / 2.001]
    first, second = mean_ranks(scores[:, :2], scores[:, 2:])
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, atol=1e-6)


def test_the_best_and_the_worst_of_a_pool_are_those_of_the_mean_rank() -> None:
    pool = candidates([[0, 1, 2, 3], [2, 5, 4, 0], [7, 1, 3, 2]])
    records = made(Pool, {"loser": "pool", "keep_if_winner_scores_higher": False}, pool, [])
    # 2 is the nearest to 2, and not the smallest. Of the last, 1 is the smallest, and 7 alone is further from 2.
    assert [record["winner"].item() for record in records] == [2, 2, 2]
    assert [record["loser"].item() for record in records] == [0, 0, 1]
    assert records[0]["winner_score"] == pytest.approx((2 / 3 + 1) / 2, rel=1e-3) and records[0]["loser_score"] == 0


def test_the_first_scorer_decides_where_all_are_even() -> None:
    records = made(Pool, {"loser": "pool", "keep_if_winner_scores_higher": False}, candidates([[3, 4, 2]] * 3), [])
    assert (records[0]["winner"].item(), records[0]["loser"].item()) == (4, 2)


def test_an_earlier_loser_is_ranked_among_the_candidates_and_so_is_k() -> None:
    winners = candidates([[1.5, 3.0], [0.0, 1.0], [2.0, 2.5]])
    settings = {"loser": "stage1", "keep_if_winner_scores_higher": True}
    records = made(Reconstruction, settings, winners, [1.0, 2.0, 2.0])
    # a: 1.5 is above 1 in both scorers' eyes. b: both candidates are below 2. c: 2 and 2 are even, which K keeps.
    assert [record["id"] for record in records] == ["a", "c"]
    assert [record["loser"].item() for record in records] == [1.0, 2.0]
    for record in records:
        assert record["winner_score"] >= record["loser_score"]


def test_a_score_that_is_not_finite_is_found_before_it_is_a_rank() -> None:
    pool = candidates([[0, 1], [2, float("nan")], [3, 4]])
    fixed = object.__new__(Pool)
    fixed.settings, fixed.store = SimpleNamespace(scorer="two"), None
    group = Group(PHOTOGRAPHS, IDS, (8, 8))
    with pytest.raises(UserError, match="prompt 'b' of b: its score is NaN or infinite; is the scorer two broken"):
        fixed._made("pool", group, range(2), lambda *_: (pool.latents, pool.scores, pool.numbers))()
    with pytest.raises(UserError, match="prompt 'b' of b: its score"):  # of an earlier winner, which is scored again
        settings = {"loser": "stage1", "keep_if_winner_scores_higher": False}
        made(Pool, settings, candidates([[0, 1], [2, 3], [3, 4]]), [0, float("nan"), 0])
