"""The network of 68 landmarks of @vladmandic/face-api 1.7.15."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.faces.networks import MEAN, SeparableConv, pixels
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig

SIZE = 112
LANDMARKS = 68
_WIDTHS = (32, 64, 128, 256)


class DenseBlock(nnx.Module):
    """A convolution that halves the size and three that keep it; each of these reads the sum of all before."""

    def __init__(self, inputs: int, outputs: int, make: Layers, separable: bool) -> None:
        self.conv0: nnx.Module = (
            SeparableConv(inputs, outputs, make, stride=2)
            if separable
            else make.conv(inputs, outputs, 3, stride=2, padding="SAME")
        )
        self.conv1 = SeparableConv(outputs, outputs, make)
        self.conv2 = SeparableConv(outputs, outputs, make)
        self.conv3 = SeparableConv(outputs, outputs, make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are even; h2 and w2 are half of them."""
        x = jax.nn.relu(self.conv0(x))
        for layer in (self.conv1, self.conv2, self.conv3):
            x = x + layer(jax.nn.relu(x))
        return jax.nn.relu(x)


class DenseNet(nnx.Module):
    """Four dense blocks, the mean over their pixels and a linear layer."""

    def __init__(self, config: Mapping[str, Any], outputs: int, make: Layers) -> None:
        self.config = ModelConfig(config)
        for i, (inputs, width) in enumerate(pairwise((3, *_WIDTHS))):
            setattr(self, f"dense{i}", DenseBlock(inputs, width, make, separable=i > 0))
        self.fc = make.linear(_WIDTHS[-1], outputs)

    def _answers(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b n"]:
        x = pixels(images, SIZE, MEAN)
        for i in range(len(_WIDTHS)):
            x = getattr(self, f"dense{i}")(x)
        return self.fc(x.mean((1, 2))).astype(jnp.float32)


class FaceLandmarks(DenseNet):
    """The full network of 68 landmarks (face_landmark_68_model). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(config, 2 * LANDMARKS, Layers(rngs, dtype))

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 68 2"]:
        """(x, y), float32, as fractions of the square picture's side: (0, 0) is its upper left corner, (1, 1) the lower
        right one; a landmark may lie outside.

        In the order of iBUG 300-W (Sagonas et al. 2013), left as the picture shows it: jaw 0-16 from the left, left
        brow 17-21, right brow 22-26, bridge of the nose 27-30 down to its tip, nostrils 31-35, left eye 36-41, right
        eye 42-47, outer lips 48-59 with the corners 48 (left) and 54, inner lips 60-67.
        """
        return self._answers(images).reshape(-1, LANDMARKS, 2)
