"""Comparison with PyTorch: the same weights, the same inputs, the largest relative error."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from hgdpo_jax.models.convert import abstract, from_torch


def numpy_weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """state_dict as NumPy arrays."""
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, so that no zero or one hides a mistake; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            offset = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(offset * 0.5 + scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def ported(cls: Callable[..., nnx.Module], config: dict[str, Any], module: torch.nn.Module) -> nnx.Module:
    """Our module with the PyTorch module's weights."""
    model = abstract(cls, config)
    from_torch(numpy_weights(module), model)
    return model


def relative_error(ours: jax.Array, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value; `theirs` may be [b, c, h, w].

    Float32 allows NETWORK of `tests.rounding`.
    """
    expected = theirs.detach().numpy()
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    assert ours.shape == expected.shape
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def deviations(ours: Any, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the standard deviation of `theirs`, which is of the same shape."""
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.abs(np.asarray(ours) - expected).max() / expected.std())
