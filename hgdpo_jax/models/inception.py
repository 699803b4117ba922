"""The Inception network of FID and KID: TensorFlow's of 2015-12-05, with the names of torch-fidelity and pytorch-fid.

Szegedy et al. 2016. As in TensorFlow, average pools leave the border out, and the last block takes a maximum instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig

FEATURES = 2048
_SIDE, _CLASSES, _EPSILON = 299, 1008, 1e-3
_Layer = tuple[str, int, tuple[int, int]]  # name, channels, height and width of the kernel
# The layers one after the other; at a place with several all see the same, and their channels are put together.
_Branch = tuple[tuple[_Layer, ...], ...]
_ONE, _THREE, _FIVE, _WIDE, _HIGH = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _branch(name: str, *layers: tuple[int, tuple[int, int]]) -> _Branch:
    """A branch of one layer has its name, the layers of longer ones are numbered."""
    names = [name] if len(layers) == 1 else [f"{name}_{number}" for number in range(1, len(layers) + 1)]
    return tuple(((own, *layer),) for own, layer in zip(names, layers, strict=True))


def _forked(name: str, *layers: tuple[int, tuple[int, int]]) -> _Branch:
    """A branch that ends in a wide and a high kernel side by side."""
    begin = tuple(((f"{name}_{number}", *layer),) for number, layer in enumerate(layers, start=1))
    last = f"{name}_{len(layers) + 1}"
    return (*begin, ((f"{last}a", 384, (1, 3)), (f"{last}b", 384, (3, 1))))


def _a(pooled: int) -> tuple[_Branch, ...]:
    return (
        _branch("branch1x1", (64, _ONE)),
        _branch("branch5x5", (48, _ONE), (64, _FIVE)),
        _branch("branch3x3dbl", (64, _ONE), (96, _THREE), (96, _THREE)),
        _branch("branch_pool", (pooled, _ONE)),
    )


def _c(width: int) -> tuple[_Branch, ...]:
    twice = ((width, _HIGH), (width, _WIDE), (width, _HIGH))
    return (
        _branch("branch1x1", (192, _ONE)),
        _branch("branch7x7", (width, _ONE), (width, _WIDE), (192, _HIGH)),
        _branch("branch7x7dbl", (width, _ONE), *twice, (192, _WIDE)),
        _branch("branch_pool", (192, _ONE)),
    )


_B = (_branch("branch3x3", (384, _THREE)), _branch("branch3x3dbl", (64, _ONE), (96, _THREE), (96, _THREE)))
_D = (
    _branch("branch3x3", (192, _ONE), (320, _THREE)),
    _branch("branch7x7x3", (192, _ONE), (192, _WIDE), (192, _HIGH), (192, _THREE)),
)
_E = (
    _branch("branch1x1", (320, _ONE)),
    _forked("branch3x3", (384, _ONE)),
    _forked("branch3x3dbl", (448, _ONE), (384, _THREE)),
    _branch("branch_pool", (192, _ONE)),
)
# Name → branches, and what is pooled: `halve` is a branch of its own, and the others' last layers halve the size too.
_BLOCKS = {
    "Mixed_5b": (_a(32), "average"),
    "Mixed_5c": (_a(64), "average"),
    "Mixed_5d": (_a(64), "average"),
    "Mixed_6a": (_B, "halve"),
    "Mixed_6b": (_c(128), "average"),
    "Mixed_6c": (_c(160), "average"),
    "Mixed_6d": (_c(160), "average"),
    "Mixed_6e": (_c(192), "average"),
    "Mixed_7a": (_D, "halve"),
    "Mixed_7b": (_E, "average"),
    "Mixed_7c": (_E, "maximum"),
}
_POOLS = {
    "average": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    "maximum": lambda x: nnx.max_pool(x, (3, 3), (1, 1), "SAME"),
    "halve": lambda x: nnx.max_pool(x, (3, 3), (2, 2)),
}


class _Normalised(nnx.Module):
    """Batch normalisation with the statistics of the training."""

    def __init__(self, channels: int, make: Layers) -> None:
        self.scale, self.bias = make.normal((channels,), 1.0), make.normal((channels,), 1.0)
        self.running_mean, self.running_var = make.normal((channels,), 1.0), make.normal((channels,), 1.0)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + _EPSILON)
        return x * scale + (self.bias[...] - self.running_mean[...] * scale)


class BasicConv2d(nnx.Module):
    """A convolution without bias, normalised, then max(·, 0). `same` keeps height and width."""

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int], make: Layers, stride: int = 1, same: bool = True
    ) -> None:
        around = [((side - 1) // 2,) * 2 if same else (0, 0) for side in size]
        self.conv = make.conv(inputs, outputs, size, stride=stride, padding=around, bias=False)
        self.bn = _Normalised(outputs, make)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class Mixed(nnx.Module):
    """Branches side by side, whose channels are put together; `branch_pool` sees what is pooled."""

    def __init__(self, inputs: int, branches: Sequence[_Branch], pool: str, make: Layers) -> None:
        self.pool = pool
        self.branches = tuple(tuple(tuple(name for name, *_ in place) for place in branch) for branch in branches)
        self.width = inputs if pool == "halve" else 0
        for branch in branches:
            width = inputs
            for place in branch:
                halves = pool == "halve" and place is branch[-1]
                for name, outputs, size in place:
                    setattr(self, name, BasicConv2d(width, outputs, size, make, 1 + halves, not halves))
                width = sum(outputs for _, outputs, _ in place)
            self.width += width

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        pooled = _POOLS[self.pool](x)
        found = []
        for branch in self.branches:
            y = pooled if branch[0] == ("branch_pool",) else x
            for place in branch:
                y = jnp.concatenate([getattr(self, name)(y) for name in place], -1)
            found.append(y)
        return jnp.concatenate(found + [pooled] * (self.pool == "halve"), -1)


class FIDInception(nnx.Module):
    """Pictures → the features of FID. Arguments as for every model; the config says nothing."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, _THREE, make, stride=2, same=False)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, _THREE, make, same=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, _THREE, make)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, _ONE, make)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, _THREE, make, same=False)
        width = 192
        for name, (branches, pool) in _BLOCKS.items():
            block = Mixed(width, branches, pool, make)
            setattr(self, name, block)
            width = block.width
        self.fc = make.linear(width, _CLASSES)  # in the file, for classes; no feature of FID

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 2048"]:
        """Features of images in [-1, 1], rounded to 0…255 as a file of them is, float32."""
        levels = jnp.clip(jnp.round((images + 1.0) * 127.5), 0.0, 255.0)
        x = (resized_as_tensorflow(levels, _SIDE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_POOLS["halve"](x)))
        x = _POOLS["halve"](x)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((1, 2)).astype(jnp.float32)


def resized_as_tensorflow(x: Float[Array, "b H W c"], side: int) -> Float[Array, "b {side} {side} c"]:
    """Bilinear as TensorFlow 1 resizes: place i of the result is place i · H / side of the picture, and nothing is
    averaged before it is made smaller."""
    for axis in (2, 1):
        count = x.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(count / side)
        low = at.astype(np.int32)
        part = jnp.asarray(at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        first, second = (jnp.take(x, places, axis) for places in (low, np.minimum(low + 1, count - 1)))
        x = first + (second - first) * part
    return x
