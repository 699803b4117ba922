"""What a face shows, by networks of @vladmandic/face-api 1.7.15: its landmarks, its expression, its age and gender.

Images are [b, H, W, 3] in [-1, 1]: squares around one face each, scaled to 112x112 where they are not. face-api cuts
out the detector's box and fills the shorter side up with black on both sides; names are those of face-api.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hgdpo_jax.models.face import MEAN, SeparableConv, pixels
from hgdpo_jax.models.layers import conv, linear
from hgdpo_jax.models.model_config import ModelConfig

SIZE = 112
LANDMARKS = 68
EXPRESSIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
_WIDTHS = (32, 64, 128, 256)


class DenseBlock(nnx.Module):
    """A convolution that halves the size and three that keep it, each of the sum of all before; the first is dense."""

    def __init__(self, inputs: int, outputs: int, *, first: bool, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        if first:
            self.conv0 = conv(inputs, outputs, 3, stride=2, padding="SAME", rngs=rngs, dtype=dtype)
        else:
            self.conv0 = SeparableConv(inputs, outputs, stride=2, rngs=rngs, dtype=dtype)
        self.conv1 = SeparableConv(outputs, outputs, rngs=rngs, dtype=dtype)
        self.conv2 = SeparableConv(outputs, outputs, rngs=rngs, dtype=dtype)
        self.conv3 = SeparableConv(outputs, outputs, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are even; h2 and w2 are half of them."""
        x = jax.nn.relu(self.conv0(x))
        for layer in (self.conv1, self.conv2, self.conv3):
            x = x + layer(jax.nn.relu(x))
        return jax.nn.relu(x)


class _DenseNet(nnx.Module):
    """Four dense blocks, their mean and a linear layer."""

    def __init__(self, config: Mapping[str, Any], outputs: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.config = ModelConfig(config)
        for i, (inputs, width) in enumerate(pairwise((3, *_WIDTHS))):
            setattr(self, f"dense{i}", DenseBlock(inputs, width, first=i == 0, rngs=rngs, dtype=dtype))
        self.fc = linear(_WIDTHS[-1], outputs, dtype=dtype, rngs=rngs)

    def _answers(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b n"]:
        x = pixels(images, SIZE, MEAN)
        for i in range(len(_WIDTHS)):
            x = getattr(self, f"dense{i}")(x)
        return self.fc(x.mean((1, 2))).astype(jnp.float32)


class FaceLandmarks(_DenseNet):
    """The full network of 68 landmarks (face_landmark_68_model). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        super().__init__(config, 2 * LANDMARKS, rngs=rngs, dtype=dtype)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 68 2"]:
        """(x, y), float32, as fractions of the square picture's side: (0, 0) is its upper left corner, (1, 1) the lower
        right one; a landmark may lie outside.

        In the order of iBUG 300-W (Sagonas et al. 2013), left as the picture shows it: jaw 0-16 from the left, left
        brow 17-21, right brow 22-26, bridge of the nose 27-30 down to its tip, nostrils 31-35, left eye 36-41, right
        eye 42-47, outer lips 48-59 with the corners 48 (left) and 54, inner lips 60-67.
        """
        return self._answers(images).reshape(-1, LANDMARKS, 2)


class FaceExpression(_DenseNet):
    """The network of seven expressions (face_expression_model). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        super().__init__(config, len(EXPRESSIONS), rngs=rngs, dtype=dtype)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 7"]:
        """The probabilities of `EXPRESSIONS`, float32, whose sum is 1."""
        return jax.nn.softmax(self._answers(images))


class Reduction(nnx.Module):
    """Two separable convolutions and a maximum, which halves the size, added to a 1x1 convolution of their input."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.separable_conv0 = SeparableConv(inputs, outputs, rngs=rngs, dtype=dtype)
        self.separable_conv1 = SeparableConv(outputs, outputs, rngs=rngs, dtype=dtype)
        self.expansion_conv = conv(inputs, outputs, 1, stride=2, padding="SAME", rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are even; h2 and w2 are half of them."""
        h = self.separable_conv1(jax.nn.relu(self.separable_conv0(jax.nn.relu(x))))
        return nnx.max_pool(h, (3, 3), (2, 2), "SAME") + self.expansion_conv(x)


class MainBlock(nnx.Module):
    """Three separable convolutions added to their input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.separable_conv0 = SeparableConv(width, width, rngs=rngs, dtype=dtype)
        self.separable_conv1 = SeparableConv(width, width, rngs=rngs, dtype=dtype)
        self.separable_conv2 = SeparableConv(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The size stays."""
        h = x
        for layer in (self.separable_conv0, self.separable_conv1, self.separable_conv2):
            h = layer(jax.nn.relu(h))
        return x + h


class Person(NamedTuple):
    """Age in years and the probability of male, [0, 1], both float32.

    That of female is the rest: face-api knows these two, and says male above one half.
    """

    age: Float[Array, "b"]
    male: Float[Array, "b"]


class AgeGender(nnx.Module):
    """A small Xception (Chollet 2017; age_gender_model). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        self.config = ModelConfig(config)
        first, second, third, last = 32, 64, 128, 256
        self.entry_flow = nnx.Dict(
            conv_in=conv(3, first, 3, stride=2, padding="SAME", rngs=rngs, dtype=dtype),
            reduction_block_0=Reduction(first, second, rngs=rngs, dtype=dtype),
            reduction_block_1=Reduction(second, third, rngs=rngs, dtype=dtype),
        )
        self.middle_flow = nnx.Dict(
            main_block_0=MainBlock(third, rngs=rngs, dtype=dtype),
            main_block_1=MainBlock(third, rngs=rngs, dtype=dtype),
        )
        self.exit_flow = nnx.Dict(
            reduction_block=Reduction(third, last, rngs=rngs, dtype=dtype),
            separable_conv=SeparableConv(last, 2 * last, rngs=rngs, dtype=dtype),
        )
        self.fc = nnx.Dict(
            age=linear(2 * last, 1, dtype=dtype, rngs=rngs), gender=linear(2 * last, 2, dtype=dtype, rngs=rngs)
        )

    def __call__(self, images: Float[Array, "b H W 3"]) -> Person:
        """Of each picture's face."""
        x = jax.nn.relu(self.entry_flow.conv_in(pixels(images, SIZE, MEAN)))
        x = self.entry_flow.reduction_block_1(self.entry_flow.reduction_block_0(x))
        x = self.middle_flow.main_block_1(self.middle_flow.main_block_0(x))
        x = jax.nn.relu(self.exit_flow.separable_conv(self.exit_flow.reduction_block(x))).mean((1, 2))
        gender = jax.nn.softmax(self.fc.gender(x).astype(jnp.float32))  # of male, of female
        return Person(self.fc.age(x)[:, 0].astype(jnp.float32), gender[:, 0])
