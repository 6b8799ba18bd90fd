"""The time of a program's step, from its operations and collectives one by one."""

from __future__ import annotations

import collections
import dataclasses
import math

from sdjax.planning.hlo import Collective, HloSchedule, Kernel, Operation
from sdjax.planning.topologies import Topology

# Seconds to start a GPU's kernel, as XLA counts them (gpu_performance_model_base.h).
LAUNCH = 1e-6


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates of one JAX device.

    flops, kernels, products: FLOP/s at most, in kernels, in matrix products. hbm, links, network:
    bytes/s to HBM, over the links, over the network. clock: Hz. launch: seconds to start an
    operation.
    """

    flops: float
    kernels: float
    products: float
    hbm: float
    links: float
    network: float
    clock: float
    launch: float

    @classmethod
    def of(cls, topology: Topology) -> Rates:
        """The rates of a topology's device: a chip's, divided by its devices, with its clock."""
        chip = topology.chip
        return cls(
            flops=chip.flops / chip.devices,
            kernels=chip.kernels * chip.flops / chip.devices,
            products=chip.products * chip.flops / chip.devices,
            hbm=chip.hbm_bandwidth / chip.devices,
            links=chip.links / chip.devices,
            network=chip.network / chip.devices,
            clock=chip.clock,
            launch=0.0 if chip.is_tpu else LAUNCH,
        )


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The seconds of a step, and their parts.

    step = operations + kernels + exposed. operations: one after the other, see `operation_seconds`.
    kernels: those of Pallas, by their declared cost. exposed: collectives during which nothing
    else runs: synchronous ones, and the time of asynchronous ones beyond the operations scheduled
    beside them. collectives: all of them. roofline: the least any schedule could take, the larger
    of FLOPs over peak and HBM traffic over bandwidth.
    """

    step: float
    operations: float
    kernels: float
    exposed: float
    collectives: float
    roofline: float


def operation_seconds(work: Operation, rates: Rates) -> float:
    """The seconds of one operation, once.

    A matrix product takes the compiler's estimate in cycles; without an estimate, its FLOPs at the
    rate of `Chip.products`. It takes at least its HBM traffic. Any other operation takes its
    traffic. (The compiler's cycles for elementwise work serve to choose window sizes: they come to
    2.4 times the traffic at the bandwidth of the data sheet.)
    """
    traffic = work.bytes / rates.hbm
    if not (work.cycles and rates.clock):
        products = work.flops / rates.products if work.matrix else 0.0
        return max(products, traffic) + rates.launch
    cycles = work.cycles / rates.clock
    return max(cycles, traffic) if work.matrix else min(cycles, traffic)


def collective_seconds(collective: Collective, topology: Topology) -> float:
    """The seconds of one collective, once, at full use of its links; see `_bandwidth`.

    Ring algorithms (scaling book, "Sharded matrices"): of V bytes, with n devices, an all-gather
    and a reduce-scatter move V (n - 1) / n through each device, an all-reduce twice that. Over
    several islands an all-reduce is done inside each first; every device then has V / island to
    exchange over the network.
    """
    rates, group, size = Rates.of(topology), collective.group, collective.bytes
    if group <= 1:
        return 0.0
    passes = 2.0 if collective.kind == "all-reduce" else 1.0
    if collective.kind in ("collective-permute", "collective-broadcast"):
        along = _bandwidth(max(topology.shape), topology)  # one dimension
        return size / (along if collective.islands == 1 else rates.network)
    inner, outer = group // collective.islands, collective.islands
    seconds = passes * size * (inner - 1) / inner / _bandwidth(inner, topology)
    return seconds + passes * (size / inner) * (outer - 1) / outer / rates.network


def _bandwidth(group: int, topology: Topology) -> float:
    """The bytes/s that a device sends to a group of neighbours.

    In a torus, a group has the links along as many dimensions as it needs, largest first. It has
    half of them along a dimension that does not wrap around, or of which it has only a part. (3-D
    slices
    wrap at multiples of 4, 2-D ones at 16: cloud.google.com/tpu/docs, system architecture.) NVLink
    switches give all links to any group.
    """
    rates = Rates.of(topology)
    if not topology.chip.is_tpu:
        return rates.links
    wrap = 4 if topology.chip.dims == 3 else 16
    reached, bandwidth = topology.chip.devices, 0.0
    for size in sorted(topology.shape, reverse=True):
        if bandwidth and reached >= group:
            break
        around = size % wrap == 0 and group >= reached * size
        bandwidth += rates.links / topology.chip.dims * (1.0 if around else 0.5)
        reached *= size
    return bandwidth


