"""Arrays from hosts to devices and back, in one process or in several."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from hgdpo_jax.devices.sharding import batch_sharding

Item = TypeVar("Item")
Result = TypeVar("Result")


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays where shardings say: on devices of other processes too, which `jax.device_put` does not reach.

    Args:
        tree: arrays that every process holds whole, or that lie on the mesh already; PRNG keys too. A shape stays a
            shape, with its sharding.
        shardings: one for all, or a pytree of them.
    """

    def one(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x), sharding))
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: one(x, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def local_rows(batch: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch this process's devices hold: with `mesh.tensor` across processes, several hold the same."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for index in held if index for row in range(batch)[index[0]]})


def to_devices(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Makes global arrays, split over data and fsdp, of the rows that this process holds, see :func:`local_rows`."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = local_rows(ways, mesh)  # of rows that one device holds: those of this process

    def one(value: np.ndarray) -> Array:
        size = len(value) // len(blocks)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            block = (index[0].start or 0) // size if index else 0
            begin = size * int(np.searchsorted(blocks, block))
            return value[begin : begin + size]

        return jax.make_array_from_callback((size * ways, *value.shape[1:]), batch_sharding(mesh), shard)

    return {name: one(value) for name, value in rows.items()}


def one_ahead(begin: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `begin(item)` for each item, one late: the next is begun before the last is used, so that devices compute
    one while the host works on the other."""
    begun: deque[Result] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


def to_host(array: Array | np.ndarray) -> np.ndarray:
    """The whole array, on every process."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
