"""The layers that all models are made of: Flax's, with the settings of diffusers and transformers.

A model made with `rngs=SHAPES` has the shapes of its parameters instead of values: it is to be filled from a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from hgdpo_jax.models.int8 import Kernel, with_kernels


class _Shapes(nnx.Rngs):
    """Gives no keys. With jax.eval_shape instead, tracing all the initialisers would take over a second."""

    def params(self) -> None:
        """No key: no value."""


SHAPES = _Shapes()


def _initialiser(values: nnx.Initializer) -> nnx.Initializer:
    def initial(key: PRNGKeyArray | None, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype) if key is None else values(key, shape, dtype)

    return initial


_fan_in = _initialiser(nnx.initializers.lecun_normal())
_embedding = _initialiser(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
_zeros, _ones = _initialiser(nnx.initializers.zeros), _initialiser(nnx.initializers.ones)


def platform(sharding: NamedSharding | None) -> str:
    """`cpu`, `gpu` or `tpu`: that of a sharding's devices, which may be described ones, or of those that are here."""
    return (sharding.mesh.devices.flat if sharding else jax.devices())[0].platform


def in_rows(x: Shaped[Array, "b *n"], rows: int) -> Shaped[Array, "r *n"]:
    """Each row of x, in turn, as often as makes so many rows: guidance has two texts for a latent."""
    return x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0)


class Linear(Kernel, nnx.Linear):
    """nnx.Linear, whose kernel may be in 8 bits."""

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:  # type: ignore[override]  # no out_sharding
        """The product with the kernel, and the bias."""
        if self.kernel_scale is None:
            return super().__call__(x)
        dtype = self.dtype or x.dtype
        out = with_kernels([self], dtype, lambda kernels, x: jnp.tensordot(x, kernels[0], 1), x.astype(dtype))
        return out if self.bias is None else out + self.bias[...].astype(dtype)


