"""Random streams: a key is a function of a seed and of names, and of nothing else."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Key


def stream_key(seed: int, *names: str | int) -> Key[Array, ""]:
    """The key of a stream, which names, example ids or steps tell from the others."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, name if isinstance(name, int) else _fnv1a(name))
    return key


def stream_keys(seed: int, stream: str, example_ids: Sequence[str], numbers: Sequence[int]) -> Key[Array, "n"]:
    """`stream_key(seed, stream, id, number)` for many examples at once."""
    key = stream_key(seed, stream)
    words = np.array([[_fnv1a(i), n] for i, n in zip(example_ids, numbers, strict=True)], np.uint32)
    return jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(key, w[0]), w[1]))(words)


def _fnv1a(text: str) -> int:
    """32-bit FNV-1a: `hash()` differs between processes."""
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return value
