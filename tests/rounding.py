"""How far two programs may be apart that compute the same in float32.

Bits are compared only between runs of one compiled program. Another mesh, another rematerialisation, another formula,
PyTorch or NumPy add in another order, fuse other operations and approximate exp and log otherwise, and so does the same
program on another processor. Each operation rounds by EPS of the values it adds, and what comes after multiplies that.
"""

from typing import Any

import numpy as np

EPS = float(np.finfo(np.float32).eps)  # 1.19e-7
NETWORK = 170 * EPS  # of an element: some 170 operations in a row, in the deepest of the tests' networks
GRADIENT = 2 * NETWORK  # there and back
MEAN = 10 * EPS  # of a mean over a latent: what its elements round, √170 EPS at random, mostly cancels


def assert_close(found: Any, expected: Any, tolerance: float, size: float | None = None, name: str = "") -> None:
    """`tolerance` is relative to the largest expected value, or to `size`: of what was added up, or multiplies it."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = float(np.abs(expected).max()) if size is None else size
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size, err_msg=name)
