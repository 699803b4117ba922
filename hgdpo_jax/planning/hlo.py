"""What an optimised program moves, counted in its text: bytes between a chip and its memory, and between chips.

The text is HLO as `compiled.as_text()` gives it: of one chip, scheduled, with fusions and the memory of every value.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "f16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATE = "dynamic-update-slice"
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_WITH_OPERANDS = ("all-gather-start", "collective-permute-start")  # whose type names operands beside results
# They name values, or are counted where their other half is.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "copy-start", "slice-start", "async-update", "async-done", "add-dependency", "domain"}


class Instruction(NamedTuple):
    """One line: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str  # between the brackets

    def called(self, key: str) -> str:
        """The computation that an attribute names; empty where there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def is_kernel(self, name: str) -> bool:
        """Whether it runs a kernel whose name begins so."""
        return f'custom_call_target="{name}' in self.attributes


def size(type_: str, memory: bool = False) -> int:
    """Bytes of a type, which may be a tuple.

    Args:
        type_: such as `(f32[4,8]{1,0:T(8,128)}, s32[])`.
        memory: padded as the layout's tiles need it, and without what lies on the chip.
    """
    total = 0
    for element, dimensions, layout in _ARRAY.findall(type_):
        shape = [int(n.removeprefix("<=")) for n in dimensions.split(",") if n]
        if memory:
            space = re.search(r"S\((\d+)\)", layout)
            if space and space[1] not in ("0", "5"):  # 5 is the host's
                continue
            tile = re.search(r"T\(([\d,]+)\)", layout)
            order = [int(n) for n in layout.partition(":")[0].split(",") if n]
            if tile:
                sides = [int(n) for n in tile[1].split(",")]
                for side, dimension in zip(reversed(sides), order, strict=False):
                    shape[dimension] = -(-shape[dimension] // side) * side
        bits = _BITS.get(element) or int((re.search(r"\d+", element) or [0])[0])
        total += math.prod(shape) * bits // 8
    return total


class Computation:
    """Its instructions by name, in order; the last is what it gives."""

    def __init__(self, instructions: list[Instruction], root: str) -> None:
        self.instructions = {instruction.name: instruction for instruction in instructions}
        self.root = self.instructions[root]

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name → which instructions read it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                found[operand].append((instruction, position))
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number → parameter."""
        return {int(x.text): x for x in self.instructions.values() if x.opcode == "parameter"}


class Collective(NamedTuple):
    """One kind of exchange between chips, over a whole program.

    Attributes:
        count: how often.
        bytes: of what is exchanged, as each chip holds it whole (all-gather: afterwards; reduce-scatter: before).
        sent: bytes that each chip sends, as a ring of the chips that take part does it.
    """

    count: int
    bytes: int
    sent: float


