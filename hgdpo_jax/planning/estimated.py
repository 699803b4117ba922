"""What a program needs of a device whose compiler is not installed; `docs/plan.md` says how far off that is."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hgdpo_jax.models import attend
from hgdpo_jax.planning.arrays import needs, size_of
from hgdpo_jax.planning.chips import Chip
from hgdpo_jax.planning.compiled import CODE, Compiled
from hgdpo_jax.planning.program import Program, ways


def estimate(program: Program, chip: Chip, mesh: Mesh) -> Compiled:
    """What a compiler might make of a program.

    Args:
        program: of one device, see :func:`hgdpo_jax.planning.program.of_one_device`.
        chip: that it is for.
        mesh: of all devices. Of what they exchange, the gradients are counted.
    """
    begin, parts = time.perf_counter(), ways(mesh)
    with kernels_of(chip):
        traced = program.trace()
    found = needs(traced.jaxpr.jaxpr, program.trips, chip.on_chip)
    arguments = jax.tree.leaves(traced.args_info)
    results = sum(size_of(var) for var in traced.jaxpr.jaxpr.outvars)
    replaced = sum(math.prod(x.shape) * x.dtype.itemsize for x in arguments if x.donated)
    sent = {"count": 1, "bytes": program.gradients, "sent": 2 * (parts - 1) / parts * program.gradients}
    return Compiled(
        arguments=sum(program.held.values()) - program.beside,
        outputs=max(0, int(results - replaced)),
        temporaries=int(found.temporaries),
        code=CODE if chip.platform == "tpu" else 0,
        traffic=int(found.traffic),
        collectives={"all-reduce": sent} if parts > 1 and program.gradients else {},
        seconds=time.perf_counter() - begin,
    )


@contextmanager
def kernels_of(chip: Chip) -> Iterator[None]:
    """Inside, programs are traced with the attention of :mod:`hgdpo_jax.models.attend` for another device than the one
    that is here: of splash and cuDNN stands what they read and write."""
    kept, about = attend.kernel, chip.gpu
    there = SimpleNamespace(platform={"cuda": "gpu"}.get(chip.platform, chip.platform), device_kind=chip.kind)
    there.compute_capability = f"{about['major']}.{about['minor']}" if about else ""

    def kernel(device: Any, q: Any, k: Any) -> Callable:
        found = kept(there, q, k)
        return _attention if found in (attend.splash, attend.cudnn) else found

    attend.kernel = kernel
    try:
        yield
    finally:
        attend.kernel = kept


# One operation each for :mod:`hgdpo_jax.planning.arrays`, by their names. Their results have the shapes of the kernels'
# and depend on all that these read; nobody computes them.


@jax.jit
def attention_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention, and the sum of each query's softmax."""
    out = q * k.sum() * v.sum()
    return out, out[..., 0].astype(jnp.float32)


@jax.jit
def attention_kernel_gradient(*read: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x * jnp.asarray(sum(x.sum() for x in read), x.dtype) for x in read[:3])


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attention_kernel(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, sums = attention_kernel(q, k, v)
    return out, (q, k, v, out, sums)


_attention.defvjp(_forward, lambda kept, gradient: attention_kernel_gradient(*kept, gradient))
