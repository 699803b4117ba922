"""Distances between two sets of image embeddings, float64.

The sets are of the same people: `n` people, `k` embeddings of each in one set and `v` in the other.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from hgdpo_jax.scoring.bootstrap import Measure, Weights

Embeddings = Float[np.ndarray, "n k p"]


class Fitted(NamedTuple):
    """Set b of :func:`frechet_distance`, for each resample: what does not depend on the other set."""

    centre: np.ndarray  # [p]
    mean: Float[np.ndarray, "r p"]
    covariance: Float[np.ndarray, "r p p"]
    root: Float[np.ndarray, "r p p"]


def fit(b: Embeddings, weights: Weights) -> Fitted:
    """The normal distribution of a set, n · v ≥ 2."""
    centre = np.asarray(b, np.float64).mean((0, 1))  # a squared mean loses less in what follows where it is small
    mean, covariance = _moments(b - centre, weights)
    return Fitted(centre, mean, covariance, _root(covariance))


def frechet_distance(a: Embeddings, b: Fitted, weights: Weights) -> Measure:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017) for each resample of the people, n · k ≥ 2.

    With fewer embeddings than dimensions it is far too large, but of one number of them models can be compared.
    """
    mean, covariance = _moments(a - b.centre, weights)
    # The roots of the eigenvalues of Σ_a Σ_b, which are those of the symmetric Σ_b^½ Σ_a Σ_b^½.
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(b.root @ covariance @ b.root), 0.0)).sum(1)
    traces = np.trace(covariance, axis1=1, axis2=2) + np.trace(b.covariance, axis1=1, axis2=2)
    return Measure(np.square(mean - b.mean).sum(1) + traces - 2.0 * cross)


def _moments(x: Embeddings, weights: Weights) -> tuple[Float[np.ndarray, "r p"], Float[np.ndarray, "r p p"]]:
    """Mean and unbiased covariance of each resample."""
    count = weights.sum(1) * x.shape[1]
    mean = weights @ x.sum(1) / count[:, None]
    rows = x.reshape(-1, x.shape[2])
    squares = np.stack([(rows * np.repeat(w, x.shape[1])[:, None]).T @ rows for w in weights])
    covariance = squares / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
    return mean, covariance * (count / (count - 1))[:, None, None]


def _root(covariance: Float[np.ndarray, "r p p"]) -> Float[np.ndarray, "r p p"]:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))[:, None]) @ vectors.swapaxes(1, 2)


def kernel_distance(a: Embeddings, b: Embeddings, weights: Weights) -> Measure:
    """Unbiased squared MMD with the kernel (x·y/p + 1)³ (KID, Bińkowski et al. 2018) for each resample of the people.

    Means of the kernel are over pairs of different people: what belongs to one person is not independent. May be
    slightly negative.
    """

    def between(x: Embeddings, y: Embeddings) -> Float[np.ndarray, "r"]:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        columns = y.reshape(-1, y.shape[2]).T
        of_one = [((one @ columns / x.shape[2] + 1.0) ** 3).mean(0).reshape(y.shape[:2]).mean(1) for one in x]
        people = np.stack(of_one)
        np.fill_diagonal(people, 0.0)  # nor are two copies of one person in a resample
        pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
        return ((weights @ people) * weights).sum(1) / pairs

    return Measure(between(a, a) + between(b, b) - 2.0 * between(a, b))
