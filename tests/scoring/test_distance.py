"""Distances against formulas evaluated another way."""

import numpy as np
import pytest
import scipy.linalg

from hgdpo_jax.scoring.bootstrap import resamples
from hgdpo_jax.scoring.distance import frechet_distances, gaussian_distance, kernel_distance

RNG = np.random.default_rng(0)
# 60 people, five of one set and three of the other for each.
A, B = RNG.standard_normal((60, 5, 6)) @ RNG.standard_normal((6, 6)), RNG.standard_normal((60, 3, 6)) + 0.5
ONCE = np.ones((1, 60))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The formula with a matrix root, of rows."""
    p, q = np.cov(a.T), np.cov(b.T)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(p + q - 2 * scipy.linalg.sqrtm(p @ q).real)


def test_frechet_equals_the_formula_with_a_matrix_root() -> None:
    found = frechet_distances({"a": A, "b": B}, B, ONCE)
    assert found["a"].value == pytest.approx(frechet(A.reshape(-1, 6), B.reshape(-1, 6)), rel=1e-9)
    assert found["b"].value == pytest.approx(0.0, abs=1e-6)  # a root of what is 0 but for rounding


def test_frechet_of_fewer_embeddings_than_dimensions_is_the_formulas() -> None:
    a, b = RNG.standard_normal((2, 4, 1, 20))
    found = frechet_distances({"a": a}, b, np.ones((1, 4)))["a"].value
    assert found == pytest.approx(frechet(a[:, 0], b[:, 0]), rel=1e-6)  # sqrtm of singular matrices


def test_frechet_of_two_shifted_sets_is_the_squared_shift() -> None:
    assert frechet_distances({"a": A}, A + np.array([3, 0, 0, 4, 0, 0]), ONCE)["a"].value == pytest.approx(25.0)


def test_frechet_of_a_resample_is_that_of_its_people() -> None:
    weights = resamples(60)[:4]
    found = frechet_distances({"a": A}, B, weights)["a"].values
    for value, counts in zip(found, weights.astype(int), strict=True):
        a, b = (np.repeat(x, counts, axis=0).reshape(-1, 6) for x in (A, B))
        assert value == pytest.approx(frechet(a, b), rel=1e-9)


def kernel(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> float:
    """The sums written out, over pairs of different people."""

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        total = pairs = 0.0
        for i, n in enumerate(counts):
            for j, m in enumerate(counts):
                if i != j:
                    total += n * m * np.mean([(u @ v / 6 + 1) ** 3 for u in x[i] for v in y[j]])
                    pairs += n * m
        return total / pairs

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def test_kernel_distance_equals_the_sums_written_out() -> None:
    weights = np.array([[1.0, 1, 1, 1, 1], [2, 0, 1, 2, 0]])
    found = kernel_distance(A[:5], B[:5], weights).values
    assert found == pytest.approx([kernel(A[:5], B[:5], counts) for counts in weights])


def test_kernel_distance_is_unbiased() -> None:
    sets = RNG.standard_normal((200, 2, 10, 2, 3))
    values = [kernel_distance(x, y, np.ones((1, 10))).value for x, y in sets]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """As google-research/cmmd writes it, of rows: σ 10, times 1000, each pair with itself."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
        return np.exp(-squares / (2 * 10**2)).mean()

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_gaussian_distance_is_cmmd_of_each_resample() -> None:
    weights = np.array([[1.0, 1, 1, 1, 1], [2, 0, 1, 2, 0]])
    found = gaussian_distance(A[:5], B[:5], weights)
    for value, counts in zip(found.values, weights.astype(int), strict=True):
        assert value == pytest.approx(cmmd(*(np.repeat(x[:5], counts, axis=0).reshape(-1, 6) for x in (A, B))))
    assert found.interval[0] >= 0.0
