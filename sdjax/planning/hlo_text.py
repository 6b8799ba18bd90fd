"""A reader of the text that XLA prints of a compiled program: instructions, arrays, loops.

The grammar is XLA's `HloInstruction::ToString` (xla/hlo/ir/hlo_instruction.cc); the tiles and
memory spaces in a layout are described in xla/g3doc/tiled_layout.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

BITS = {
    "pred": 8, "token": 0, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
    "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64,
    "c128": 128,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_PARENTHESIS = re.compile(r"[()]")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. on_chip: whether it is in VMEM or SMEM, not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # of the dimensions, minor first
    tile: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """The bytes of the array in memory, with the padding of its tiles."""
        dims = [self.dims[i] for i in reversed(self.order)] if self.order else list(self.dims)
        for i in range(1, min(len(self.tile), len(dims)) + 1):
            dims[-i] = -(-dims[-i] // self.tile[-i]) * self.tile[-i]
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32)
        return math.prod(dims) * bits // 8

    @property
    def dense_bytes(self) -> int:
        """The bytes of the array without padding, as it crosses a network."""
        return dataclasses.replace(self, tile=()).bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction `name = shape opcode(operands), attributes`; parts are parsed on demand."""

    name: str
    opcode: str
    shape: str
    inside: str  # the parentheses: operands, or the value of a constant
    attributes: str
    root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands; printed with % or, by some versions, without."""
        words = (part.strip().split(" ")[-1] for part in self.inside.split(","))
        return tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", self.inside)) or tuple(
            word for word in words if re.fullmatch(r"[A-Za-z_][\w.\-]*(?:#\d+)*", word)
        )

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result; if it is a tuple all of them, nested ones in order."""
        return parse_arrays(self.shape)

    def attribute(self, key: str) -> str:
        """The value of `key=value`, a word without its %, or ""."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    @property
    def op_name(self) -> str:
        """The place in the Python program that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """The instructions of every computation, in the order they run; `entry` is the program."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """The arrays in a shape such as `(f32[8,4]{1,0:T(8,128)S(1)}, u32[])`."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(d.replace("<=", "")) for d in dims.split(",") if d)
        order, _, rest = (layout or "").partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        found.append(
            Array(
                dtype,
                sizes,
                tuple(int(d) for d in order.split(",") if d),
                tuple(int(d) for d in tile.group(1).split(",")) if tile else (),
                bool(re.search(r"S\([1-9]", rest)),
            )
        )
    return tuple(found)


def parse(text: str) -> Module:
    """The module in the text of `compiled.as_text()`.

    Raises:
        ValueError: there is no ENTRY computation, so it is no HLO text.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _joined(text.splitlines()):
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header.group(2), [])
                entry = header.group(2) if header.group(1) else entry
        elif line == "}":
            current = None
        elif instruction := _instruction(line):
            current.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    return Module({name: list(_projected(c)) for name, c in computations.items()}, entry)


def _projected(computation: list[Instruction]) -> Iterator[Instruction]:
    """The instructions, and a `get-tuple-element` behind each whose elements are read as `name#1`.

    jax 0.12 prints schedules so; what a compiled program prints has the instructions themselves.
    """
    read: dict[str, set[str]] = {}
    for name in {name for one in computation for name in one.operands}:
        while "#" in name:
            whole = name.rpartition("#")[0]
            read.setdefault(whole, set()).add(name)
            name = whole
    waiting = list(reversed(computation))
    while waiting:
        one = waiting.pop()
        yield one
        for name in sorted(read.get(one.name, ())):
            index = int(name.rpartition("#")[2])
            shape = _elements(one.shape)[index]
            part = "get-tuple-element", shape, f"%{one.name}", f", index={index}"
            waiting.append(Instruction(name, *part, root=False))


def _elements(shape: str) -> list[str]:
    """The shapes in a tuple's, such as `(f32[8,4]{1,0}, (u32[], u32[]))`, nested ones whole."""
    found, depth, begin = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            found.append(shape[begin:i].strip())
            begin = i + 1
    return found


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """The lines, joined where one continues another: kernels of Pallas hold line breaks."""
    whole = ""
    for line in lines:
        if whole.startswith("  ") and not line.startswith("  ") and line != "}":
            whole += line
            continue
        yield whole
        whole = line
    yield whole


