"""Intervals: of a mean they are the textbook's, and they cover what they should."""

import numpy as np
import pytest

from hgdpo_jax.scoring.bootstrap import Measure, mean, resamples


def test_the_first_resample_is_the_people_themselves_and_no_other_is_one_person() -> None:
    for people in (2, 3, 40):
        weights = resamples(people)
        assert (weights[0] == 1).all() and (weights.sum(1) == people).all()
        assert weights[1:].max() < people and len(weights) > 100
    assert np.array_equal(resamples(40), resamples(40))


def test_the_interval_of_a_mean_is_two_standard_errors_over_people() -> None:
    values = np.random.default_rng(0).standard_normal((50, 1)) + np.zeros((1, 8))  # eight alike are no more than one
    found = mean(values, resamples(50))
    error = values[:, 0].std() / np.sqrt(50)
    assert found.value == pytest.approx(values.mean())
    # 400 resamples give a quantile to about a tenth of the standard error.
    assert np.subtract(found.interval, found.value) == pytest.approx([-1.96 * error, 1.96 * error], abs=0.25 * error)


def test_intervals_cover_the_truth() -> None:
    rng, weights, covered = np.random.default_rng(1), resamples(30), 0
    for _ in range(400):
        low, high = mean(rng.standard_normal((30, 2)), weights).interval
        covered += low < 0 < high
    assert 0.89 < covered / 400 < 0.98  # 95 %, a little less for so few people; three standard errors are 0.033


def test_differences_are_of_the_same_resamples() -> None:
    values = np.random.default_rng(2).standard_normal((20, 3))
    weights = resamples(20)
    shifted = mean(values + 1.0, weights) - mean(values, weights)
    assert shifted.value == pytest.approx(1.0) and shifted.interval == pytest.approx([1.0, 1.0])


def test_a_bias_of_the_resamples_is_taken_off() -> None:
    values = np.concatenate([[1.0], 5.0 + np.linspace(-1, 1, 101)])
    assert Measure(values).interval == pytest.approx([0.05, 1.95])


@pytest.mark.parametrize("people", [2, 3, 7, 40])
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("right", [0, 1, -1, None])  # of all, the first of these people; all; or every third
def test_intervals_of_shares_are_shares_and_those_of_their_differences_too(
    people: int, images: int, right: int | None
) -> None:
    values = np.zeros((people, images))
    values[slice(None, None, 3) if right is None else slice(right if right >= 0 else people)] = 1.0
    share, none = mean(values, resamples(people), 0, 1), mean(0 * values, resamples(people), 0, 1)
    for found, least in ((share, 0), (none, 0), (share - none, -1), (none - share, -1)):
        low, high = found.interval
        assert least <= low <= found.value <= high <= 1


def test_a_share_near_its_end_is_cut_there() -> None:
    """Nine of ten: the resamples' mean is below 0.9 by chance, and what it is moved by would lead beyond 1."""
    values = np.concatenate([[0.9], np.linspace(0.4, 1.0, 400)])
    assert Measure(values).interval[1] > 1.0
    assert Measure(values, 0.0, 1.0).interval[1] == 1.0
    assert (Measure(values, 0.0, 1.0) - Measure(0 * values, 0.0, 1.0)).interval[1] == 1.0
