"""Devices: the mesh, the table that says how each parameter is sharded, and the compilation cache."""

import ctypes
import gc
import math
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
from ml_collections import ConfigDict

from hgdpo_jax import files, processes
from hgdpo_jax.errors import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
AXES = ("data", "fsdp", "tensor")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_ISA, _WIDTH, _JOINED = "--xla_cpu_max_isa", "--xla_cpu_prefer_vector_width", "--xla_gpu_dot_merger_threshold_mb"

# First match decides. A Linear kernel is [in, out], a Conv kernel [height, width, in, out]; a 1x1 one is split like a
# Linear. Projections into heads or hidden units are split over `tensor` by output, projections back by input, so that
# a block needs one all-reduce.
SHARDING_TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(lora_A|lora_B)$", PartitionSpec()),
    (
        r"(to_q|to_kv?|to_v|to_k_ip|to_v_ip|[qkv]_proj|proj|fc1|linear_1)\.kernel$",
        PartitionSpec("fsdp", "tensor"),
    ),
    (r"(to_out\.0|out_proj|net\.2|fc2|linear_2|proj_in|proj_out)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"conv\w*\.kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"\.embedding$", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),
)


def start() -> None:
    """Joins the other processes of a run, see :func:`hgdpo_jax.processes.start`, and turns on the persistent
    compilation cache."""
    # To trace models makes millions of objects. After each 700 Python would look for cycles among them: a tenth of the
    # time of a command that computes little.
    gc.set_threshold(20_000)
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""), _processor())
    processes.start()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = Path.home() / ".cache" / "hgdpo_jax" / "compiled"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, RuntimeError) as error:  # the latter where there is no home
            print(f"no compilation cache: {error}; set JAX_COMPILATION_CACHE_DIR to a folder", file=sys.stderr)
        else:
            jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: a command has a hundred, and they take longer to compile together than the large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def use_precision(dtype: str) -> None:
    """How exact products of float32 numbers are from now on, on every kind of device: GPUs and TPUs round them unless
    told otherwise.

    Args:
        dtype: `model.dtype`. With float32 products are float32; else they have 10 bits at least, which on GPUs is TF32
            and on TPUs three products of bfloat16: the VAE and the judges are float32 whatever the UNet is.
    """
    jax.config.update("jax_default_matmul_precision", "float32" if dtype == "float32" else "tensorfloat32")


def keep_memory(mesh: Mesh) -> None:
    """On a processor XLA takes the temporaries of a program from the C library, which takes large ones from the system
    each time and gives them back: to clear their pages is a part of every step. From now on the library keeps them.

    It keeps those over 64 MB only with `MALLOC_ARENA_MAX=1` in the environment or another allocator: benchmarks/LOG.md.
    """
    allocate = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mesh.devices.flat[0].platform == "cpu" and allocate:
        for option, value in {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}.items():
            allocate(option, value)


