"""AdamW whose two moments take 8 bits a number (Dettmers et al. 2022): a quarter of the memory.

A moment is kept as codes, and as the largest magnitude of each block of some numbers of a row, float32. The first
moment, of either sign, is largest · (code / 127)², which is fine near zero. The second is largest · 2^(24 (code / 255 −
1)): each code is 7 % above the one before, and none is zero, for its root divides. (The paper's code is a table, which
a TPU would read number by number.) Both are sharded as their parameter is.

A number is rounded up or down at random, so that the mean is exact: the second moment decays by a thousandth a step,
and the nearest code would be the same for ever. The step's number is the seed: a run goes on to the same bits.

No JAX library keeps such states: optax, which has all else, keeps those of Adam in a floating-point dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer, PyTree

LARGEST_BLOCK = 256
SMALLEST = 4096  # numbers: smaller parameters, such as norms and biases, keep float32
OCTAVES = 24  # of the second moment: a root of 1 / 4096 of the block's largest is the smallest


class Adam8bit(NamedTuple):
    """The state: how many steps were taken; codes and blocks' largest magnitudes of both moments, named as theirs."""

    steps: Int[Array, ""]
    mu: PyTree
    mu_largest: PyTree
    nu: PyTree
    nu_largest: PyTree


def adamw_8bit(b1: float, b2: float, weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """As optax.adamw with a rate of 1."""

    def of_size(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: "large" if x.size >= SMALLEST else "small", params)

    kinds = {"large": scale_by_adam_8bit(b1, b2), "small": optax.scale_by_adam(b1, b2)}
    return optax.chain(
        optax.partition(kinds, of_size), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(1.0)
    )


def scale_by_adam_8bit(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """As optax.scale_by_adam, which computes with moments that are not rounded yet."""

    def init(params: PyTree) -> Adam8bit:
        def codes(dtype: DTypeLike) -> PyTree:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), params)

        def largest() -> PyTree:
            return jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], x.shape[-1] // _block(x.shape[-1]))), params)

        return Adam8bit(jnp.int32(0), codes(jnp.int8), largest(), codes(jnp.uint8), largest())

    def update(gradient: PyTree, state: Adam8bit, params: PyTree = None) -> tuple[PyTree, Adam8bit]:
        del params
        count = state.steps + 1
        step_key = jax.random.fold_in(jax.random.key(0), count)

        def one(number: int, g: Array, mu: Array, mu_largest: Array, nu: Array, nu_largest: Array) -> list[Array]:
            """The update of a parameter, and its new moments."""
            m = b1 * decoded(mu, mu_largest) + (1 - b1) * g
            v = b2 * decoded(nu, nu_largest) + (1 - b2) * g**2
            up = _uniform(jax.random.bits(jax.random.fold_in(step_key, number)), g.shape)
            updated = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            return [updated, *encoded(m, up, jnp.int8), *encoded(v, up, jnp.uint8)]

        leaves, structure = jax.tree.flatten(gradient)
        found: list[list[Array]] = []
        for number, (g, *kept) in enumerate(zip(leaves, *map(jax.tree.leaves, state[1:]), strict=True)):
            if found:  # one after the other: else the moments of all of them would lie in memory in float32
                g, found[-1] = jax.lax.optimization_barrier((g, found[-1]))
            found.append(one(number, g, *kept))
        updates, *moments = (jax.tree.unflatten(structure, x) for x in zip(*found, strict=True))
        return updates, Adam8bit(count, *moments)

    return optax.GradientTransformation(init, update)


def _uniform(seed: Array, shape: Sequence[int]) -> Array:
    """Numbers in [0, 1), each a hash of its place (Wellons' lowbias32): those of JAX would have to lie in memory."""
    x, stride = seed, 1
    for axis in reversed(range(len(shape))):
        x = x + jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x ^ (x >> 15)).astype(jnp.uint32) // 256 * jnp.float32(2.0**-24)


def _block(width: int) -> int:
    """The numbers of a block: as many as divide a row."""
    return next(size for size in range(min(width, LARGEST_BLOCK), 0, -1) if width % size == 0)


def encoded(
    x: Float[Array, "*b n"], up: Float[Array, "*b n"], dtype: DTypeLike
) -> tuple[Integer[Array, "*b n"], Float[Array, "*b k"]]:
    """Codes, and the largest magnitude of each block.

    Args:
        x: numbers; for uint8 none is negative.
        up: uniform in [0, 1): below the share of the way to the next code, a number is rounded to that.
        dtype: int8 or uint8.
    """
    blocks = x.reshape(*x.shape[:-1], -1, _block(x.shape[-1]))
    largest = jnp.abs(blocks).max(-1)
    ratio = jnp.abs(blocks) / jnp.where(largest == 0, 1, largest)[..., None]
    if dtype == jnp.int8:
        below = jnp.floor(127 * jnp.sqrt(ratio))
    else:
        below = jnp.maximum(jnp.floor(255 + 255 / OCTAVES * jnp.log2(ratio)), 0)
    begin, end = (_ratio(code, dtype) for code in (below, below + 1))
    code = jnp.minimum(below + (up.reshape(blocks.shape) < (ratio - begin) / (end - begin)), jnp.iinfo(dtype).max)
    return jnp.where(blocks < 0, -code, code).astype(dtype).reshape(x.shape), largest


def decoded(codes: Integer[Array, "*b n"], largest: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
    """The numbers of :func:`encoded`, rounded."""
    blocks = codes.reshape(*largest.shape, -1)
    sign = jnp.sign(blocks) if codes.dtype == jnp.int8 else 1
    return (sign * _ratio(jnp.abs(blocks), codes.dtype) * largest[..., None]).reshape(codes.shape)


def _ratio(code: Array, dtype: DTypeLike) -> Array:
    """What a code without its sign is of its block's largest magnitude."""
    if dtype == jnp.int8:
        return (code.astype(jnp.float32) / 127) ** 2
    return jnp.exp2(OCTAVES * (code.astype(jnp.float32) / 255 - 1))
