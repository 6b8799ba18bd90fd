"""Which part of every batch each host reads, and where it lies on the devices.

The batch is split into parts, one for each pair of coordinates on (data, fsdp). A host reads the
parts that its devices hold, as one block of the stream of examples. Where the mesh does not lay a
host's parts side by side (on a torus of chips it may not), the rows of the global array are a
permutation of the stream; `positions` says which, and randomness follows the position in the
stream, so the loss does not depend on the layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.errors import UserError


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Every micro-batch must spread evenly over the devices that split the batch.

    Raises:
        UserError: naming the sizes and the nearest batch sizes that fit.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = ways * accumulation
    if batch_size % unit:
        lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
        nearest = " or ".join(str(size) for size in (lower, upper) if size)
        raise UserError(
            f"config.data.batch_size is {batch_size}: it must be divisible by {unit} "
            f"(mesh data x fsdp = {ways}, times train.accumulation = {accumulation}); "
            f"try {nearest}"
        )


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every batch that one host reads: block `index` of `count`.

    It holds the examples of the host's `parts` of the mesh. Hosts that share parts (where `tensor`
    crosses hosts) read the same block.
    """

    index: int
    count: int
    parts: tuple[int, ...]


def shares(mesh: Mesh) -> dict[int, Share]:
    """{process: its share of the batch}.

    Raises:
        UserError: two hosts hold some parts in common and others not.
    """
    held: dict[int, set[int]] = {}
    grid = mesh.devices.reshape(-1, mesh.devices.shape[-1])  # [parts, tensor]
    for (part, _), device in np.ndenumerate(grid):
        held.setdefault(device.process_index, set()).add(part)
    groups = sorted({tuple(sorted(parts)) for parts in held.values()})
    if sum(map(len, groups)) != len(grid) or len({len(group) for group in groups}) > 1:
        raise UserError(
            f"mesh {dict(mesh.shape)} does not divide evenly among the hosts: their devices hold "
            f"these parts of a batch: {groups}. Choose config.mesh.tensor so that it divides the "
            "devices of a host, or is a multiple of them"
        )
    return {
        process: Share(groups.index(tuple(sorted(parts))), len(groups), tuple(sorted(parts)))
        for process, parts in held.items()
    }


def positions(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int32 [batch_size]: for each row of a global array its place in the stream's batch."""
    found = {(share.index, share.parts) for share in shares(mesh).values()}
    order = [part for _, parts in sorted(found) for part in parts]  # as the stream has them
    rows = np.arange(batch_size, dtype=np.int32).reshape(len(order), -1)
    placed = np.empty_like(rows)
    placed[order] = rows
    return placed.reshape(-1)


@functools.lru_cache(maxsize=4)
def _own_share(mesh: Mesh) -> Share:
    """Return this host's share, kept for every step: a slice has thousands of devices."""
    return shares(mesh)[jax.process_index()]


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's block of a batch -> global arrays over the mesh, without blocking."""
    sharding, share = batch_sharding(mesh), _own_share(mesh)
    if share.count == 1 and share.parts == tuple(range(len(share.parts))):
        return jax.device_put(dict(batch), sharding)  # which is quicker where all is here
    offset = {part: i for i, part in enumerate(share.parts)}

    def whole(local: np.ndarray) -> jax.Array:
        rows = len(local) // len(share.parts)  # of a part

        def fetch(index: Any) -> np.ndarray:
            first = offset[(index[0].start or 0) // rows] * rows
            return local[first : first + rows]

        shape = (len(local) * share.count, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, fetch)

    return {name: whole(value) for name, value in batch.items()}
