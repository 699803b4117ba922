"""What a compiled program needs of each device: memory, and the least time."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from jax.sharding import Mesh

from hgdpo_jax.planning.chips import Chip
from hgdpo_jax.planning.compiled import Compiled, compile_for
from hgdpo_jax.planning.estimated import estimate
from hgdpo_jax.planning.program import Program
from hgdpo_jax.planning.topologies import Topology
from hgdpo_jax.run.errors import UserError

# JAX takes this part of a GPU's memory unless a variable says otherwise; the second is the first's former name.
_JAX_TAKES, _FRACTIONS = 0.75, ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclass(frozen=True)
class Plan:
    """A program on a topology. Sizes in bytes and operations are those of one device.

    Attributes:
        topology, devices, compiler: that it was compiled for and with; without a compiler it was estimated.
        examples: pairs, photographs or images that all devices compute together.
        held, beside: see :class:`hgdpo_jax.planning.program.Program`.
        compiled: see :class:`hgdpo_jax.planning.compiled.Compiled`.
        memory: bytes that a program may fill.
        operations: floating-point operations.
        seconds: resource → least time that it takes: arithmetic, memory, interconnect.
        peaks: resource → operations or bytes a second, 0 where that is not known.
        source: of the peaks.
        dtype: of the computation, which may be another than was asked for where the devices lack that.
    """

    topology: str
    devices: int
    compiler: str
    examples: int
    held: dict[str, int]
    beside: int
    compiled: Compiled
    memory: float
    operations: float
    seconds: dict[str, float]
    peaks: dict[str, float]
    source: str
    dtype: str

    @property
    def estimated(self) -> bool:
        """Whether its compiler was missing."""
        return not self.compiler

    @property
    def total(self) -> float:
        """Bytes in memory while the program runs; infinite where the compiler refused it."""
        made = self.compiled
        return math.inf if made.refused else made.arguments + made.outputs + made.temporaries + made.code + self.beside

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        return self.total <= self.memory

    @property
    def bound(self) -> str:
        """The resource that is needed longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def rate(self, share: float) -> float:
        """Examples a second where a share of the roofline is reached."""
        return self.examples * share / self.seconds[self.bound]

    def to_json(self) -> dict[str, Any]:
        """All of it, and what follows from it."""
        total = None if self.compiled.refused else self.total
        return asdict(self) | {"estimated": self.estimated, "total": total, "fits": self.fits, "bound": self.bound}


class Largest(NamedTuple):
    """The most examples that fit on each device with one way of checkpointing, and the batch of all devices; 0, and no
    plan, where not even one fits."""

    checkpointing: str
    each: int
    batch: int
    plan: Plan | None


def plan_program(program: Program, topology: Topology, mesh: Mesh, dtype: str, examples: int) -> Plan:
    """Compiles a program, unless the same one was compiled for the same topology before, and counts what it needs.
    Where the compiler is not installed, this is estimated.

    Args:
        program: for the mesh; to be estimated, that of one of its devices.
        topology: whose devices the mesh has.
        mesh: its `tensor` axis splits products, not convolutions.
        dtype: of the computation.
        examples: that all devices compute at a time.
    """
    chip, compiler = topology.chip, topology.compiler
    made = compile_for(program.lowered, topology, program.trips) if compiler else estimate(program, chip, mesh)
    convolutions, products = program.operations
    count = convolutions / (mesh.shape["data"] * mesh.shape["fsdp"]) + products / mesh.size
    sent = sum(each["sent"] for each in (made.collectives or {}).values())
    needs = {"arithmetic": count, "memory": made.traffic, "interconnect": sent}
    peaks = {"arithmetic": chip.peak[dtype], "memory": chip.bandwidth, "interconnect": chip.interconnect}
    return Plan(
        topology=topology.name,
        devices=mesh.size,
        compiler=topology.compiler,
        examples=examples,
        held=program.held,
        beside=program.beside,
        compiled=made,
        memory=_room(chip),
        operations=count,
        seconds={resource: needs[resource] / peak if peak else 0.0 for resource, peak in peaks.items()},
        peaks=peaks,
        source=chip.source,
        dtype=dtype,
    )


def _room(chip: Chip) -> float:
    """Raises UserError where the environment gives no number for it."""
    if chip.platform != "cuda":
        return chip.memory
    name = next((name for name in _FRACTIONS if os.environ.get(name)), "")
    try:
        return float(os.environ[name]) * chip.memory if name else _JAX_TAKES * chip.memory
    except ValueError as error:
        raise UserError(f"{name}={os.environ[name]}: expects a part of a GPU's memory, such as 0.9") from error


def largest(at: Callable[[int], Plan]) -> tuple[int, Plan | None]:
    """The most examples that fit on each device, to five in a hundred, and their plan; (0, None) where not even one
    fits.

    A straight line through what two programs need says how many there is room for, and a third program tells whether
    that is right; while it is not, the line goes through the last one.

    Args:
        at: the plan for a number of examples on each device.
    """
    first, second = at(1), at(2)
    if not first.fits:
        return 0, None
    if not second.fits:
        return 1, first
    count, plan = number, tried = 2, second
    most = math.inf  # that can fit
    while True:
        if not math.isinf(tried.total):
            each = (tried.total - first.total) / (number - 1)
            # A few examples may need less than one does; then the line says nothing, and eight times as many are tried.
            line = 1 + (first.memory - first.total) / each if each > 0 else 8 * number
        number = int(min(line, most, 100 * number))
        if number <= 1.05 * count:
            return count, plan
        tried = at(number)
        if tried.fits:
            count, plan = number, tried
        else:  # a compiler that refuses does not say how much is too much
            most = number - 1 if not tried.compiled.refused else int(0.9 * number)
