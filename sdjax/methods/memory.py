"""Numbers that a run keeps of its losses, and draws by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax

from sdjax.diffusion import resampling
from sdjax.diffusion.losses import BIN_LOSSES, BINS, ObjectiveConfig
from sdjax.diffusion.schedules import ScheduleConfig

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """Numbers that a phase remembers of its losses, such as the last ones of each timestep.

    It is part of the state: saved, resumed, and the same on every device. A step that is skipped
    for a NaN changes nothing of it.

    Attributes:
      begin: () -> {name: array} before the first step (jittable).
      reads: the entries of the loss's `Aux` that are remembered, and not logged.
      remember: ({name: array}, {name: [B] of the global batch, in its order}) -> {name: array}
        after a step.
    """

    begin: Callable[[], Arrays]
    reads: tuple[str, ...]
    remember: Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], Arrays]


def memory_of(objective: ObjectiveConfig, schedule: ScheduleConfig) -> Memory | None:
    """Return the memory of `objective.resampling`; None without it."""
    if objective.resampling == "none":
        return None
    count = resampling.count_bins(objective, schedule)
    return Memory(
        begin=lambda: resampling.empty(count),
        reads=(BINS, BIN_LOSSES),
        remember=lambda memory, seen: resampling.remembered(memory, seen[BINS], seen[BIN_LOSSES]),
    )
