"""Distances between two sets of image embeddings, float64.

The sets show the same `n` people: `k` embeddings of each in one set, `v` in the other, of dimension `p`.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from hgdpo_jax.run.progress import Progress
from hgdpo_jax.scoring.bootstrap import Measure, Weights

_THREADS = min(8, os.cpu_count() or 1)


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
        mean, covariance = _moments(b, people)
        root, found = _root(covariance), []
        for a in sets.values():
            its_mean, its_covariance = _moments(a, people)
            # The roots of the eigenvalues of Σ_a Σ_b, which are those of the symmetric Σ_b^½ Σ_a Σ_b^½.
            cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ its_covariance @ root), 0.0)).sum()
            traces = np.trace(its_covariance) + np.trace(covariance)
            found.append(np.square(its_mean - mean).sum() + traces - 2.0 * cross)
        return found

    # A few at a time: all would not fit in memory. Threads within a product of this size wait for each other.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(_THREADS) as threads:
        rows = threads.map(distances, weights)
        bar = Progress(rows, "Fréchet distance", len(weights), unit="resample", leave=False)
        values = np.array(list(bar))
    return dict(zip(sets, map(Measure, values.T), strict=True))


def _moments(x: Float[np.ndarray, "n k p"], people: Float[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [p] and unbiased covariance [p p] of a resample."""
    count = people.sum() * x.shape[1]
    mean = people @ x.sum(1) / count
    rows = x.reshape(-1, x.shape[2])
    squares = (rows * np.repeat(people, x.shape[1])[:, None]).T @ rows
    return mean, (squares / count - np.outer(mean, mean)) * (count / (count - 1))


def _root(covariance: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def kernel_distance(a: Float[np.ndarray, "n k p"], b: Float[np.ndarray, "n v p"], weights: Weights) -> Measure:
    """Unbiased squared MMD with the kernel (x·y/p + 1)³ (KID, Bińkowski et al. 2018) for each resample of the people.

    Means of the kernel are over pairs of different people: two embeddings of one person are not independent. The
    distance may be slightly negative.
    """

    def between(x: Float[np.ndarray, "n i p"], y: Float[np.ndarray, "n j p"]) -> Float[np.ndarray, "r"]:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        columns = y.reshape(-1, y.shape[2]).T
        rows = [((one @ columns / x.shape[2] + 1.0) ** 3).mean(0).reshape(y.shape[:2]).mean(1) for one in x]
        people = np.stack(rows)
        np.fill_diagonal(people, 0.0)  # nor are two copies of one person in a resample
        pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
        return ((weights @ people) * weights).sum(1) / pairs

    return Measure(between(a, a) + between(b, b) - 2.0 * between(a, b))