def _processor() -> str:
    """What Linux says of it; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def xla_flags(given: str, processor: str) -> str:
    """`XLA_FLAGS` with what programs are compiled with here.

    On Intel's processors with AVX-512 XLA complains of each that it finds in the compilation cache with a screen of
    errors, or refuses it, though it compiled it itself (jax-ml/jax#38445); compiled for AVX2 they are taken. On others
    it takes half of such a vector unless told. For GPUs XLA joins products of one input, LoRA's with its layer's:
    cutting large results apart again costs a step of SD1.5 a tenth of its memory traffic (benchmarks/LOG.md).

    Args:
        given: what the user set, which wins.
        processor: what Linux says of it.
    """
    flags = {_JOINED: "8"}  # MB
    if "avx512f" in processor:
        flags |= {_ISA: "AVX2"} if "GenuineIntel" in processor else {_WIDTH: "512"}
    return " ".join([*given.split(), *(f"{name}={value}" for name, value in flags.items() if name not in given)])


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over some devices, or over all of all processes; see `mesh` in the settings.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count or min(sizes) < 1:
        raise UserError(
            f"config key mesh: {config.data} x {config.fsdp} x {config.tensor} does not make the {count} devices here"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


def local_mesh() -> Mesh:
    """This process's own devices along `data`: work that needs no other process, such as drawing candidates."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """See :func:`hgdpo_jax.files.owned`; process 0 owns it for all, which begin and end together."""
    with files.owned(folder) if processes.first_process() else nullcontext():
        processes.together()
        yield
        processes.together()


def index_of(workdir: Path) -> files.Index:
    """The index of a run, which process 0 writes."""
    return files.Index(workdir / "content.json", keep=processes.first_process())


def in_turn(index: files.Index, work: Callable[[], Result]) -> Result:
    """The same work on every process: on process 0 first, whose index the others then read, so that they need not look
    into files themselves."""
    if processes.first_process():
        found = work()
        index.save()
        processes.together()
        return found
    processes.together()
    index.read()
    return work()


def describe(mesh: Mesh) -> str:
    """Backend, devices and mesh in words."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{jax.default_backend()}, {mesh.size} x {' and '.join(kinds)}, mesh {axes}"


def path_name(path: tuple[Any, ...]) -> str:
    """`unet.down_blocks.0.conv.kernel` for a key path of a pytree."""
    return ".".join(
        str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path if str(k) != ".value"
    )


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The table's answer for one parameter, for its last dimensions; an axis that does not divide one is left out."""
    for pattern, spec in SHARDING_TABLE:
        if re.search(pattern, name) and len(spec) <= len(shape):
            last = shape[len(shape) - len(spec) :]
            axes = [axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in zip(spec, last, strict=True)]
            return PartitionSpec(*[None] * (len(shape) - len(spec)), *axes) if axes else PartitionSpec()
    raise AssertionError("the last pattern matches everything")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each array (or ShapeDtypeStruct) of a pytree, decided by its path."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh)), tree
    )


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """Puts a parameter on the mesh as the table says: each device gets its shard and nothing else."""

    def place(name: str, value: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, partition(name, value.shape, mesh))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return place


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def heads_sharding(mesh: Mesh) -> NamedSharding:
    """Of queries, keys and values [b n heads d]: `tensor` splits the heads, as the table splits what makes them."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))


def check_batch(batch: int, mesh: Mesh, key: str) -> None:
    """Raises UserError when a batch cannot be split evenly over the data and fsdp axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise UserError(f"config key {key}={batch}: must be a multiple of {ways} (mesh.data x mesh.fsdp)")


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, or that lie on the mesh already, as the shardings say.

    `jax.device_put` does not reach devices of other processes.

    Args:
        tree: arrays of the host or of one device; PRNG keys too. A shape stays one, with its sharding.
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


def rows(batch: int, mesh: Mesh) -> Int[np.ndarray, "n"]:
    """Which rows of a batch this process's devices hold: with `mesh.tensor` across processes, several hold the same."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in held]))


def to_devices(part: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, see :func:`rows`, become its shards of global arrays."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = rows(ways, mesh)  # of rows that one device holds: those that are here

    def one(value: np.ndarray) -> jax.Array:
        size = len(value) // len(blocks)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            begin = size * int(np.searchsorted(blocks, (index[0].start or 0) // size))
            return value[begin : begin + size]

        return jax.make_array_from_callback((size * ways, *value.shape[1:]), batch_sharding(mesh), shard)

    return {name: one(value) for name, value in part.items()}


def ahead(begin: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `begin` makes of each item: it begins the next before the last is used, which it does not wait for."""
    begun: deque[Result] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on every process."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def stream_key(seed: int, *names: str | int) -> jax.Array:
    """A PRNG key that is a function of the seed and of named streams, example ids or steps, and of nothing else."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, name if isinstance(name, int) else _fnv1a(name))
    return key


def stream_keys(seed: int, stream: str, example_ids: Sequence[str], numbers: Sequence[int]) -> jax.Array:
    """`stream_key(seed, stream, id, number)` for many examples at once, [n]."""
    key = stream_key(seed, stream)
    words = np.array([[_fnv1a(i), n] for i, n in zip(example_ids, numbers, strict=True)], np.uint32)
    return jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(key, w[0]), w[1]))(words)


def _fnv1a(text: str) -> int:
    """32-bit FNV-1a: `hash()` differs between processes."""
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return value
