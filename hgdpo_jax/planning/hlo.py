"""The text of an optimised program: HLO as `compiled.as_text()` gives it, read as computations of instructions.

It is the program of one chip, scheduled, with fusions and the memory of every value.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "f16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


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
        bits = _BITS[element] if element in _BITS else int(re.findall(r"\d+", element)[0])
        total += math.prod(shape) * bits // 8
    return total


class Computation:
    """Instructions by name, in order, and the root, which is the result."""

    def __init__(self, instructions: list[Instruction], root: str) -> None:
        self.instructions = {instruction.name: instruction for instruction in instructions}
        self.root = self.instructions[root]

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name → the instructions that read it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                found[operand].append((instruction, position))
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number → parameter."""
        return {int(x.text): x for x in self.instructions.values() if x.opcode == "parameter"}


class HloModule:
    """A program.

    Args:
        text: of an optimised module.
        trips: turns of each loop whose number of turns is an argument of the program.
        devices: that a collective without groups is for.

    Attributes:
        unknown: names of the loops for which `trips` was taken.
    """

    def __init__(self, text: str, trips: int = 1, devices: int = 1) -> None:
        self.computations, self.entry = _parse(text)
        self.unknown: set[str] = set()
        self.devices, self._trips = devices, trips

    def executed(self, name: str, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Each instruction that runs in a computation, where it stands and how often it runs; of a conditional the
        longest branch."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            inner, repeats = "", 1
            if instruction.opcode == "while":
                inner, repeats = instruction.called("body"), self._repeats(computation, instruction)
            elif instruction.opcode in ("call", "async-start"):
                inner = instruction.called("to_apply") or instruction.called("calls")
            elif instruction.opcode == "conditional":
                inner = max(_branches(instruction), key=lambda branch: len(self.computations[branch].users))
            if inner:
                yield from self.executed(inner, times * repeats)
            else:
                yield computation, instruction, times

    def _repeats(self, computation: Computation, loop: Instruction) -> int:
        """Turns of a loop: stated, or from its condition `i < constant` and the constant that i begins with."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if stated:
            return int(stated[1])
        condition = self.computations[loop.called("condition")]
        begin = _constant(computation, loop.operands[0], _counter(condition))
        end = _constant(condition, condition.root.operands[1]) if condition.root.opcode == "compare" else None
        if begin is None or end is None or "direction=LT" not in condition.root.attributes:
            self.unknown.add(loop.name)
            return self._trips
        return max(end - begin, 0)


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return _NAME.findall(listed[1])
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def _counter(condition: Computation) -> int:
    """Which part of a loop's state its condition compares."""
    root = condition.root
    compared = condition.instructions[root.operands[0]] if root.operands else root
    found = re.search(r"index=(\d+)", compared.attributes) if compared.opcode == "get-tuple-element" else None
    return int(found[1]) if found else -1


def _constant(computation: Computation, name: str, part: int | None = None) -> int | None:
    """The whole number that a value, or a part of a tuple, is; None where it is not written down."""
    value = computation.instructions[name]
    if part is not None:
        if value.opcode != "tuple" or part < 0:
            return None
        value = computation.instructions[value.operands[part]]
    while value.opcode in ("copy", "bitcast", "convert"):
        value = computation.instructions[value.operands[0]]
    return int(value.text) if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.text) else None


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    instructions: list[Instruction] = []
    name, entry, root = "", "", ""
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            name, instructions = header[2], []
            entry = name if header[1] else entry
        elif re.fullmatch(r'\}(, execution_thread="\w+")?', line) and name:  # a v5p has sparse cores beside
            computations[name] = Computation(instructions, root)
            name = ""
        elif name and re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):  # notes of a kernel may have lines of their own
            instructions.append(_instruction(line))
            if line.lstrip().startswith("ROOT "):
                root = instructions[-1].name
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