class Conv(Kernel, nnx.Conv):
    """nnx.Conv; with a kernel of 3×3 and stride 1 also over a map whose height and width are doubled.

    Attributes:
        sharding: names the devices that it runs on, see :func:`platform`.
    """

    sharding: NamedSharding | None = None

    def __call__(
        self, x: Float[Array, "b h w i"], beside: Float[Array, "b h w j"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """The convolution of x, or of x and `beside` as the last of its channels, where height and width stay."""
        return self._with_bias(
            with_kernels([self], self.dtype or x.dtype, lambda kernels, *x: self.apply(kernels[0], *x), x, beside)
        )

    def doubled(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """The convolution of x with each pixel doubled in height and width; h2 and w2 are twice h and w."""
        return self._with_bias(
            with_kernels([self], self.dtype or x.dtype, lambda kernels, x: self.apply_doubled(kernels[0], x), x)
        )

    def apply(
        self, kernel: Float[Array, "kh kw i_j o"], x: Float[Array, "b h w i"], beside: Float[Array, "b h w j"] | None
    ) -> Float[Array, "b h2 w2 o"]:
        """The same with another kernel and without the bias."""
        if beside is not None:
            around = [((size - 1) // 2, size // 2) for size in self.kernel_size]
            of_x, of_beside = jnp.split(kernel, [x.shape[-1]], axis=2)
            return self._convolved(x, of_x, *around) + self._convolved(beside, of_beside, *around)
        if self.kernel_size == (3, 3) and self.strides == self.padding == 1:
            return self._convolved(x, kernel, (1, 1), (1, 1))
        x, kernel = dtypes.promote_dtype((x, kernel), dtype=self.dtype)
        strides: Any = (self.strides,) * 2
        given: Any = self.padding
        around = [(given, given)] * 2 if isinstance(given, int) else given
        return jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def apply_doubled(self, kernel: Float[Array, "kh kw i o"], x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """As :meth:`doubled`, with another kernel and without the bias.

        A row of the result sees three rows, two of which are the same row of x: their kernels are added up before. So
        are the columns', and four convolutions of 2×2 take four ninths of the operations.
        """
        b, h, w, _ = x.shape
        found = [
            jnp.stack([self._convolved(x, part, (1 - i, i), (1 - j, j)) for j, part in enumerate(_halves(rows, 1))], 3)
            for i, rows in enumerate(_halves(kernel.astype(jnp.float32), 0))
        ]
        return jnp.stack(found, 2).reshape(b, 2 * h, 2 * w, -1)

    def _with_bias(self, x: Float[Array, "b h w o"]) -> Float[Array, "b h w o"]:
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)

    def _convolved(
        self, x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], *around: tuple[int, int]
    ) -> Float[Array, "b h w o"]:
        """Without the bias; `around` are the zeros above and below, left and right.

        On a processor one product takes the convolution's place where the feature map is small against its kernel: XLA
        would bring such a kernel, of up to 59 MB, into another order for every gradient, which takes longer.
        """
        x, kernel = dtypes.promote_dtype((x, kernel), dtype=self.dtype)
        b, h, w, channels = x.shape
        if b * h * w >= channels or platform(self.sharding) != "cpu":
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), around, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        padded = jnp.pad(x, ((0, 0), *around, (0, 0)))
        rows, columns = kernel.shape[:2]
        patches = [padded[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
        return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _halves(kernel: Array, axis: int) -> tuple[Array, Array]:
    """What the first of two equal pixels sees of a kernel's three rows, or columns, and what the second sees."""
    first, second, third = (jax.lax.slice_in_dim(kernel, i, i + 1, axis=axis) for i in range(3))
    return jnp.concatenate([first, second + third], axis), jnp.concatenate([first + second, third], axis)


class GroupNorm(nnx.GroupNorm):
    """nnx.GroupNorm (Wu and He 2018) of [b h w channels]: means are taken of each channel first and then of a group's.

    On a processor neighbouring channels lie in one vector, and the UNet of the embedded base takes 6 % less time.
    """

    def __call__(self, x: Float[Array, "b h w c"], begin: int = 0) -> Float[Array, "b h w c"]:  # type: ignore[override]  # no mask
        """The same in the layer's dtype; statistics are float32. x may be some groups, whose channels begin there."""
        here, each = slice(begin, begin + x.shape[-1]), self.group_size
        assert self.scale is not None and self.bias is not None

        def of_group(channels: Float[Array, "b c"]) -> Float[Array, "b 1 1 c"]:
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


@dataclass(frozen=True)
class Layers:
    """Makes the layers of a model. All parameters are float32.

    Attributes:
        rngs: for the initial weights; or SHAPES.
        dtype: of the computation.
        groups, eps: of GroupNorm.
    """

    rngs: nnx.Rngs
    dtype: DTypeLike
    groups: int = 32
    eps: float = 1e-5

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> Linear:
        """[*b inputs] → [*b outputs]."""
        settings: dict[str, Any] = {"kernel_init": _fan_in, "bias_init": _zeros, "dtype": self.dtype}
        return Linear(inputs, outputs, use_bias=bias, **settings, rngs=self.rngs)

    def embed(self, count: int, width: int) -> nnx.Embed:
        """Ids [*b] below `count` → [*b width]."""
        return nnx.Embed(count, width, embedding_init=_embedding, dtype=self.dtype, rngs=self.rngs)

    def normal(self, shape: Sequence[int], deviation: float) -> nnx.Param:
        """A parameter, normally distributed."""
        return nnx.Param(_initialiser(nnx.initializers.normal(deviation))(self.rngs.params(), shape))

    def ones(self, shape: Sequence[int]) -> nnx.Param:
        """A parameter that begins with ones."""
        return nnx.Param(_ones(self.rngs.params(), shape))

    def conv(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | str | Sequence[tuple[int, int]] | None = None,
        bias: bool = True,
    ) -> Conv:
        """A convolution, [b h w inputs] → [b h2 w2 outputs]; `padding` is Flax's.

        Unless it is given, a square one of stride 1 and odd size keeps height and width. `size` is the side of a
        square, or height and width.
        """
        sizes = (size, size) if isinstance(size, int) else size
        padding = (sizes[0] - 1) // 2 if padding is None else padding
        settings: dict[str, Any] = {"kernel_init": _fan_in, "bias_init": _zeros, "dtype": self.dtype}
        settings |= {"strides": stride, "padding": padding, "use_bias": bias}
        return Conv(inputs, outputs, sizes, **settings, rngs=self.rngs)

    def statistic(self, shape: Sequence[int], value: float, dtype: DTypeLike = jnp.float32) -> nnx.BatchStat:
        """A buffer: read and written with the weights in a dtype of its own, and never trained."""
        return nnx.BatchStat(_initialiser(nnx.initializers.constant(value))(self.rngs.params(), shape, dtype))

    def layer_norm(self, width: int, eps: float = 1e-5, affine: bool = True) -> nnx.LayerNorm:
        """LayerNorm over the last axis of [*b width]; one that is not `affine` has no parameters."""
        return nnx.LayerNorm(width, epsilon=eps, use_scale=affine, use_bias=affine, **self._norm())

    def rms_norm(self, width: int, eps: float) -> nnx.RMSNorm:
        """RMSNorm (Zhang and Sennrich 2019) over the last axis of [*b width]; float32 until after the scale."""
        return nnx.RMSNorm(width, epsilon=eps, scale_init=_ones, dtype=self.dtype, rngs=self.rngs)

    def group_norm(self, channels: int, eps: float | None = None) -> GroupNorm:
        return GroupNorm(channels, self.groups, epsilon=self.eps if eps is None else eps, **self._norm())

    def _norm(self) -> dict[str, Any]:
        """Statistics are float32. Those of float32 are taken in two passes, like PyTorch's; those of numbers with 8 or
        11 bits in one, as E[x²] − E[x]², whose error is far below those numbers' own."""
        fast = jnp.dtype(self.dtype).itemsize < 4
        common = {"scale_init": _ones, "bias_init": _zeros, "dtype": self.dtype, "rngs": self.rngs}
        return common | {"use_fast_variance": fast}
