"""softmax(q kᵀ / √d) v, by the kernel that each kind of device has for it.

| device | tokens | heads | numbers | kernel |
|---|---|---|---|---|
| TPU | from 1024 queries and keys | any | float32, bfloat16 | splash, in Pallas |
| TPU | from 4096 queries | any | any | XLA, the probabilities computed again |
| NVIDIA since Ampere | from 512 queries | multiples of 8 up to 128 wide | float16, bfloat16 | cuDNN |
| processor | where the probabilities fit | any | float32 | XLA, divided by the softmax's sums last |
| any | else | any | any | XLA, of more than 1024 keys some queries at a time |

Splash and cuDNN hold no probabilities in memory. With fewer tokens they save little memory; with a text's few keys
splash is slow, and XLA computes the probabilities again for the gradient instead of writing and reading them. (SDXL at
1024×704 has most of its layers at 704 tokens; SD1.5 at 512×512 has heads of 160 at 256 tokens.)

Legend: `b n heads d` queries, `b m heads d` keys and values.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

Queries = Float[Array, "b n heads d"]
Keys = Float[Array, "b m heads d"]
_Grouped = Float[Array, "b m groups d"]
_Sized = Array | jax.ShapeDtypeStruct
_SPLASH, _RECOMPUTED, _CUDNN = 1024, 4096, 512  # tokens from which each is taken
# XLA may hold 256 MB of probabilities at once on a device, in float32. With as few keys as these they take no more than
# what a layer holds beside them, and are all computed at once.
_PROBABILITIES, _FEW_KEYS = 2**26, 1024
# Splash: a block is a multiple of the lanes. Each block of keys starts again, and writes its own part of the queries'
# gradient: it is as large as fits on the chip, where a kernel gets 16 MiB. Queries and products need so much of it, by
# bytes of a number, forwards and for the gradient, as libtpu 0.0.42 compiles them:
_LANES, _BLOCK, _ON_CHIP = 128, 512, 16.0
_PRODUCTS = {2: (2.5, 6.75), 4: (8.0, 12.25)}


def attend(q: Queries, k: Keys, v: Keys, sharding: NamedSharding | None = None) -> Queries:
    """softmax(q kᵀ / √d) v for each head; the softmax is float32.

    Args:
        q, k, v: of one dtype.
        sharding: that of the three on a mesh: each device computes its part. An axis that does not divide its dimension
            is left out.
    """
    if sharding is None:
        return kernel(jax.devices()[0], q, k)(q, k, v)
    mesh, spec = sharding.mesh, (fitted := fitting(sharding, q.shape)).spec
    q_part, k_part = (jax.ShapeDtypeStruct(fitted.shard_shape(x.shape), x.dtype) for x in (q, k))
    found = kernel(mesh.devices.flat[0], q_part, k_part)
    if mesh.size == 1 or found in (xla, recomputed, divided_last):  # which the compiler splits by itself
        return found(q, k, v)
    # A Pallas kernel does not tell replicated from varying values.
    return jax.shard_map(found, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def fitting(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same without the axes that do not divide their dimension."""
    mesh = sharding.mesh
    axes = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
    ways = [math.prod(mesh.shape[axis] for axis in some) for some in axes]
    spec = (some if n % w == 0 else None for some, n, w in zip(axes, shape, ways, strict=False))
    return NamedSharding(mesh, PartitionSpec(*spec))


def kernel(
    device: Any, q: Float[_Sized, "b n heads d"], k: Float[_Sized, "b m heads d"]
) -> Callable[[Queries, Keys, Keys], Queries]:
    """The kernel of the table above for what one device computes. The device may be described, or anything that has
    its platform, device_kind and compute_capability; q and k may be shapes."""
    n, m, width = q.shape[1], k.shape[1], q.shape[3]
    if device.platform == "tpu" and min(n, m) >= _SPLASH and q.dtype != jnp.float16:  # Mosaic loads no such vectors
        return splash
    suits = q.dtype in (jnp.float16, jnp.bfloat16) and width % 8 == 0 and width <= 128
    if suits and n >= _CUDNN and device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8:
        return cudnn
    if m > _FEW_KEYS and _chunks(q, k) > 1:
        return in_chunks
    if device.platform == "cpu" and q.dtype == jnp.float32:
        return divided_last
    return recomputed if device.platform == "tpu" and n >= _RECOMPUTED else xla


def xla(
    q: Queries, k: _Grouped, v: _Grouped, is_causal: bool = False, mask: Bool[Array, "b m"] | None = None
) -> Queries:
    """JAX's own attention; with `is_causal` a query sees the keys up to its own place, with `mask` those of its row
    where it is true. A head of keys and values may serve several of queries, one after the other."""
    seen = None if mask is None else mask[:, None, None]
    own = partial(jax.nn.dot_product_attention, is_causal=is_causal, mask=seen)

    def wide(*inputs: Array) -> Array:
        return own(*(x.astype(jnp.float32) for x in inputs)).astype(jnp.float16)

    # A processor has no products of float16 with float32 sums.
    return jax.lax.platform_dependent(q, k, v, cpu=wide, default=own) if q.dtype == jnp.float16 else own(q, k, v)


