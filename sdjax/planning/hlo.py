"""The operations of a compiled step, read from its scheduled HLO: collectives, buffers, time.

XLA's own totals (`cost_analysis`) leave out too much for a plan. Bodies of loops count once,
collectives count as memory traffic, and asynchronous ones turn `optimal_seconds` negative on TPU.
Kernels of Pallas count for nothing unless they carry a `pl.CostEstimate`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from sdjax.models.kernels import choice, flash
from sdjax.planning.hlo_flops import library_call, product_flops
from sdjax.planning.hlo_text import Instruction, Module, parse, replica_group, trip_count
from sdjax.planning.hlo_traffic import traffic

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2", choice.CUDNN_CALL)
# Opcodes without work of their own, or with work that runs beside the rest (copies between HBM and
# VMEM).
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota "
    "partition-id replica-id opt-barrier copy-start copy-done slice-start slice-done "
    "async-start async-update async-done send send-done recv recv-done".split()
)
# Opcodes whose result is another name for existing memory.
_ALIASES = FREE - {"iota", "copy-done", "slice-done"} | {"custom-call", "copy-start", "slice-start"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Calls of one collective of the program.

    bytes: the size of the whole array, as on one device after an all-gather or before a
      reduce-scatter.
    times: how often it runs in a step. group: number of devices that take part in each call.
    islands: number of networks that these are spread over. asynchronous: whether other work may run
    meanwhile. in_loop: whether it is inside a `while`. beside: the operations scheduled between its
    start and its end; None if the text does not show them.
    """

    kind: str
    bytes: int
    group: int
    islands: int
    times: int
    asynchronous: bool
    in_loop: bool
    beside: tuple[Operation | Kernel, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the schedule. cycles: the compiler's estimate, 0 if it gives none.

    matrix: whether it multiplies matrices (or convolves), with `flops`. bytes: read from and
    written to HBM.
    """

    opcode: str
    op_name: str
    cycles: int
    bytes: int
    matrix: bool
    times: int
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Arrays of one shape and origin that the program writes to HBM. bytes: of one, padded."""

    shape: str
    op_name: str
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that XLA cannot analyse. flops, bytes: the cost of one call; None if not known.

    declared: whether it carries a `pl.CostEstimate`, which XLA's totals then include.
    """

    name: str
    flops: float | None
    bytes: float | None
    declared: bool
    times: int


@dataclasses.dataclass(frozen=True)
class HloSchedule:
    """The operations, collectives, buffers and kernels of one program, in order.

    unknown_loops: the number of loops of unknown length, of which one pass is counted.
    """

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Step:
    """An instruction as it runs: the computation it is in, and how often."""

    computation: str
    instruction: Instruction
    times: int
    in_loop: bool


def read(text: str, devices: int, island: int = 0) -> HloSchedule:
    """The schedule of `compiled.as_text()`, for a program over `devices` devices.

    `island`: number of devices, in the order of the mesh, that a fast network joins; 0 for all.

    Raises:
        ValueError: it is no HLO text.
    """
    module = parse(text)
    unknown: list[str] = []
    steps = list(_walk(module, module.entry, 1, False, unknown))
    work, calls = dict(_operations(module, steps)), dict(_kernels(steps))
    done = _ends(module, steps)
    collectives = []
    for start, found in _collectives(module, steps, devices, island or devices):
        if found.asynchronous and start in done:
            between = range(start + 1, done[start])
            both = {i: one for i in between for one in (work.get(i), calls.get(i)) if one}
            found = dataclasses.replace(found, beside=tuple(both.values()))
        collectives.append(found)
    return HloSchedule(
        operations=tuple(work.values()),
        collectives=tuple(collectives),
        buffers=tuple(_buffers(module, steps)),
        kernels=tuple(calls.values()),
        unknown_loops=len(unknown),
    )


def _walk(
    module: Module, computation: str, times: int, in_loop: bool, unknown: list[str]
) -> Iterator[_Step]:
    """The instructions in the order they run, through loops, branches and calls, not fusions."""
    for instruction in module.computations.get(computation, []):
        yield _Step(computation, instruction, times, in_loop)
        if instruction.opcode == "while":
            trips = trip_count(module, instruction)
            if trips is None:
                unknown.append(instruction.name)
            body = instruction.attribute("body")
            yield from _walk(module, body, times * (1 if trips is None else trips), True, unknown)
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for called in _called(instruction):
                # Without machine code, a slice-start is printed as the async-start of a slice.
                if not (instruction.opcode == "async-start" and _copies(module, called)):
                    yield from _walk(module, called, times, in_loop, unknown)


def _copies(module: Module, computation: str) -> bool:
    """Whether a computation does only the work of a `slice-start`."""
    inside = module.computations.get(computation, [])
    return {one.opcode for one in inside} == {"parameter", "slice"}


def _called(instruction: Instruction) -> list[str]:
    """The names of the computations in calls=, to_apply= and branches."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if branches:
        return re.findall(r"[\w.\-]+", branches.group(1))
    keys = ("calls", "to_apply", "true_computation", "false_computation")
    return [name for name in map(instruction.attribute, keys) if name]


def _ends(module: Module, steps: list[_Step]) -> dict[int, int]:
    """The position in the schedule where each asynchronous operation ends, by where it starts.

    It ends where its `-done` takes the result of its `-start`. On TPU it may also end at the last
    fusion with its channel. The first such fusion starts it, the next ones compute meanwhile, and
    the last one waits for it.
    """
    names: dict[tuple[str, str], int] = {}
    channels: dict[tuple[str, str], int] = {}
    ends: dict[int, int] = {}
    for i, step in enumerate(steps):
        instruction = step.instruction
        if instruction.opcode.endswith("-done") and instruction.operands:
            start = names.get((step.computation, instruction.operands[0]))
            if start is not None:
                ends[start] = i
        names[step.computation, instruction.name] = i
        if instruction.opcode == "fusion":
            for inner in module.computations.get(instruction.attribute("calls"), []):
                channel = inner.attribute("channel_id") if _kind(inner) else ""
                if channel:
                    first = channels.setdefault((step.computation, channel), i)
                    if first != i:
                        ends[first] = i
    return ends


def _operations(module: Module, steps: list[_Step]) -> Iterator[tuple[int, Operation]]:
    """The operations, each with its place in `steps`."""
    written = {
        name: {i.name: i for i in instructions}
        for name, instructions in module.computations.items()
        if name in {step.computation for step in steps}
    }
    for i, step in enumerate(steps):
        instruction = step.instruction
        if instruction.opcode in FREE or _kind(instruction):
            continue
        if instruction.opcode == "custom-call" and not library_call(instruction):
            continue
        if instruction.name.startswith(("async-collective-start", "async-collective-done")):
            continue  # their bytes are the collective's
        names = written[step.computation]
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        yield (
            i,
            Operation(
                opcode=instruction.opcode,
                op_name=instruction.op_name,
                cycles=int(cycles.group(1)) if cycles else 0,
                bytes=traffic(module, instruction, names),
                matrix=_multiplies(module, instruction),
                times=step.times,
                flops=product_flops(module, instruction, names),
            ),
        )


def _multiplies(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction, or one inside its fusion, is a matrix product or a convolution."""
    if instruction.opcode != "fusion":
        return instruction.opcode in ("convolution", "dot") or bool(library_call(instruction))
    inside = module.computations.get(instruction.attribute("calls"), [])
    return any(_multiplies(module, i) for i in inside)


def _kind(instruction: Instruction) -> str:
    """The collective that an instruction is or starts; "" if none."""
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in COLLECTIVES else ""


def _collectives(
    module: Module, steps: list[_Step], devices: int, island: int
) -> Iterator[tuple[int, Collective]]:
    """Each collective once, with its place in `steps`; TPU fusions of a channel may share one."""
    seen: set[str] = set()
    for i, step in enumerate(steps):
        outer = step.instruction
        if outer.opcode == "send" and "_xla_megascale_transfer_type" in outer.attributes:
            yield i, _between_slices(step, devices // island)
            continue
        fused = outer.opcode == "fusion"
        inside = module.computations.get(outer.attribute("calls"), []) if fused else [outer]
        for instruction in inside:
            kind = _kind(instruction)
            if not kind or instruction.opcode.endswith("-done"):
                continue
            channel = instruction.attribute("channel_id") if fused else ""
            if channel and channel in seen:
                continue
            seen.add(channel)
            members = replica_group(instruction.attributes, devices)
            group = len(members)
            scatters = kind == "all-reduce" and any(one.opcode == "dynamic-slice" for one in inside)
            yield (
                i,
                Collective(
                    kind="reduce-scatter" if scatters else kind,
                    bytes=_payload(instruction, kind, group),
                    group=group,
                    islands=len({member // island for member in members}),
                    times=step.times,
                    asynchronous=instruction.opcode.endswith("-start")
                    or (fused and any("AsyncCollective" in one.attributes for one in inside))
                    or outer.name.startswith("async-collective"),
                    in_loop=step.in_loop,
                ),
            )


def _between_slices(step: _Step, slices: int) -> Collective:
    """A transfer between TPU slices, which libtpu hands to the hosts' network.

    Every device sends its own part to its counterparts on the other slices.
    """
    attributes = step.instruction.attributes
    manner = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    kind = manner.group(1).lower().replace("_", "-") if manner else ""
    kind = kind if kind in COLLECTIVES else "collective-permute"
    size = step.instruction.arrays[0].dense_bytes
    return Collective(
        kind=kind,
        bytes=size * slices if kind == "all-gather" else size,
        group=slices,
        islands=slices,
        times=step.times,
        asynchronous=True,
        in_loop=step.in_loop,
    )


def _payload(instruction: Instruction, kind: str, group: int) -> int:
    """The bytes of the whole array; see `Collective`."""
    # The start of an all-reduce has the shape of its results. That of others, and of an all-reduce
    # since jax 0.12, is (operands, results, contexts...): the first two arrays or tuples of them.
    both = "((" if kind == "all-reduce" else "("
    if instruction.opcode.endswith("-start") and instruction.shape.startswith(both):
        arrays = [a for a in instruction.arrays if a.dims]
        arrays = arrays[len(arrays) // 2 :]
    else:
        arrays = list(instruction.arrays)
    size = sum(array.dense_bytes for array in arrays)
    return size * group if kind == "reduce-scatter" else size


def _buffers(module: Module, steps: list[_Step]) -> Iterator[Buffer]:
    """The results in HBM that are no outputs of the step, by shape and origin, largest first."""
    root = next((i for i in module.computations[module.entry] if i.root), None)
    kept = set(root.operands) if root and root.opcode == "tuple" else set()
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for step in steps:
        instruction = step.instruction
        alias = instruction.opcode in _ALIASES and not library_call(instruction)
        if alias or instruction.root or instruction.name in kept:
            continue
        for array in instruction.arrays:
            if array.on_chip or not array.dims:
                continue
            shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
            size, count = found.get((shape, instruction.op_name), (0, 0))
            found[shape, instruction.op_name] = (max(size, array.bytes), count + 1)
    for (shape, op_name), (size, count) in sorted(
        found.items(), key=lambda item: (-item[1][0], -item[1][1], item[0])
    ):
        yield Buffer(shape, op_name, size, count)


def _kernels(steps: list[_Step]) -> Iterator[tuple[int, Kernel]]:
    """The kernels of Pallas and cuDNN, each with its place in `steps`.

    Their costs are from the `pl.CostEstimate`, or from `sdjax.models.kernels`.
    """
    for i, step in enumerate(steps):
        text = step.instruction.attributes
        target = re.search(r'custom_call_target="([^"]+)"', text)
        if target is None or not target.group(1).startswith(KERNELS):
            continue
        declared = re.search(r'"cost_estimate":\{([^}]*)\}', text)
        values = dict(re.findall(r'"(\w+)":"?(\d+)', declared.group(1))) if declared else {}
        name = re.sub(r"\.\d+$", "", step.instruction.name)
        flops, bytes_ = values.get("flops"), values.get("bytes_accessed")
        shapes = _operand_shapes(text)
        known = flash.kernel_cost(name, shapes) or choice.cudnn_cost(target.group(1), shapes)
        declares = flops is not None
        if not declares and known is not None:
            flops, bytes_ = known
        yield (
            i,
            Kernel(
                name=name,
                flops=None if flops is None else float(flops),
                bytes=None if bytes_ is None else float(bytes_),
                declared=declares,
                times=step.times,
            ),
        )


def _operand_shapes(attributes: str) -> list[tuple[int, ...]]:
    """The shapes of a custom call's floating-point operands, from `operand_layout_constraints`.

    Kernels' tables of integers come first and are left out:
    `operand_layout_constraints={s8[1,9]{1,0}, bf16[2,4]{1,0}, f32[]}` -> [(2, 4), ()].
    """
    found = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", attributes)
    shapes = re.findall(r"\bb?f\w+\[([\d,]*)\]", found.group(1)) if found else []
    return [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]
