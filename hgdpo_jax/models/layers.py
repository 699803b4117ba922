"""The layers that all models are made of: Flax's, with the settings of diffusers and transformers.

A model made with `rngs=SHAPES` has the shapes of its parameters instead of values: it is to be filled from a file.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.sharding import NamedSharding


class _Shapes:
    """Stands in for nnx.Rngs. With jax.eval_shape instead, tracing all the initialisers would take over a second."""

    def params(self) -> None:
        """No key: no value."""


SHAPES = _Shapes()


def _initialiser(values: nnx.Initializer) -> nnx.Initializer:
    def initial(key: jax.Array | None, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.ShapeDtypeStruct(shape, dtype) if key is None else values(key, shape, dtype)

    return initial


_fan_in = _initialiser(nnx.initializers.lecun_normal())
_embedding = _initialiser(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
_zeros, _ones = _initialiser(nnx.initializers.zeros), _initialiser(nnx.initializers.ones)

# linear(inputs, outputs): [*b inputs] → [*b outputs]; embed(count, width): ids [*b] → [*b width]. All parameters are
# float32.
linear = partial(nnx.Linear, kernel_init=_fan_in, bias_init=_zeros)
embed = partial(nnx.Embed, embedding_init=_embedding)


def normal(rngs: nnx.Rngs, shape: Sequence[int], deviation: float) -> nnx.Param:
    """A float32 parameter, normally distributed."""
    return nnx.Param(_initialiser(nnx.initializers.normal(deviation))(rngs.params(), shape))


class Conv(nnx.Conv):
    """nnx.Conv; on a processor as one product where a feature map is small against its kernel.

    There XLA would bring such a kernel, of up to 59 MB, into another order for every gradient, which takes longer than
    the convolution.

    Attributes:
        sharding: names the devices that it runs on, which may be described ones; those that are here unless given.
    """

    sharding: NamedSharding | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b h w inputs] → [b h2 w2 outputs]."""
        b, h, w, channels = x.shape
        small = b * h * w < channels and self.kernel_size == (3, 3) and self.strides == 1 and self.padding == 1
        devices = self.sharding.mesh.devices.flat if self.sharding else jax.devices()
        if not small or devices[0].platform != "cpu":
            return super().__call__(x)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = dtypes.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [around[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        found = jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])
        return found if bias is None else found + bias


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | str | Sequence[tuple[int, int]] | None = None,
    bias: bool = True,
    rngs: nnx.Rngs,
    dtype: jnp.dtype,
) -> nnx.Conv:
    """A square convolution, [b h w inputs] → [b h2 w2 outputs]; `padding` is Flax's.

    Unless it is given, a convolution of stride 1 and odd size keeps height and width.
    """
    return Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2 if padding is None else padding,
        use_bias=bias,
        kernel_init=_fan_in,
        bias_init=_zeros,
        dtype=dtype,
        rngs=rngs,
    )


def _norm(dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, Any]:
    """Statistics are float32. Of float32 they are taken in two passes, like PyTorch's; of numbers with 8 or 11 bits in
    one, as E[x²] − E[x]², whose error is far below those numbers' own."""
    fast = jnp.dtype(dtype).itemsize < 4
    return {"use_fast_variance": fast, "scale_init": _ones, "bias_init": _zeros, "dtype": dtype, "rngs": rngs}


def layer_norm(width: int, eps: float = 1e-5, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.LayerNorm:
    """LayerNorm over the last axis of [*b width]."""
    return nnx.LayerNorm(width, epsilon=eps, **_norm(dtype, rngs))


def group_norm(channels: int, groups: int, eps: float, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.GroupNorm:
    """GroupNorm of [b h w channels]."""
    return nnx.GroupNorm(channels, groups, epsilon=eps, **_norm(dtype, rngs))