def divided_last(q: Queries, k: Keys, v: Keys) -> Queries:
    """Like :func:`xla` with fewer passes over the probabilities: √d divides the queries, and the softmax's sums divide
    the output. Keys and values are transposed here, so that XLA sees where that was done before a loop."""
    q, k, v = q.swapaxes(1, 2), k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    logits = (q * q.shape[-1] ** -0.5) @ k
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return (weights @ v / weights.sum(-1, keepdims=True)).swapaxes(1, 2)


def splash(q: Queries, k: Keys, v: Keys, interpret: bool = False) -> Queries:
    """Pallas' kernel for TPUs; tokens are padded to a multiple of 128.

    Args:
        q, k, v: as for :func:`attend`.
        interpret: runs on any device, slowly.
    """
    (_, n, heads, width), m = q.shape, k.shape[1]
    padded = n + -n % _LANES, m + -m % _LANES
    about = padded[1], width, q.dtype.itemsize
    block_q, forward, backward = _divisor(padded[0]), _keys(*about, gradient=False), _keys(*about, gradient=True)
    sizes = pallas.BlockSizes(
        block_q=block_q,
        block_kv=forward[1],
        block_kv_compute=forward[0],
        block_q_dkv=block_q,
        block_kv_dkv=backward[1],
        block_kv_dkv_compute=backward[0],
        use_fused_bwd_kernel=True,
        # Tokens fill the lanes, where a head of 40 would be padded to 128.
        **{f"{x}_layout": pallas.QKVLayout.SEQ_MINOR for x in "qkv"},
    )
    mask = pallas.MultiHeadMask([pallas.FullMask(padded)] * heads)
    run = pallas.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    # A query attends to the keys of its own segment: the padding is another segment.
    segments = pallas.SegmentIds(jnp.zeros(padded[0], jnp.int32), (jnp.arange(padded[1]) >= m).astype(jnp.int32))
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, size in ((q * width**-0.5, padded[0]), (k, padded[1]), (v, padded[1]))
    )
    batched = jax.vmap(lambda *one: run(*one, segment_ids=None if padded[1] == m else segments))
    return _own_precision(batched)(q, k, v).swapaxes(1, 2)[:, :n]


def _own_precision(function: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    """The same function and gradient at JAX's highest or default precision: Pallas' kernels for TPUs know no other, and
    :func:`hgdpo_jax.devices.xla.use_precision` may ask for one between."""

    def precision(x: Array) -> AbstractContextManager:
        return jax.default_matmul_precision("float32" if x.dtype == jnp.float32 else "default")

    def forward(*inputs: Array) -> tuple[Array, Callable]:
        with precision(inputs[0]):
            return jax.vjp(function, *inputs)

    def backward(gradient: Callable, out: Array) -> tuple[Array, ...]:
        with precision(out):
            return gradient(out)

    @jax.custom_vjp
    def function_at(*inputs: Array) -> Array:
        with precision(inputs[0]):
            return function(*inputs)

    function_at.defvjp(forward, backward)
    return function_at


def _divisor(tokens: int) -> int:
    """The largest block of a product that divides the tokens."""
    return max(x for x in range(_LANES, _BLOCK + 1, _LANES) if tokens % x == 0)


def _keys(m: int, width: int, size: int, gradient: bool) -> tuple[int, int]:
    """(keys in a block of a product, keys in the block on the chip): the second is as large as fits, a multiple of the
    first.

    Args:
        m: number of keys, a multiple of the lanes.
        width: of a head.
        size: bytes of a number.
        gradient: the chip also holds padded gradients and their sums in float32; without, it holds logits in float32.
    """
    padded = width + -width % _LANES

    def fits(keys: int) -> bool:
        copies = 1 if keys == m else 2  # the next block is on its way
        each = 2 * copies * size * (width + padded) + 8 * padded if gradient else 2 * copies * size * width + 4 * _BLOCK
        return keys * each / 2**20 + _PRODUCTS[size][gradient] <= _ON_CHIP

    products = [x for x in range(_LANES, _BLOCK + 1, _LANES) if m % x == 0]
    found = [(keys, x) for x in products for keys in range(x, m + 1, x) if m % keys == 0 and fits(keys)]
    return max(found, default=(products[-1],) * 2)[::-1]


def cudnn(q: Queries, k: Keys, v: Keys) -> Queries:
    """cuDNN's kernel, which needs an even number of keys: text has 77."""
    (b, m), more = k.shape[:2], -k.shape[1] % 8
    if not more:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (k, v))
    lengths = jnp.full(b, m, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def recomputed(q: Queries, k: Keys, v: Keys) -> Queries:
    """Like :func:`xla`, but no probabilities are kept: the gradient computes them again."""
    return jax.checkpoint(xla)(q, k, v)


def in_chunks(q: Queries, k: Keys, v: Keys) -> Queries:
    """Like :func:`recomputed`, some queries at a time."""
    (b, n, heads, width), chunks = q.shape, _chunks(q, k)
    parts = q.reshape(b, chunks, n // chunks, heads, width).swapaxes(0, 1)
    found = jax.lax.map(lambda part: recomputed(part, k, v), parts)
    return found.swapaxes(0, 1).reshape(q.shape)


def _chunks(q: Float[_Sized, "b n heads d"], k: Float[_Sized, "b m heads d"]) -> int:
    """The number of parts of the queries with which XLA holds few enough probabilities."""
    (b, n, heads, _), m = q.shape, k.shape[1]
    return next(c for c in range(1, n + 1) if n % c == 0 and (b * heads * (n // c) * m <= _PROBABILITIES or c == n))
