"""What a face shows besides its landmarks: expression, age and gender, by networks of @vladmandic/face-api 1.7.15."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hgdpo_jax.faces.landmarks import SIZE, DenseNet
from hgdpo_jax.faces.networks import MEAN, SeparableConv, pixels
from hgdpo_jax.models.layers import conv, linear
from hgdpo_jax.models.model_config import ModelConfig

EXPRESSIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")


class FaceExpression(DenseNet):
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


class AgeAndGender(NamedTuple):
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

    def __call__(self, images: Float[Array, "b H W 3"]) -> AgeAndGender:
        """Of each picture's face."""
        x = jax.nn.relu(self.entry_flow.conv_in(pixels(images, SIZE, MEAN)))
        x = self.entry_flow.reduction_block_1(self.entry_flow.reduction_block_0(x))
        x = self.middle_flow.main_block_1(self.middle_flow.main_block_0(x))
        x = jax.nn.relu(self.exit_flow.separable_conv(self.exit_flow.reduction_block(x))).mean((1, 2))
        gender = jax.nn.softmax(self.fc.gender(x).astype(jnp.float32))  # of male, of female
        return AgeAndGender(self.fc.age(x)[:, 0].astype(jnp.float32), gender[:, 0])
