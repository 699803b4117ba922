"""A rating of an embedding: LAION's aesthetic predictor v2, and the last layers of ImageReward."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig

_WIDTHS = (1024, 128, 64, 16, 1)
_NUMBERS = (0, 2, 4, 6, 7)  # of the linear layers; dropout has the others


class Rating(nnx.Module):
    """Five linear layers without activations. Arguments as for every model; its config is the embedding's `width`."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        sizes = pairwise((config["width"], *_WIDTHS))
        self.layers = nnx.Dict({str(number): make.linear(*size) for number, size in zip(_NUMBERS, sizes, strict=True)})

    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b"]:
        """The rating of each embedding."""
        x = embedding
        for number in _NUMBERS:
            x = self.layers[str(number)](x)
        return x[:, 0].astype(jnp.float32)
