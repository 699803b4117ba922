"""Who wins of some candidates: best and worst, or two of them by their ranks."""

from fractions import Fraction

import numpy as np
import pytest

from hgdpo_jax.config import rank_gaps
from hgdpo_jax.curriculum.candidates import Candidates, apart, best, finalists, worst


@pytest.mark.parametrize(("count", "buckets"), [(20, 5), (4, 3), (7, 4), (2, 1)])
def test_buckets_part_all_gaps_from_the_largest_to_the_smallest(count: int, buckets: int) -> None:
    found = [rank_gaps(count, k, buckets) for k in range(1, buckets + 1)]
    assert [gap for gaps in found[::-1] for gap in gaps] == [*range(1, count)]  # each once
    for k, gaps in enumerate(found, start=1):
        low, high = (Fraction((count - 1) * (buckets - k + end), buckets) for end in (0, 1))
        assert all(low < gap <= high for gap in gaps)
    assert rank_gaps(20, 1, 5) == [16, 17, 18, 19] and rank_gaps(20, 5, 5) == [1, 2, 3]
    assert rank_gaps(4, 3, 5) == []


def test_winner_and_loser_are_any_two_whose_ranks_are_so_far_apart() -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(7) for _ in range(200)]).astype(np.float32)
    latents = np.broadcast_to(scores[..., None, None, None], (*scores.shape, 1, 1, 1)).astype(np.float16)
    candidates = Candidates(latents, scores, np.arange(10, 17))
    gaps = rank_gaps(7, 2, 3)  # 3 and 4: four and three pairs
    won, lost = apart(candidates, gaps, rng.integers(0, 2**32, 200, dtype=np.uint32))
    differences = won.scores - lost.scores
    assert set(differences.tolist()) == {3.0, 4.0} == {float(gap) for gap in gaps}
    assert len({(w, x) for w, x in zip(won.scores, lost.scores, strict=True)}) == 7  # all of them
    for chosen in (won, lost):
        assert np.array_equal(chosen.latents[:, 0, 0, 0], chosen.scores)
        assert np.array_equal(scores[np.arange(200), chosen.numbers - 10], chosen.scores)
    farthest = apart(candidates, rank_gaps(7, 1, 6), np.arange(200))
    for chosen, end in zip(farthest, (best(candidates), worst(candidates)), strict=True):
        assert np.array_equal(chosen.numbers, end.numbers)


def test_those_that_go_on_are_the_highest_and_the_lowest_and_their_numbers_are_kept() -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(9) for _ in range(50)]).astype(np.float32)
    places = finalists(scores, 2)
    assert (np.diff(places) > 0).all()
    assert all(set(row[at]) == {0, 1, 7, 8} for row, at in zip(scores, places, strict=True))
    assert finalists(np.zeros((1, 5), np.float32), 2).tolist() == [[0, 1, 3, 4]]  # of equals each once
    kept = np.take_along_axis(scores, places, 1)
    chosen = Candidates(np.zeros((*kept.shape, 1, 1, 1), np.float16), kept, places)
    assert np.array_equal(best(chosen).numbers, scores.argmax(1))
    assert np.array_equal(worst(chosen).numbers, scores.argmin(1))
