"""Distances between two sets of image embeddings, float64."""

import numpy as np
from jaxtyping import Float

Embeddings = Float[np.ndarray, "n p"]


def frechet_distance(a: Embeddings, b: Embeddings) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017), n ≥ 2 in each set.

    tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½, which needs no root of an unsymmetric matrix.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    root_a, root_b = _root(np.cov(a, rowvar=False)), _root(np.cov(b, rowvar=False))
    cross = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean + np.square(root_a).sum() + np.square(root_b).sum() - 2.0 * cross)


def _root(covariance: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def kernel_distance(a: Embeddings, b: Embeddings) -> float:
    """Unbiased squared MMD with the kernel (x·y/p + 1)³ (KID, Bińkowski et al. 2018); may be slightly negative."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def kernel(x: Embeddings, y: Embeddings) -> Float[np.ndarray, "n m"]:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def within(x: Embeddings) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2.0 * float(kernel(a, b).mean())