def _instruction(line: str) -> Instruction | None:
    """The instruction in a line; None if there is none."""
    start = _START.match(line)
    if start is None:
        return None
    line = re.sub(r"/\*index=\d+\*/", "", line)
    begin = end = start.end()
    if line[begin] == "(":
        end = _closing(line, begin)
    else:
        end = line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    return Instruction(
        name=start.group(2),
        opcode=opcode.group(1),
        shape=line[begin:end],
        inside=line[opcode.end() : close - 1],
        attributes=line[close:],
        root=bool(start.group(1)),
    )


def _closing(line: str, opening: int) -> int:
    """The position just past the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


def replica_group(attributes: str, devices: int) -> list[int]:
    """The positions in the mesh of the devices of one group of a collective.

    It reads XLA's notations `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`,
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}` and `source_target_pairs={{0,1},...}`.
    Without one of them, the group is all devices.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return [int(member) for member in listed.group(1).split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota.group(2)).reshape(_ints(iota.group(1)))[0].tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{('[^}]*)\}", attributes)
    if mesh is None:
        return list(range(devices))
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", mesh.group(2))
    ids = _iota(order.group(1)) if order else np.arange(math.prod(sizes.values()))
    ids = ids.reshape(tuple(sizes.values()))
    index: list[Any] = [0] * len(sizes)
    for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(3)):
        # 'axis':(m)k is the middle of the axis as (m, k, rest)...
        rest = sizes[axis] // (int(before) * int(part)) if part else 1
        index[list(sizes).index(axis)] = slice(0, int(part) * rest if part else None, rest)
    return ids[tuple(index)].reshape(-1).tolist()


def _iota(text: str) -> np.ndarray:
    """The numbers of `[4,2]T(1,0)`: from 0, as an array of that shape, its axes permuted; flat."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (numbers.transpose(_ints(order)) if order else numbers).reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    """The whole numbers in a text."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def trip_count(module: Module, loop: Instruction) -> int | None:
    """The number of times that the body of a `while` runs; None if the text does not show it.

    XLA notes `known_trip_count` on CPU and GPU. On TPU the counter is followed instead: its start
    in the operand, its step in the body, its bound in the condition.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations.get(loop.attribute("condition"), [])
    body = module.computations.get(loop.attribute("body"), [])
    compare = next((i for i in condition if i.root and i.opcode == "compare"), None)
    if compare is None or compare.attribute("direction") != "LT" or len(compare.operands) != 2:
        return None
    inside = {i.name: i for i in condition}
    bound, counter = _constant(inside.get(compare.operands[1])), inside.get(compare.operands[0])
    if bound is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute("index"))
    start, step = _initial(module, loop, index), _step(module, loop, body, index)
    if start is None or not step:
        return None
    return max(0, -(-(bound - start) // step))


def _constant(instruction: Instruction | None) -> int | None:
    """The value of a constant whole number; None for any other instruction."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.inside) if instruction.inside.lstrip("-").isdigit() else None


def _initial(module: Module, loop: Instruction, index: int) -> int | None:
    """The constant that element `index` of the loop's state starts from."""
    around = next(c for c in module.computations.values() if any(i is loop for i in c))
    names = {i.name: i for i in around}
    state = names.get(loop.operands[0]) if loop.operands else None
    if state is None or state.opcode != "tuple" or index >= len(state.operands):
        return None
    value = names.get(state.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
        value = names.get(value.operands[0])
    return _constant(value)


def _step(module: Module, loop: Instruction, body: list[Instruction], index: int) -> int | None:
    """The constant that the body adds to element `index` of its state."""
    names = {i.name: i for i in body}
    root = next((i for i in body if i.root), None)
    if root is None or root.opcode != "tuple" or index >= len(root.operands):
        return None
    add = names.get(root.operands[index])
    if add is None or add.opcode != "add":
        return None
    for operand in add.operands:
        value = names.get(operand)
        if value is None:
            continue
        if value.opcode == "get-tuple-element" and int(value.attribute("index")) != index:
            return _initial(module, loop, int(value.attribute("index")))  # carried along unchanged
        if value.opcode == "constant":
            return _constant(value)
    return None
