"""Bytes that the operations of a compiled program read from memory and write to it."""

from __future__ import annotations

from collections.abc import Mapping

from sdjax.planning.hlo_flops import library_call
from sdjax.planning.hlo_text import Instruction, Module

_SLICES = ("slice", "dynamic-slice")
_UPDATE = "dynamic-update-slice"


def traffic(module: Module, instruction: Instruction, names: Mapping[str, Instruction]) -> int:
    """The bytes in HBM of an instruction's operands and result, once.

    Where it only takes slices of an array, or puts a slice into it, the slices alone count, as in
    XLA's `HloCostAnalysis`. `names`: the instructions of the computation that it is in.
    """
    inside = [instruction]
    if instruction.opcode == "fusion":
        inside = module.computations.get(instruction.attribute("calls"), [])
    users: dict[str, list[Instruction]] = {}
    for one in inside:
        for name in one.operands:
            users.setdefault(name, []).append(one)
    parameters = {one.inside: one.name for one in inside if one.opcode == "parameter"}
    fused = {one.name: one for one in inside}
    total = 0
    for i, name in enumerate(instruction.operands):
        if name in names:
            whole = _hbm(names[name])
            inner = parameters.get(str(i)) if instruction.opcode == "fusion" else name
            sliced = None if inner is None else _sliced(inner, users)
            total += whole if sliced is None else min(whole, sliced)
    if library_call(instruction):  # without its workspace
        return total + _hbm(instruction, 1)
    root = next((one for one in inside if one.root), instruction)
    return total + _written(instruction, root, {**names, **fused})


def _written(instruction: Instruction, root: Instruction, names: Mapping[str, Instruction]) -> int:
    """The bytes of a result in HBM; of arrays that a slice is put into, the slice's alone.

    root: the last instruction of a fusion, which may be a tuple of several results.
    """
    results = [root]
    if root is not instruction and root.opcode == "tuple":
        results = [names[name] for name in root.operands]
    if len(results) != len(instruction.arrays):
        return _hbm(instruction)
    total = 0
    for result, array in zip(results, instruction.arrays, strict=True):
        while result.opcode == "bitcast" and result.operands[0] in names:
            result = names[result.operands[0]]
        update = names.get(result.operands[1]) if result.opcode == _UPDATE else None
        size = array.bytes if update is None else sum(one.bytes for one in update.arrays)
        total += 0 if array.on_chip else min(array.bytes, size)
    return total


def _hbm(instruction: Instruction, arrays: int | None = None) -> int:
    """The bytes in HBM of the first `arrays` of a result."""
    return sum(array.bytes for array in instruction.arrays[:arrays] if not array.on_chip)


def _sliced(name: str, users: Mapping[str, list[Instruction]]) -> int | None:
    """The bytes of the slices taken of an array; None if it has other uses, or none."""
    total = 0
    for user in users.get(name, []):
        if user.opcode in _SLICES and user.operands[0] == name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "bitcast":
            inner = _sliced(user.name, users)
            if inner is None:
                return None
            total += inner
        elif not (user.opcode == _UPDATE and user.operands[0] == name):
            return None
    return total if name in users else None
