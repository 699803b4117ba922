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


def platform(sharding: NamedSharding | None) -> str:
    """Of the devices of a sharding, which may be described ones; of those that are here without one."""
    return (sharding.mesh.devices.flat if sharding else jax.devices())[0].platform


def in_rows(x: jax.Array, rows: int) -> jax.Array:
    """x [b *n] with each row as often, in turn, as makes so many: guidance has two texts for a latent."""
    return x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0)


class Conv(nnx.Conv):
    """nnx.Conv, of 3×3 and stride 1 also over a map that is doubled.

    Attributes:
        sharding: names the devices that it runs on, see :func:`platform`.
    """

    sharding: NamedSharding | None = None

    def __call__(self, x: jax.Array, beside: jax.Array | None = None) -> jax.Array:
        """[b h w inputs] → [b h2 w2 outputs]; of the channels the last may be given apart, where h and w stay."""
        if beside is not None:
            around = [((size - 1) // 2, size // 2) for size in self.kernel_size]
            of_x, of_beside = jnp.split(self.kernel[...], [x.shape[-1]], axis=2)
            return self._with_bias(self._convolved(x, of_x, *around) + self._convolved(beside, of_beside, *around))
        if self.kernel_size != (3, 3) or self.strides != 1 or self.padding != 1:
            return super().__call__(x)
        return self._with_bias(self._convolved(x, self.kernel[...], (1, 1), (1, 1)))

    def doubled(self, x: jax.Array) -> jax.Array:
        """What it makes of x with each pixel doubled in height and width: [b h w inputs] → [b 2h 2w outputs].

        Of the three rows that a row of the result sees, two are the same row of x: those of the kernel are added up
        before. So are columns, and four convolutions of 2×2 take four ninths of the operations.
        """
        b, h, w, _ = x.shape
        found = [
            jnp.stack([self._convolved(x, part, (1 - i, i), (1 - j, j)) for j, part in enumerate(_halves(rows, 1))], 3)
            for i, rows in enumerate(_halves(self.kernel[...].astype(jnp.float32), 0))
        ]
        return self._with_bias(jnp.stack(found, 2).reshape(b, 2 * h, 2 * w, -1))

    def _with_bias(self, x: jax.Array) -> jax.Array:
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)

    def _convolved(self, x: jax.Array, kernel: jax.Array, *around: tuple[int, int]) -> jax.Array:
        """Without the bias; `around` are the zeros above and below, left and right.

        On a processor as one product where a feature map is small against its kernel: there XLA would bring such a
        kernel, of up to 59 MB, into another order for every gradient, which takes longer than the convolution.
        """
        x, kernel = dtypes.promote_dtype((x, kernel), dtype=self.dtype)
        b, h, w, channels = x.shape
        if b * h * w >= channels or platform(self.sharding) != "cpu":
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), around, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        padded = jnp.pad(x, ((0, 0), *around, (0, 0)))
        rows, columns = kernel.shape[:2]
        patches = [padded[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
        return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _halves(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Of three rows, or columns: the two that the first of two equal pixels sees, and those of the second."""
    first, second, third = (jax.lax.slice_in_dim(kernel, i, i + 1, axis=axis) for i in range(3))
    return jnp.concatenate([first, second + third], axis), jnp.concatenate([first + second, third], axis)


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
) -> Conv:
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


class GroupNorm(nnx.GroupNorm):
    """nnx.GroupNorm (Wu and He 2018) of [b h w channels]: means are taken of each channel first and then of a group's.

    On a processor neighbouring channels lie in one vector, and the UNet of the embedded base takes 6 % less time.
    """

    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        """[b h w channels] → the same in the layer's dtype; statistics are float32.

        x may be some of the groups only, whose channels begin at `first`.
        """
        here, each = slice(first, first + x.shape[-1]), self.group_size

        def of_group(channels: jax.Array) -> jax.Array:
            means = channels.reshape(len(x), -1, each).mean(-1)
            return jnp.repeat(means, each, -1)[:, None, None]

        wide = x.astype(jnp.float32)
        mean = of_group(wide.mean((1, 2)))
        if self.use_fast_variance:
            variance = jnp.maximum(of_group(jnp.square(wide).mean((1, 2))) - jnp.square(mean), 0.0)
        else:
            variance = of_group(jnp.square(wide - mean).mean((1, 2)))
        scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[here]
        return ((wide - mean) * scale + self.bias[here]).astype(self.dtype)


def group_norm(channels: int, groups: int, eps: float, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> GroupNorm:
    """See :class:`GroupNorm`."""
    return GroupNorm(channels, groups, epsilon=eps, **_norm(dtype, rngs))
