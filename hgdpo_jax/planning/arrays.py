"""Which arrays of a traced program lie in memory, and what is read of memory and written to it.

Compilers join what is computed number by number with what reads it, and with the product or convolution that it reads.
So an array is taken to lie in memory where

- a sum, a loop or a kernel of attention gives it, or a product that something else reads than such a computation,
- a product, a loop or a kernel of attention reads it,
- it is read more than once, and holds fewer bytes than what it is computed from, or a product is joined with it.

Everything else is computed again by whatever reads it. Operations run in the order of the trace.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.extend
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

KERNEL = "attention_kernel"  # jitted functions whose names begin so are one operation
_CALLS = ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
_PRODUCTS, _OTHERS = ("dot_general", "conv_general_dilated"), ("sort", "scatter-add", "cumsum")
_SUMS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin")
_PIECES = ("slice", "dynamic_slice", "gather", "split")
# The same bytes under another name, or in the order in which the next product reads them.
_VIEWS = ("reshape", "squeeze", "transpose", "copy", "stop_gradient", "optimization_barrier")


class Needs(NamedTuple):
    """Bytes: what lies in memory at once beside arguments and results, and what is read of memory and written to it."""

    temporaries: float
    traffic: float


@dataclass(eq=False)
class _Array:
    """An array of a program.

    Attributes:
        size: bytes.
        kept: whether it lies in memory.
        given: whether it is an argument or a result of the program, for which others have room.
        prepared: whether it is computed number by number from arguments alone.
        reads: how often it is read.
        by_elements: whether only operations that compute number by number read it.
        sources: kept array → bytes that are read of it to compute this one, where it is not kept.
        joined: whether a product is part of that, which nothing computes twice.
    """

    size: float
    kept: bool = False
    given: bool = False
    prepared: bool = False
    reads: int = 0
    by_elements: bool = True
    joined: bool = False
    sources: dict["_Array", float] = field(default_factory=dict)

    @property
    def read(self) -> dict["_Array", float]:
        """Kept array → bytes that are read of it where this one is read."""
        return {self: self.size} if self.kept else self.sources


class _Operation(NamedTuple):
    """An operation: `kind` as in :func:`_kind`; `inside`: what a loop needs while it runs, over all its turns."""

    kind: str
    inputs: list[_Array]
    outputs: list[_Array]
    inside: Needs


class _Step(NamedTuple):
    """An operation that reads or writes memory.

    Attributes:
        operation: the last of those that are joined.
        reads: kept array → bytes that are read of it.
        writes: kept arrays.
        in_place: whether results may take the place of what they are computed from.
    """

    operation: _Operation
    reads: dict[_Array, float]
    writes: list[_Array]
    in_place: bool


def needs(jaxpr: Jaxpr, trips: int = 1, on_chip: float = 0.0) -> Needs:
    """What a program needs.

    Args:
        jaxpr: of a traced program.
        trips: turns of loops whose number of turns is an argument of the program.
        on_chip: see :class:`hgdpo_jax.planning.chips.Chip`.
    """
    program = _Program(trips, on_chip)
    results = program.add(jaxpr, [_argument(var) for var in jaxpr.invars], {})
    steps = _steps(_used(program.operations, results))
    return Needs(_most(steps), _traffic(steps, on_chip))


@dataclass
class _Program:
    """The operations of a program, in their order; `trips` and `on_chip` as in :func:`needs`."""

    trips: int
    on_chip: float
    operations: list[_Operation] = field(default_factory=list)

    def add(self, jaxpr: Jaxpr, inputs: Sequence[_Array], seen: dict[Any, list[_Array]]) -> list[_Array]:
        """Adds the operations of a jaxpr and of the functions that it calls; its results.

        `seen` are operations that were added: a compiler computes the same thing once, except what a checkpoint asks
        for again. Weights are cast or stacked where they are used, and lie there no longer.
        """
        arrays: dict[Var, _Array] = dict(zip(jaxpr.invars, inputs, strict=True))
        arrays |= {var: _argument(var) for var in jaxpr.constvars}
        for equation in jaxpr.eqns:
            read = [_Array(0) if isinstance(atom, Literal) else arrays[atom] for atom in equation.invars]
            arrays |= zip(equation.outvars, self._results(equation, read, seen), strict=True)
        return [_Array(0) if isinstance(atom, Literal) else arrays[atom] for atom in jaxpr.outvars]

    def _results(self, equation: JaxprEqn, read: list[_Array], seen: dict[Any, list[_Array]]) -> list[_Array]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS and not _is_kernel(equation):
            (inner,) = jax.extend.core.jaxprs_in_params(params)
            return self.add(inner, read, {} if params.get("differentiated") else seen)
        if name == "cond":  # of a choice by platform the last is for every other than those that are named
            return self.add(params["branches"][-1].jaxpr, read[1:], seen)
        if name in _VIEWS:
            return read
        literals = [str(atom) for atom in equation.invars if isinstance(atom, Literal)]
        key = (name, *(id(x) for x in read if x.size), *literals, str(params))
        kind = _kind(equation)
        prepared = kind == "element" and all(array.prepared for array in read if array.size)
        if key not in seen or prepared:
            seen[key] = [_Array(size_of(var), prepared=prepared) for var in equation.outvars]
            self.operations.append(_Operation(kind, read, seen[key], self._inside(equation)))
        return seen[key]

    def _inside(self, equation: JaxprEqn) -> Needs:
        name, params = equation.primitive.name, equation.params
        if name not in ("scan", "while"):
            return Needs(0, 0)
        body, turns = (params["jaxpr"], params["length"]) if name == "scan" else (params["body_jaxpr"], self.trips)
        once = needs(body.jaxpr, self.trips, self.on_chip)
        return Needs(once.temporaries, turns * once.traffic)


def _argument(var: Var) -> _Array:
    return _Array(size_of(var), kept=True, given=True, prepared=True)


def _kind(equation: JaxprEqn) -> str:
    """`product`: reads memory; `kernel`: reads and writes it; `sum`: computes what it reads as it goes; `piece`: reads
    as much as it gives; `loop`: `inside` is what it reads and writes; `element`: computes number by number."""
    name = equation.primitive.name
    if name in _PRODUCTS or name in _OTHERS or _is_kernel(equation):
        return "product" if name in _PRODUCTS else "kernel"
    if name in ("scan", "while"):
        return "loop"
    return "sum" if name in _SUMS else "piece" if name in _PIECES else "element"


def _used(operations: Sequence[_Operation], results: Sequence[_Array]) -> list[_Operation]:
    """The operations that results depend on. Says of each array how often it is read, and keeps what has to be kept."""
    for result in results:
        result.kept = result.given = True
    used = []
    for operation in reversed(operations):
        if not any(output.reads or output.given for output in operation.outputs):
            continue
        used.append(operation)
        for array in {*operation.inputs}:
            array.reads += 1
            array.by_elements &= operation.kind == "element"
            array.kept |= operation.kind in ("product", "kernel", "loop")
        for array in operation.outputs:
            array.joined = operation.kind == "product" and array.reads == 1 and array.by_elements
            array.kept |= operation.kind in ("product", "kernel", "sum", "loop") and not array.joined
    return used[::-1]


def _steps(operations: Sequence[_Operation]) -> list[_Step]:
    """The operations that read or write memory, in order. Keeps what is cheaper to keep than to compute again."""
    steps = []
    for operation in operations:
        reads: dict[_Array, float] = {}
        for array in operation.inputs:
            for source, size in array.read.items():
                reads[source] = max(reads.get(source, 0), size)
        if operation.kind == "piece":
            reads = {source: min(size, operation.outputs[0].size) for source, size in reads.items()}
        again = sum(size for source, size in reads.items() if not source.given)
        joined = sum(array.joined and not array.kept for array in {*operation.inputs})
        for output in operation.outputs:
            output.sources, output.joined = reads, output.joined or joined > 0
            output.kept |= output.reads > 1 and (joined > 0 or output.size < again)
            output.kept |= joined > 1 or (joined > 0 and not output.by_elements)
        writes = [output for output in operation.outputs if output.kept]
        if writes:
            steps.append(_Step(operation, reads, writes, operation.kind == "element" and not joined))
    return steps


def _most(steps: Sequence[_Step]) -> float:
    """Bytes that lie in memory at once."""
    last = {array: place for place, step in enumerate(steps) for array in step.reads}
    live = most = 0.0
    for place, (operation, reads, writes, in_place) in enumerate(steps):
        made = sum(array.size for array in writes if not array.given)
        freed = sum(array.size for array in reads if not array.given and last[array] == place)
        shared = min(made, freed) if in_place else 0
        most = max(most, live + made - shared + operation.inside.temporaries)
        live += made - freed
    return most


class _OnChip:
    """The arrays that a chip holds beside its memory; those that were used longest ago make room for others."""

    def __init__(self, room: float) -> None:
        self._room = room
        self._arrays: dict[_Array, bool] = {}  # used longest ago first → whether memory has it too

    def use(self, array: _Array) -> bool:
        """Whether an array is there, which is then the one used last."""
        found = array in self._arrays
        if found:
            self._arrays[array] = self._arrays.pop(array)
        return found

    def put(self, array: _Array, in_memory: bool) -> None:
        self._arrays[array] = in_memory
        self._room -= array.size

    def drop(self, array: _Array) -> None:
        if self._arrays.pop(array, None) is not None:
            self._room += array.size

    def make_room(self) -> Iterator[_Array]:
        """Takes away what there is no room for; of that what memory does not have."""
        while self._room < 0:
            array, in_memory = next(iter(self._arrays.items()))
            self.drop(array)
            if not in_memory:
                yield array

    def only_here(self) -> list[_Array]:
        """What memory does not have."""
        return [array for array, in_memory in self._arrays.items() if not in_memory]


def _traffic(steps: Sequence[_Step], on_chip: float) -> float:
    """Bytes that are read of memory and written to it. Of sums that follow each other one reads for all."""
    to_come = Counter(array for step in steps for array in step.reads)
    chip, total = _OnChip(on_chip), 0.0
    summed: set[_Array] = set()
    for operation, reads, writes, _ in steps:
        loop = operation.kind == "loop"
        total += operation.inside.traffic
        summed = summed if operation.kind == "sum" else set()
        for array, size in reads.items():
            if not chip.use(array) and not loop and array not in summed:
                total += size
                if size == array.size:
                    chip.put(array, in_memory=True)
            if operation.kind == "sum":
                summed.add(array)
            to_come[array] -= 1
            if not to_come[array] and not array.given:
                chip.drop(array)
        for array in writes:
            chip.put(array, in_memory=loop)
        total += sum(array.size for array in chip.make_room() if to_come[array] or array.given)
    return total + sum(array.size for array in chip.only_here() if array.given)


def size_of(var: Var) -> float:
    """Bytes of an array of a jaxpr."""
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize  # type: ignore[attr-defined]  # of a ShapedArray


def _is_kernel(equation: JaxprEqn) -> bool:
    return str(equation.params.get("name", "")).startswith(KERNEL)
