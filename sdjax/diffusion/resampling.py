"""Loss-aware timesteps: those at which losses are large are drawn more often, and weigh less.

The unit interval, of which every distribution of timesteps is a map, is cut into K bins. The memory
holds the last ten losses of each bin. Bin k is drawn with

    p_k = (1 - u) sqrt(E[L_k^2]) / sum_j sqrt(E[L_j^2]) + u / K,    u = 0.001

and its losses are multiplied by 1 / (K p_k), so that their expectation stays as it is. Until every
bin has ten losses, nothing changes. (Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.2;
guided_diffusion/resample.py: LossSecondMomentResampler.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from sdjax.diffusion.schedules import ScheduleConfig

RESAMPLINGS = ("none", "loss_second_moment")
HISTORY = 10  # losses of a bin: history_per_term of guided-diffusion
UNIFORM = 0.001  # the share that is drawn evenly: uniform_prob of guided-diffusion
FLOW_BINS = 100  # of a continuous schedule, which has no timesteps to be counted

Memory = Mapping[str, jax.Array]  # "losses" float32 [K, HISTORY], "counts" int32 [K]


class Range(Protocol):
    """The fields of `sdjax.diffusion.losses.ObjectiveConfig` that say what is cut into bins."""

    @property
    def timestep_sampling(self) -> str: ...

    @property
    def resampling_bins(self) -> int: ...

    @property
    def timestep_min(self) -> int: ...

    @property
    def timestep_max(self) -> int: ...


def count_bins(objective: Range, schedule: ScheduleConfig) -> int:
    """The number of bins: as asked, one for each timestep of a table, or FLOW_BINS."""
    if objective.resampling_bins:
        return objective.resampling_bins
    if schedule.kind == "flow":
        return FLOW_BINS
    return _timesteps(objective, schedule)


def is_one_each(objective: Range, schedule: ScheduleConfig, bins: int) -> bool:
    """Whether each bin is one timestep of a table schedule."""
    whole = schedule.kind != "flow" and objective.timestep_sampling == "uniform"
    return whole and bins == _timesteps(objective, schedule)


def _timesteps(objective: Range, schedule: ScheduleConfig) -> int:
    return (objective.timestep_max or schedule.num_train_timesteps) - objective.timestep_min


def empty(count: int) -> dict[str, jax.Array]:
    """The memory of `count` bins before the first loss."""
    return {
        "losses": jnp.zeros((count, HISTORY), jnp.float32),
        "counts": jnp.zeros(count, jnp.int32),
    }


def is_full(memory: Memory) -> jax.Array:
    """Whether every bin has all of its history, bool []."""
    return jnp.all(memory["counts"] >= HISTORY)


def probabilities(memory: Memory) -> jax.Array:
    """The probability of each bin, float32 [K]; even ones until the memory is full."""
    count = len(memory["counts"])
    roots = jnp.sqrt(jnp.mean(memory["losses"] ** 2, axis=-1))  # [K]
    total = roots.sum()
    shares = jnp.where(total > 0, roots / jnp.where(total > 0, total, 1.0), 1.0 / count)
    drawn = shares * (1.0 - UNIFORM) + UNIFORM / count
    return jnp.where(is_full(memory), drawn, 1.0 / count)


def draw(
    memory: Memory, u: jax.Array, *, centred: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Map uniform u [b] to others: (in [0, 1) float32 [b], their bins int32 [b], weights [b]).

    Within a bin they are uniform. Until the memory is full they are u itself, with weights of 1.

    Args:
        centred: all of a bin are its middle, as where a bin is one timestep.
    """
    count, p = len(memory["counts"]), probabilities(memory)
    ends = jnp.cumsum(p)
    drawn = jnp.searchsorted(ends, u * ends[-1], side="right")
    drawn = jnp.minimum(drawn, count - 1)
    within = (u * ends[-1] - (ends[drawn] - p[drawn])) / p[drawn]
    within = jnp.full_like(u, 0.5) if centred else jnp.clip(within, 0.0, 1.0 - 1e-6)
    plain = jnp.minimum(jnp.floor(u * count), count - 1).astype(jnp.int32)
    full = is_full(memory)
    chosen = jnp.where(full, drawn, plain).astype(jnp.int32)
    weight = jnp.where(full, 1.0 / (count * p[drawn]), 1.0)
    moved = jnp.minimum((drawn + within) / count, 1.0 - 2.0**-24)
    return jnp.where(full, moved, u), chosen, weight


def remembered(memory: Memory, bins: jax.Array, losses: jax.Array) -> dict[str, jax.Array]:
    """The memory after the losses [B] of some bins int32 [B], of which the last ten of each stay.

    Places of a bin's history are taken in turn. The result does not depend on how a batch is spread
    over devices, since the losses stand in the order of the global batch.
    """
    count = len(memory["counts"])
    order = jnp.argsort(bins, stable=True)
    bins, losses = bins[order], losses[order].astype(jnp.float32)
    first = jnp.searchsorted(bins, bins, side="left")
    end = jnp.searchsorted(bins, bins, side="right")
    before = jnp.arange(len(bins)) - first  # losses of the same bin that came earlier
    place = (memory["counts"][bins] + before) % HISTORY
    kept = jnp.arange(len(bins)) >= end - HISTORY
    row = jnp.where(kept, bins, count)  # beyond the last bin, what is written is dropped
    return {
        "losses": memory["losses"].at[row, place].set(losses, mode="drop"),
        "counts": memory["counts"].at[bins].add(1),
    }
