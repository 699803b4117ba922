"""OpenAI's ResNet vision tower of CLIP (Radford et al. 2021), whose last pooling is attention.

Without the positions of that pooling, as CLIP-IQA reads images of any size (Wang et al. 2023). Names are OpenAI's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig

_EPS = 1e-5
_HEAD = 64  # channels of a head
_WIDER = 4  # times the width inside a block


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) with the mean and variance that training has left."""

    def __init__(self, channels: int, make: Layers) -> None:
        self.scale, self.bias = make.normal((channels,), 1.0), make.normal((channels,), 1.0)
        self.running_mean, self.running_var = make.normal((channels,), 1.0), make.normal((channels,), 1.0)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + _EPS)
        return ((x - self.running_mean[...]) * scale + self.bias[...]).astype(x.dtype)


def _halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Means of 2×2 pixels; a last odd row or column is left out."""
    return nnx.avg_pool(x, (2, 2), (2, 2))


class Bottleneck(nnx.Module):
    """Convolutions of 1×1, 3×3 and 1×1, added to their input; with `down` means of 2×2 pixels halve the size."""

    def __init__(self, inputs: int, width: int, down: bool, make: Layers) -> None:
        self.down, outputs = down, _WIDER * width
        self.conv1, self.bn1 = make.conv(inputs, width, 1, bias=False), BatchNorm(width, make)
        self.conv2, self.bn2 = make.conv(width, width, 3, bias=False), BatchNorm(width, make)
        self.conv3, self.bn3 = make.conv(width, outputs, 1, bias=False), BatchNorm(outputs, make)
        if down or inputs != outputs:
            self.downsample = nnx.List([make.conv(inputs, outputs, 1, bias=False), BatchNorm(outputs, make)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        h = jax.nn.relu(self.bn1(self.conv1(x)))
        h = jax.nn.relu(self.bn2(self.conv2(h)))
        if self.down:
            h, x = _halved(h), _halved(x)
        h = self.bn3(self.conv3(h))
        if hasattr(self, "downsample"):
            convolution, norm = self.downsample
            x = norm(convolution(x))
        return jax.nn.relu(h + x)


class AttentionPool(nnx.Module):
    """The mean of all pixels attends to itself and to each of them."""

    def __init__(self, width: int, outputs: int, make: Layers) -> None:
        self.heads = width // _HEAD
        self.q_proj, self.k_proj, self.v_proj = (make.linear(width, width) for _ in range(3))
        self.c_proj = make.linear(width, outputs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        pixels = x.reshape(len(x), -1, x.shape[-1])
        mean = pixels.mean(1, keepdims=True)
        tokens = jnp.concatenate([mean, pixels], axis=1)
        each = (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in each)
        return self.c_proj(jax.nn.dot_product_attention(q, k, v).reshape(len(x), -1))


class CLIPResNet(nnx.Module):
    """The tower. Arguments as for every model.

    The config holds `width` of the first blocks, `layers` (blocks of each of four sizes) and `projection_dim`.
    """

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        width, half = config["width"], config["width"] // 2
        self.conv1 = make.conv(3, half, 3, stride=2, padding=1, bias=False)
        self.conv2, self.conv3 = make.conv(half, half, 3, bias=False), make.conv(half, width, 3, bias=False)
        self.bn1, self.bn2, self.bn3 = BatchNorm(half, make), BatchNorm(half, make), BatchNorm(width, make)
        inputs = width
        for number, count in enumerate(config["layers"]):
            inside = width * 2**number
            sizes = [inputs] + [_WIDER * inside] * (count - 1)
            blocks = [Bottleneck(size, inside, number > 0 and i == 0, make) for i, size in enumerate(sizes)]
            setattr(self, f"layer{number + 1}", nnx.List(blocks))
            inputs = _WIDER * inside
        self.attnpool = AttentionPool(inputs, config["projection_dim"], make)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b p"]:
        """Embeddings, not normalised, float32, of CLIP-normalised pixels of any size from 32 on."""
        x = pixels
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = jax.nn.relu(norm(convolution(x)))
        x = _halved(x)
        for number in range(1, len(self.config["layers"]) + 1):
            for block in getattr(self, f"layer{number}"):
                x = block(x)
        return self.attnpool(x).astype(jnp.float32)