def kernel_seconds(kernel: Kernel, rates: Rates) -> float:
    """The seconds of one call of a kernel, by its declared cost."""
    busy = max((kernel.flops or 0.0) / rates.kernels, (kernel.bytes or 0.0) / rates.hbm)
    return busy + rates.launch


def _uncovered(collective: Collective, topology: Topology) -> float:
    """The seconds of an asynchronous collective, once, beyond the operations beside it."""
    if collective.beside is None:
        return 0.0
    rates = Rates.of(topology)
    covered = math.fsum(
        operation_seconds(one, rates) if isinstance(one, Operation) else kernel_seconds(one, rates)
        for one in collective.beside
    )
    return max(0.0, collective_seconds(collective, topology) - covered)


def step_time(
    schedule: HloSchedule, topology: Topology, flops: float, *, foreign: bool = False
) -> StepTime:
    """The estimated time of a schedule with `flops` of work on each device.

    foreign: the compiler was one for other hardware. Its operations are then ignored, and the time
    is the roofline of the whole.
    """
    rates = Rates.of(topology)
    seen = () if foreign else schedule.operations
    operations = math.fsum(w.times * operation_seconds(w, rates) for w in seen)
    kernels = math.fsum(k.times * kernel_seconds(k, rates) for k in schedule.kernels)
    roofline = max(flops / rates.flops, hbm_bytes(schedule) / rates.hbm)
    operations = max(operations, roofline - kernels)
    waiting, beside = (
        math.fsum(
            c.times * collective_seconds(c, topology)
            for c in schedule.collectives
            if c.asynchronous == asynchronous
        )
        for asynchronous in (False, True)
    )
    uncovered = math.fsum(
        c.times * _uncovered(c, topology) for c in schedule.collectives if c.asynchronous
    )
    exposed = waiting + max(uncovered, beside - operations - kernels)
    return StepTime(
        step=operations + kernels + exposed,
        operations=operations,
        kernels=kernels,
        exposed=exposed,
        collectives=waiting + beside,
        roofline=roofline,
    )


def hbm_bytes(schedule: HloSchedule) -> float:
    """The HBM traffic of a step in bytes, on each device: reads and writes of all operations."""
    return float(
        sum(w.times * w.bytes for w in schedule.operations)
        + sum(k.times * (k.bytes or 0.0) for k in schedule.kernels)
    )


def loop_factor(schedule: HloSchedule) -> float:
    """The ratio of a step's work to one pass through every loop, which XLA's totals count."""
    weigh = [(w.cycles if w.matrix and w.cycles else w.bytes, w.times, w.matrix) for w in
             schedule.operations]  # fmt: skip
    matrices = [one for one in weigh if one[2]] or weigh
    once = sum(weight for weight, _, _ in matrices)
    return sum(weight * times for weight, times, _ in matrices) / once if once else 1.0


def plausible(seconds: object, roofline: float, peak_seconds: float) -> bool:
    """Whether the compiler's `optimal_seconds` is plausible.

    It comes out negative where collectives are asynchronous, and small where loops or kernels
    hide work. It must not beat the FLOPs at peak, nor be far beyond the time of the traffic.
    """
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return False
    return peak_seconds <= seconds <= 10 * max(roofline, peak_seconds)


def collective_table(schedule: HloSchedule, topology: Topology) -> list[dict]:
    """One row for each kind, group size and manner: times and bytes in a step, seconds."""
    rows: dict[tuple, dict] = collections.OrderedDict()
    for c in schedule.collectives:
        row = rows.setdefault(
            (c.kind, c.group, c.islands, c.asynchronous, c.in_loop),
            {"kind": c.kind, "group": c.group, "islands": c.islands, "asynchronous": c.asynchronous,
             "in_loop": c.in_loop, "count": 0, "bytes": 0, "seconds": 0.0},
        )  # fmt: skip
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["seconds"] += c.times * collective_seconds(c, topology)
    return sorted(rows.values(), key=lambda row: -row["seconds"])
