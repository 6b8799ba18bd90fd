"""A search for the largest batch that fits and the fastest mesh, with few compilations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

from sdjax.config import Config
from sdjax.errors import UserError
from sdjax.parallel.mesh import MeshConfig
from sdjax.planning.planner import Plan, memory_limit
from sdjax.planning.topologies import Topology
from sdjax.train.announce import memory_classes
from sdjax.train.program import Program

MAX_ROWS = 1024  # images a device computes at once
MAX_TRIES = 5  # compilations for a mesh
START_ROWS = 8
# The share of the memory that the state may take; the rest is room to compute in.
_STATE_SHARE = 0.85


class PlanMaker(Protocol):
    """The part of a `Planner` that the search uses."""

    topology: Topology

    def program(self, config: Config) -> Program: ...
    def plan(self, config: Config) -> Plan: ...


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    best: the fastest plan that fits, None if nothing does; tried: all, in order.
    """

    best: Plan | None
    tried: tuple[Plan, ...]


def candidates(topology: Topology) -> list[MeshConfig]:
    """The meshes worth a try, fewest collectives first.

    Parameters are split in one of three ways: over nothing, over a host's worth of devices (8), or
      over
    all of an island. A whole row of the torus replaces the 8 if it is longer: a part of a row has
    half its bandwidth. Parameters are never split over more than an island, since `data` alone
    crosses the slow network. Tensor parallelism moves activations instead of parameters, which is
    more for networks below some ten billion parameters. It is the last resort, for state that fits
    nowhere else.
    """
    island = topology.island
    row = max(8, *topology.shape)
    ways = [n for n in (1, row, island) if n <= island and island % n == 0]
    meshes = [MeshConfig(data=-1, fsdp=n) for n in dict.fromkeys(ways)]
    slices = topology.devices // island
    if slices > 1:
        meshes = [dataclasses.replace(mesh, slices=slices) for mesh in meshes]
    last = min(8, island)
    if last > 1 and island % last == 0:
        meshes.append(dataclasses.replace(meshes[-1], fsdp=island // last, tensor=last))
    return meshes


def with_rows(config: Config, mesh: MeshConfig, topology: Topology, rows: int) -> Config:
    """The config `config` on `mesh`, where each device computes `rows` images at once."""
    ways = topology.devices // mesh.tensor
    batch = rows * ways * config.train.accumulation
    return dataclasses.replace(
        config, mesh=mesh, data=dataclasses.replace(config.data, batch_size=batch)
    )


def pruned(planner: PlanMaker, config: Config, say: Callable[[str], None]) -> list[MeshConfig]:
    """The candidate meshes whose state fits, which needs no compiler to find out.

    Raises:
        UserError: none does.
    """
    limit = memory_limit(planner.topology)
    kept: list[MeshConfig] = []
    for mesh in candidates(planner.topology):
        if mesh.tensor > 1 and kept:
            continue
        program = planner.program(with_rows(config, mesh, planner.topology, 1))
        classes = memory_classes(program)
        state = sum(size for name, size in classes.items() if name not in ("batch", "gradients"))
        fits = state <= _STATE_SHARE * limit
        if not fits:
            say(f"{_name(mesh)}: {state / 2**30:.1f} GiB of state, too much; left out")
        else:
            kept.append(mesh)
    if not kept:
        raise UserError(
            f"on --topology={planner.topology.name} the state of this config fits no mesh (limit "
            f"{limit / 2**30:.1f} GiB a device): take more chips, or chips with more memory"
        )
    return kept


def search(planner: PlanMaker, config: Config, say: Callable[[str], None]) -> SearchResult:
    """Try meshes and batches; `say` takes a line before and after each.

    Raises:
        UserError: the state fits on no mesh.
    """
    meshes = pruned(planner, config, say)
    say(
        f"{len(meshes)} mesh(es), at most {MAX_TRIES * len(meshes)} compilations; those done "
        "before are taken from the cache"
    )
    tried: list[Plan] = []
    for mesh in meshes:
        tried += _largest(planner, config, mesh, say)
    fitting = [plan for plan in tried if plan["fits"]]
    return SearchResult(max(fitting, key=_speed, default=None), tuple(tried))


def _speed(plan: Plan) -> tuple[float, float]:
    """The key to order plans by: images per second to three digits, then the batch."""
    return (float(f"{plan['images_per_second_per_chip']:.3g}"), plan["batch"]["global"])


def _largest(
    planner: PlanMaker, config: Config, mesh: MeshConfig, say: Callable[[str], None]
) -> list[Plan]:
    """The plans for powers of two of images a device, until the largest that fits is bracketed."""
    plans: dict[int, Plan] = {}
    rows = START_ROWS
    while rows not in plans and len(plans) < MAX_TRIES:
        say(f"{_name(mesh)}, {rows} images a device: compiling ...")
        plans[rows] = planner.plan(with_rows(config, mesh, planner.topology, rows))
        say("  " + _line(plans[rows]))
        rows = _next_rows(plans)
    return list(plans.values())


def _next_rows(plans: dict[int, Plan]) -> int:
    """The next number of images to try; one that was tried already if nothing is left to learn.

    Temporaries grow with the images, so two results that fit predict how many more will fit.
    """
    fit = sorted(rows for rows, plan in plans.items() if plan["fits"])
    over = sorted(rows for rows, plan in plans.items() if not plan["fits"])
    if not fit:
        return max(1, over[0] // 2)
    top = MAX_ROWS if not over else over[0] // 2
    guess = 2 * fit[-1]
    if len(fit) > 1:
        used = [plans[rows]["memory"]["total"] for rows in fit[-2:]]
        slope = (used[1] - used[0]) / (fit[-1] - fit[-2])
        room = plans[fit[-1]]["memory"]["limit"] - used[1]
        if slope > 0:
            guess = 2 ** max(1, math.floor(math.log2(fit[-1] + room / slope)))
    return max(fit[-1], min(guess, top))


def _name(mesh: MeshConfig) -> str:
    sizes: dict[str, Any] = {"fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return "mesh data=rest " + " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _line(plan: Plan) -> str:
    if not plan["fits"]:
        return "does not fit"
    gib = plan["memory"]["total"] / 2**30
    return (
        f"{gib:.1f} GiB of {plan['memory']['limit'] / 2**30:.1f}, "
        f"{plan['images_per_second_per_chip']:.2f} images/s/chip, MFU {plan['mfu']:.1%}"
    )
