"""Tuning for one kind of device: a processor with the C library of GNU. Other devices are left alone."""

import ctypes

from jax.sharding import Mesh

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory(mesh: Mesh) -> None:
    """On a processor XLA takes the temporaries of a program from the C library, which takes large ones from the system
    each time and gives them back: to clear their pages is a part of every step. From now on the library keeps them.

    It keeps those over 64 MB only with `MALLOC_ARENA_MAX=1` in the environment or another allocator: benchmarks/LOG.md.
    """
    allocate = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mesh.devices.flat[0].platform == "cpu" and allocate:
        for option, value in {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}.items():
            allocate(option, value)
