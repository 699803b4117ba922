"""Distances between two sets of image embeddings, float64.

The sets show the same `n` people: `k` embeddings of each in one set, `v` in the other, of dimension `p`.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from hgdpo_jax.run.progress import Progress
from hgdpo_jax.scoring.bootstrap import Measure, Weights

_THREADS = min(8, os.cpu_count() or 1)
_SIGMA = 10.0  # of CMMD's kernel


def frechet_distances(
    sets: Mapping[str, Float[np.ndarray, "n k p"]], b: Float[np.ndarray, "n v p"], weights: Weights
) -> dict[str, Measure]:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017) of each set a, for each resample of the people.

    It needs n · k ≥ 2 and n · v ≥ 2. With fewer embeddings than dimensions it is far too large, but models with equal
    numbers of embeddings can be compared.
    """
    centre = np.asarray(b, np.float64).mean((0, 1))  # a small mean loses less when it is squared
    b, sets = b - centre, {name: a - centre for name, a in sets.items()}

    def distances(people: Float[np.ndarray, "n"]) -> list[float]:
        mean, rows = _spread(b, people)
        found = []
        for a in sets.values():
            its_mean, its_rows = _spread(a, people)
            # The roots of the eigenvalues of Σ_a Σ_b are the singular values of this product.
            cross = np.linalg.svd(its_rows @ rows.T, compute_uv=False).sum()
            traces = np.square(its_rows).sum() + np.square(rows).sum()
            found.append(np.square(its_mean - mean).sum() + traces - 2.0 * cross)
        return found

    # A few at a time: all would not fit in memory. Threads within products of this size wait for each other.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(_THREADS) as threads:
        rows = threads.map(distances, weights)
        bar = Progress(rows, "Fréchet distance", len(weights), unit="resample", leave=False)
        values = np.array(list(bar))
    return dict(zip(sets, map(Measure, values.T), strict=True))


def _spread(x: Float[np.ndarray, "n k p"], people: Float[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [p] of a resample, and rows R [m p], m ≤ p, with RᵀR its unbiased covariance: far fewer than p where there
    are few embeddings."""
    drawn = people > 0
    rows, times = x[drawn].reshape(-1, x.shape[2]), np.repeat(people[drawn], x.shape[1])
    mean = times @ rows / times.sum()
    rows = (rows - mean) * np.sqrt(times / (times.sum() - 1.0))[:, None]
    return mean, np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows


def kernel_distance(a: Float[np.ndarray, "n k p"], b: Float[np.ndarray, "n v p"], weights: Weights) -> Measure:
    """Unbiased squared MMD with the kernel (x·y/p + 1)³ (KID, Bińkowski et al. 2018) for each resample of the people.

    Means of the kernel are over pairs of different people: two embeddings of one person are not independent. The
    distance may be slightly negative.
    """
    width = a.shape[2]
    return _mmd(a, b, weights, lambda products: (products / width + 1.0) ** 3, itself=False)


def gaussian_distance(a: Float[np.ndarray, "n k p"], b: Float[np.ndarray, "n v p"], weights: Weights) -> Measure:
    """1000 times the squared MMD with the kernel exp(−‖x − y‖² / 2σ²), σ = 10, of embeddings brought to length 1 (CMMD,
    Jayasumana et al. 2024) for each resample of the people. As published it counts an embedding's pair with itself, and
    so is never negative."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    found = _mmd(a, b, weights, lambda products: np.exp((products - 1.0) / _SIGMA**2), itself=True)
    return Measure(1000.0 * found.values, least=0.0)


def _mmd(
    a: Float[np.ndarray, "n k p"],
    b: Float[np.ndarray, "n v p"],
    weights: Weights,
    kernel: Callable[[np.ndarray], np.ndarray],
    itself: bool,
) -> Measure:
    """Squared MMD with a kernel of inner products; pairs of a person with `itself` count, or do not."""

    def between(x: Float[np.ndarray, "n i p"], y: Float[np.ndarray, "n j p"]) -> Float[np.ndarray, "r"]:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        columns = y.reshape(-1, y.shape[2]).T
        rows = [kernel(one @ columns).mean(0).reshape(y.shape[:2]).mean(1) for one in x]
        people, pairs = np.stack(rows), weights.sum(1) ** 2
        if not itself:
            np.fill_diagonal(people, 0.0)  # nor do two copies of one person in a resample
            pairs = pairs - np.square(weights).sum(1)
        return ((weights @ people) * weights).sum(1) / pairs

    return Measure(between(a, a) + between(b, b) - 2.0 * between(a, b))
