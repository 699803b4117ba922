"""Frozen kernels in 8 bits: half the memory of bfloat16.

A kernel is codes of -127 to 127 and a float32 scale for each output, the largest magnitude / 127, so that each weight
is wrong by half a scale at most. It is multiplied out where a product needs it, in the dtype of the computation, and
anew for the gradient: in that dtype only one kernel at a time lies in memory. (On a processor all of them: XLA joins
there what is computed twice.)

The library qwix 0.1.8 has such kernels, but none for a convolution whose input keeps its dtype.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8


class Kernel(nnx.Module):
    """A layer whose kernel may be in 8 bits.

    Attributes:
        kernel: [*i o], int8 where there are scales.
        kernel_scale: [o].
    """

    kernel: nnx.Param
    kernel_scale: nnx.Param | None = None


def with_kernels(
    layers: Sequence[Any], dtype: DTypeLike, function: Callable[..., Array], *inputs: Array | None
) -> Array:
    """function(kernels, *inputs), with the kernels of some layers; those in 8 bits in a dtype for as long as it runs.

    The inputs decide when, so that neither another pass nor the gradient can use the same copy: it would be kept.
    """
    kernels = [layer.kernel[...] for layer in layers]
    if getattr(layers[0], "kernel_scale", None) is None:
        return function(kernels, *inputs)
    scales = [layer.kernel_scale[...] for layer in layers]

    def multiplied_out(codes: list[Array], *inputs: Array | None) -> Array:
        return function([dequantised(x, scale).astype(dtype) for x, scale in zip(codes, scales, strict=True)], *inputs)

    codes, *inputs = jax.lax.optimization_barrier((kernels, *inputs))
    return jax.checkpoint(multiplied_out)(codes, *inputs)


def quantised(kernel: Float[Array, "*b n"]) -> tuple[Int8[Array, "*b n"], Float[Array, " n"]]:
    """Codes and scales."""
    wide = kernel.astype(jnp.float32)
    scale = jnp.abs(wide).max(tuple(range(wide.ndim - 1))) / 127
    return jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def _quantised(kernel: Float[Array, "*b n"]) -> tuple[Int8[Array, "*b n"], Float[Array, " n"]]:
    """The codes lie where the kernel does."""
    return jax.jit(quantised, out_shardings=(kernel.sharding, None))(kernel)


def dequantised(codes: Int8[Array, "*b n"], scale: Float[Array, " n"]) -> Float[Array, "*b n"]:
    """The kernel, rounded; float32."""
    return codes.astype(jnp.float32) * scale


def quantise(models: Iterable[nnx.Module]) -> None:
    """Puts the kernel of every linear layer and convolution into 8 bits, in place; kernels may be shapes."""
    for model in models:
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, Kernel):
                kernel = layer.kernel.get_value()
                shape = isinstance(kernel, jax.ShapeDtypeStruct)
                codes, scale = jax.eval_shape(quantised, kernel) if shape else _quantised(kernel)
                layer.kernel, layer.kernel_scale = nnx.Param(codes), nnx.Param(scale)
