"""Tuning of the host's processor, in one place: Python's garbage collector and the C library's memory."""

import ctypes
import gc

from jax.sharding import Mesh

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def collect_rarely() -> None:
    """Python looks for garbage after 20,000 new objects instead of 700: a traced model has millions of objects and
    little garbage. To trace the step of SD1.5 takes 12.6 s of a processor instead of 16.2."""
    gc.set_threshold(20_000)


def keep_memory(mesh: Mesh) -> None:
    """Has glibc keep the memory that XLA frees, where the mesh is of processors; other devices are left alone.

    XLA takes the temporaries of each step from the C library, which takes large ones from the system each time: to
    clear their pages is 7 % of a step of SD1.5. Those over 64 MB are kept only with `MALLOC_ARENA_MAX=1` in the
    environment or another allocator: benchmarks/LOG.md.
    """
    allocate = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mesh.devices.flat[0].platform == "cpu" and allocate:
        for option, value in {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}.items():
            allocate(option, value)
