"""Distances against formulas evaluated another way."""

import numpy as np
import pytest
import scipy.linalg

from hgdpo_jax.scoring.distance import frechet_distance, kernel_distance

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((300, 6)) @ RNG.standard_normal((6, 6)), RNG.standard_normal((200, 6)) + 0.5


def test_frechet_equals_the_formula_with_a_matrix_root() -> None:
    a, b = np.cov(A.T), np.cov(B.T)
    expected = np.square(A.mean(0) - B.mean(0)).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(A, B) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(A, A) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_two_shifted_sets_is_the_squared_shift() -> None:
    assert frechet_distance(A, A + np.array([3, 0, 0, 4, 0, 0])) == pytest.approx(25.0)


def test_kernel_distance_equals_the_sums_written_out() -> None:
    a, b = A[:7], B[:5]

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 6 + 1) ** 3

    same_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    same_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    cross = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(same_a + same_b - 2 * cross)


def test_kernel_distance_is_unbiased() -> None:
    sets = RNG.standard_normal((400, 2, 20, 3))
    values = [kernel_distance(x, y) for x, y in sets]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