class HloModule:
    """A program in HLO.

    Args:
        text: of an optimised module.
        trips: of loops of which the text does not say how often they run: it is an argument of the program.
        devices: that a collective without groups is for.

    Attributes:
        unknown: loops for which `trips` was taken.
    """

    def __init__(self, text: str, trips: int = 1, devices: int = 1) -> None:
        self.computations, self.entry = _parse(text)
        self.unknown: set[str] = set()
        self._trips, self._devices = trips, devices

    def executed(self, name: str, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Each instruction that runs, where it stands and how often; of a conditional the longest branch."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            inner, repeats = [], 1
            if instruction.opcode == "while":
                inner, repeats = [instruction.called("body")], self._repeats(computation, instruction)
            elif instruction.opcode in ("call", "async-start"):
                inner = [instruction.called("to_apply") or instruction.called("calls")]
            elif instruction.opcode == "conditional":
                inner = [max(self._branches(instruction), key=lambda branch: len(self.computations[branch].users))]
            else:
                yield computation, instruction, times
            for called in inner:
                yield from self.executed(called, times * repeats)

    def _branches(self, instruction: Instruction) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if listed:
            return _NAME.findall(listed[1])
        return [instruction.called("true_computation"), instruction.called("false_computation")]

    def _repeats(self, computation: Computation, loop: Instruction) -> int:
        """Of a loop: stated, or from its condition `i < constant` and the constant that i begins with."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if stated:
            return int(stated[1])
        condition = self.computations[loop.called("condition")]
        begin = self._constant(computation, loop.operands[0], self._counter(condition))
        end = self._constant(condition, condition.root.operands[1]) if condition.root.opcode == "compare" else None
        if begin is None or end is None or "direction=LT" not in condition.root.attributes:
            self.unknown.add(loop.name)
            return self._trips
        return max(end - begin, 0)

    @staticmethod
    def _counter(condition: Computation) -> int:
        """Which part of a loop's state its condition looks at first."""
        at = condition.instructions[condition.root.operands[0]] if condition.root.operands else condition.root
        found = re.search(r"index=(\d+)", at.attributes) if at.opcode == "get-tuple-element" else None
        return int(found[1]) if found else -1

    @staticmethod
    def _constant(computation: Computation, name: str, part: int | None = None) -> int | None:
        """The whole number that a value, or a part of a tuple, is; None where it is not written down."""
        at = computation.instructions[name]
        if part is not None:
            if at.opcode != "tuple" or part < 0:
                return None
            at = computation.instructions[at.operands[part]]
        while at.opcode in ("copy", "bitcast", "convert"):
            at = computation.instructions[at.operands[0]]
        return int(at.text) if at.opcode == "constant" and re.fullmatch(r"-?\d+", at.text) else None

    def traffic(self) -> int:
        """Bytes between the chip and its memory: what each kernel, copy, prefetch or exchange reads and writes there.

        What a kernel only cuts a piece from, or writes a piece into, counts as that piece.
        """
        total = 0
        for computation, instruction, times in self.executed(self.entry):
            if instruction.opcode in _FREE or _kind(instruction) or instruction.is_kernel("AllocateBuffer"):
                continue
            reader = instruction
            if instruction.opcode.endswith("-done"):
                reader = computation.instructions[instruction.operands[0]]
            read = sum(self._read(computation, reader, position) for position in range(len(reader.operands)))
            total += times * (read + self._written(computation, instruction))
        for computation, instruction, _, times in self._exchanges():
            types = [instruction.type]
            if instruction.opcode not in _WITH_OPERANDS:
                types += [computation.instructions[name].type for name in instruction.operands]
            total += times * sum(size(type_, memory=True) for type_ in types)
        return total

    def _read(self, computation: Computation, instruction: Instruction, position: int) -> int:
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
            fused = self.computations[instruction.called("calls")]
            return min(full, self._used(fused, fused.parameters[position]))
        return full

    def _used(self, fused: Computation, value: Instruction) -> int:
        """Bytes of a value inside a fusion that are looked at."""
        total = 0
        for user, position in fused.users[value.name]:
            if user.opcode == "bitcast":
                total += self._used(fused, user)
            elif user.opcode in _SLICES and position == 0:
                total += size(user.type)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                total += self._used(inner, inner.parameters[position])
            elif user.opcode != "tuple" and not _kind(user) and (user.opcode != _UPDATE or position):
                total += size(value.type, memory=True)
        return total

    def _written(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes that an instruction writes to memory: of a tuple what is read later, which leaves workspaces out."""
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.called("calls")]
            roots = [fused.root]
            if fused.root.opcode == "tuple":
                roots = [fused.instructions[name] for name in fused.root.operands]
            return sum(self._result(fused, root) for root in roots)
        if instruction.type.startswith("(") and instruction.name != computation.root.name:
            users = (user for user, _ in computation.users[instruction.name])
            parts = {user.called("index"): user.type for user in users if user.opcode == "get-tuple-element"}
            return sum(size(type_, memory=True) for type_ in parts.values())
        return self._result(computation, instruction)

    @staticmethod
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

    def collectives(self) -> dict[str, Collective]:
        """Exchanges between the chips, by kind, in loops as often as they run."""
        found: dict[str, list[tuple[int, int, float]]] = {}
        for computation, instruction, kind, times in self._exchanges():
            whole = sum(size(computation.instructions[name].type) for name in instruction.operands)
            chips = self._group(instruction.attributes)
            if kind == "all-gather":
                whole *= chips
            others = (chips - 1) / chips
            sent = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(kind, others) * whole
            if sent:
                found.setdefault(kind, []).append((times, times * whole, times * sent))
        return {kind: Collective(*map(sum, zip(*each, strict=True))) for kind, each in sorted(found.items())}

    def _exchanges(self) -> Iterator[tuple[Computation, Instruction, str, int]]:
        """Each collective, where it stands, its kind and how often it runs. One that runs beside several kernels stands
        in the fusion of each of them."""
        seen: set[str] = set()
        for outer, instruction, times in self.executed(self.entry):
            for computation, inner in self._inside(outer, instruction):
                kind = _kind(inner)
                channel = inner.called("channel_id") or inner.name
                if not kind or inner.opcode.endswith("-done") or (computation is not outer and channel in seen):
                    continue
                seen.add(channel)
                cut = computation is not outer and computation.root.opcode in ("dynamic-slice", "bitcast")
                yield computation, inner, "reduce-scatter" if kind == "all-reduce" and cut else kind, times

    def _inside(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """An instruction, or those of its fusion."""
        if instruction.opcode != "fusion":
            yield computation, instruction
            return
        fused = self.computations[instruction.called("calls")]
        for inner in fused.instructions.values():
            yield from self._inside(fused, inner)

    def _group(self, attributes: str) -> int:
        """How many chips exchange with each other: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['a'=2,'b'=2] … {'a'}`."""
        found = re.search(r"replica_groups=(\{\{[\d,]*\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})", attributes)
        if not found:
            return self._devices
        if found[3]:
            return int(found[3])
        if found[4]:
            sizes = dict(re.findall(r"('[^']+')=(\d+)", found[4]))
            axes = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", found[5])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return found[1].count(",") + 1


def _kind(instruction: Instruction) -> str:
    """Of a collective; empty for anything else."""
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in _COLLECTIVES else ""


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    name, entry, root, lines = "", "", "", []
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line == "}" and name:
            computations[name] = Computation(lines, root)
            name = ""
        elif name and re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):  # notes of a kernel may have lines of their own
            instruction = _instruction(line)
            lines.append(instruction)
            if line.lstrip().startswith("ROOT "):
                root = instruction.name
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    type_, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(left.lstrip("%"), type_, opcode, operands, rest[close + 1 :], inside)


def _closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes."""
    depth = 0
    for position in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position
    raise AssertionError(f"no bracket closes in {text[:80]}")
