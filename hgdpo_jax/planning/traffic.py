"""What an optimised program moves: bytes between a chip and its memory, and between chips."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hgdpo_jax.planning.hlo import Computation, HloModule, Instruction, size

_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATE = "dynamic-update-slice"
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_WITH_OPERANDS = ("all-gather-start", "collective-permute-start")  # whose type names operands beside results
# They name values, or are counted where their other half is.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "copy-start", "slice-start", "async-update", "async-done", "add-dependency", "domain"}


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between chips, over a whole program.

    Attributes:
        count: how often it runs.
        bytes: of what is exchanged, as each chip holds all of it (all-gather: afterwards; reduce-scatter: before).
        sent: bytes that each chip sends, as a ring of the chips that take part does it.
    """

    count: int
    bytes: int
    sent: float


def memory_traffic(module: HloModule) -> int:
    """Bytes between the chip and its memory: what each kernel, copy, prefetch or exchange reads and writes there.

    Where a kernel only cuts a piece out of a value, or writes one into it, the piece counts.
    """
    total = 0
    for computation, instruction, times in module.executed(module.entry):
        if instruction.opcode in _FREE or _kind(instruction) or instruction.is_kernel("AllocateBuffer"):
            continue
        reader = instruction
        if instruction.opcode.endswith("-done"):
            reader = computation.instructions[instruction.operands[0]]
        read = sum(_read(module, computation, reader, position) for position in range(len(reader.operands)))
        total += times * (read + _written(module, computation, instruction))
    for computation, instruction, _, times in _exchanges(module):
        types = [instruction.type]
        if instruction.opcode not in _WITH_OPERANDS:
            types += [computation.instructions[name].type for name in instruction.operands]
        total += times * sum(size(type_, memory=True) for type_ in types)
    return total


def collectives(module: HloModule) -> dict[str, Collective]:
    """Exchanges between the chips, by kind, in loops as often as they run."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    for computation, instruction, kind, times in _exchanges(module):
        whole = sum(size(computation.instructions[name].type) for name in instruction.operands)
        chips = _group(instruction.attributes, module.devices)
        if kind == "all-gather":
            whole *= chips
        others = (chips - 1) / chips
        sent = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(kind, others) * whole
        if sent:
            found.setdefault(kind, []).append((times, times * whole, times * sent))
    return {kind: Collective(*map(sum, zip(*each, strict=True))) for kind, each in sorted(found.items())}


def _read(module: HloModule, computation: Computation, instruction: Instruction, position: int) -> int:
    """Bytes that an instruction reads of one operand in memory."""
    operand = computation.instructions[instruction.operands[position]]
    full = size(operand.type, memory=True)
    if not full or (instruction.opcode == _UPDATE and position == 0):
        return 0
    if instruction.opcode == "slice-start":
        pieces = [user for user, _ in computation.users[instruction.name] if user.opcode == "slice-done"]
        return sum(size(piece.type) for piece in pieces)
    if instruction.opcode in _SLICES and position == 0:
        return min(full, size(instruction.type))
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")]
        return min(full, _used(module, fused, fused.parameters[position]))
    return full


def _used(module: HloModule, fused: Computation, value: Instruction) -> int:
    """Bytes of a value that a fusion reads."""
    total = 0
    for user, position in fused.users[value.name]:
        if user.opcode == "bitcast":
            total += _used(module, fused, user)
        elif user.opcode in _SLICES and position == 0:
            total += size(user.type)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            total += _used(module, inner, inner.parameters[position])
        elif user.opcode != "tuple" and not _kind(user) and (user.opcode != _UPDATE or position):
            total += size(value.type, memory=True)
    return total


def _written(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction writes to memory: of a tuple what is read later, which leaves workspaces out."""
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")]
        names = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        return sum(_result(fused, fused.instructions[name]) for name in names)
    if instruction.type.startswith("(") and instruction.name != computation.root.name:
        users = (user for user, _ in computation.users[instruction.name])
        parts = {user.called("index"): user.type for user in users if user.opcode == "get-tuple-element"}
        return sum(size(type_, memory=True) for type_ in parts.values())
    return _result(computation, instruction)


def _result(computation: Computation, instruction: Instruction) -> int:
    """Bytes of one result in memory: nothing where it is what was given, or what a collective wrote."""
    full = size(instruction.type, memory=True)
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "parameter" or _kind(instruction) or instruction.is_kernel("AsyncCollective"):
        return 0
    if instruction.opcode == _UPDATE:
        return min(full, size(computation.instructions[instruction.operands[1]].type))
    return full


def _exchanges(module: HloModule) -> Iterator[tuple[Computation, Instruction, str, int]]:
    """Each collective, where it stands, its kind and how often it runs. One that runs beside several kernels stands in
    the fusion of each of them."""
    seen: set[str] = set()
    for outer, instruction, times in module.executed(module.entry):
        for computation, inner in _inside(module, outer, instruction):
            kind = _kind(inner)
            channel = inner.called("channel_id") or inner.name
            if not kind or inner.opcode.endswith("-done") or (computation is not outer and channel in seen):
                continue
            seen.add(channel)
            cut = computation is not outer and computation.root.opcode in ("dynamic-slice", "bitcast")
            yield computation, inner, "reduce-scatter" if kind == "all-reduce" and cut else kind, times


def _inside(
    module: HloModule, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or those of its fusion."""
    if instruction.opcode != "fusion":
        yield computation, instruction
        return
    fused = module.computations[instruction.called("calls")]
    for inner in fused.instructions.values():
        yield from _inside(module, fused, inner)


def _group(attributes: str, devices: int) -> int:
    """Chips that exchange with each other: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['a'=2,'b'=2] … {'a'}`; all where
    there are no groups."""
    found = re.search(r"replica_groups=(\{\{[\d,]*\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})", attributes)
    if not found:
        return devices
    if found[3]:
        return int(found[3])
    if found[4]:
        sizes = dict(re.findall(r"('[^']+')=(\d+)", found[4]))
        axes = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", found[5])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return found[1].count(",") + 1


def _kind(instruction: Instruction) -> str:
    """Kind of a collective; empty for any other instruction."""
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in _COLLECTIVES else ""
