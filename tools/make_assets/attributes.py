"""What a face shows besides its landmarks: expression, age and gender, by networks of @vladmandic/face-api 1.7.15."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.faces.landmarks import SIZE, DenseNet
from hgdpo_jax.faces.networks import MEAN, SeparableConv, pixels
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig

EXPRESSIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")


class FaceExpression(DenseNet):
    """The network of seven expressions (face_expression_model). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(config, len(EXPRESSIONS), Layers(rngs, dtype))

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 7"]:
        """The probabilities of `EXPRESSIONS`, float32, whose sum is 1."""
        return jax.nn.softmax(self._answers(images))


class Reduction(nnx.Module):
    """Two separable convolutions and a maximum, which halves the size, added to a 1x1 convolution of their input."""

    def __init__(self, inputs: int, outputs: int, make: Layers) -> None:
        self.separable_conv0 = SeparableConv(inputs, outputs, make)
        self.separable_conv1 = SeparableConv(outputs, outputs, make)
        self.expansion_conv = make.conv(inputs, outputs, 1, stride=2, padding="SAME")

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are even; h2 and w2 are half of them."""
        h = self.separable_conv1(jax.nn.relu(self.separable_conv0(jax.nn.relu(x))))
        return nnx.max_pool(h, (3, 3), (2, 2), "SAME") + self.expansion_conv(x)


class MainBlock(nnx.Module):
    """Three separable convolutions added to their input."""

    def __init__(self, width: int, make: Layers) -> None:
        self.separable_conv0 = SeparableConv(width, width, make)
        self.separable_conv1 = SeparableConv(width, width, make)
        self.separable_conv2 = SeparableConv(width, width, make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = x
        for layer in (self.separable_conv0, self.separable_conv1, self.separable_conv2):
            h = layer(jax.nn.relu(h))
        return x + h


class AgeAndGender(NamedTuple):
    """Age in years and the probability of male, [0, 1], both float32. face-api knows male and female only."""

    age: Float[Array, "b"]
    male: Float[Array, "b"]


class AgeGender(nnx.Module):
    """A small Xception (Chollet 2017; age_gender_model). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        self.entry_flow = nnx.Dict(
            conv_in=make.conv(3, 32, 3, stride=2, padding="SAME"),
            reduction_block_0=Reduction(32, 64, make),
            reduction_block_1=Reduction(64, 128, make),
        )
        self.middle_flow = nnx.Dict(main_block_0=MainBlock(128, make), main_block_1=MainBlock(128, make))
        self.exit_flow = nnx.Dict(
            reduction_block=Reduction(128, 256, make), separable_conv=SeparableConv(256, 512, make)
        )
        self.fc = nnx.Dict(age=make.linear(512, 1), gender=make.linear(512, 2))

    def __call__(self, images: Float[Array, "b H W 3"]) -> AgeAndGender:
        """Age and gender of each image's face."""
        x = jax.nn.relu(self.entry_flow.conv_in(pixels(images, SIZE, MEAN)))
        x = self.entry_flow.reduction_block_1(self.entry_flow.reduction_block_0(x))
        x = self.middle_flow.main_block_1(self.middle_flow.main_block_0(x))
        x = jax.nn.relu(self.exit_flow.separable_conv(self.exit_flow.reduction_block(x))).mean((1, 2))
        gender = jax.nn.softmax(self.fc.gender(x).astype(jnp.float32))  # of male, of female
        return AgeAndGender(self.fc.age(x)[:, 0].astype(jnp.float32), gender[:, 0])
