"""Train state: one plain dict of arrays, so that jit, optax and Orbax see nothing but a pytree.

    params     {path: array}, what is trained, float32
    opt_state  {phase: optax's}
    ema        {profile: {path: array}}, float32
    copy       {path: array}, of methods that take one (`Method.copied_at`); else it is not there
    memory     {phase: {name: array}}, of phases that have one (`Phase.memory`); else not there
    step       int32 [], optimizer steps done (skipped ones included)
    health     {"skipped": int32 [], "in_a_row": int32 []}, steps with a NaN or Inf

What is not trained (the VAE, a frozen text encoder) is another dict, `frozen`, with the same kind
of paths; it is an argument of the step and never part of a checkpoint's moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from sdjax.methods.method import COPY, Phase
from sdjax.models.params import Params
from sdjax.optim import ema as ema_lib

State = dict[str, Any]
MEMORY = "memory"


@dataclasses.dataclass(frozen=True, eq=False)
class Optimization:
    """A phase of a method with its optimizer.

    paths: of what it trains.
    spans: {path: (first step, the step after the last)} of those that not every step trains.
    """

    phase: Phase
    optimizer: optax.GradientTransformation
    paths: frozenset[str]
    spans: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


def init_state(
    params: Params,
    optimizations: Sequence[Optimization],
    ema: ema_lib.EMAConfig,
    *,
    copied: bool = False,
) -> State:
    """Return the state at step 0 (jittable; under `jax.eval_shape` it costs no memory).

    Args:
        copied: whether the method takes copies, see `Method.copied_at`.
    """
    memories = {o.phase.name: o.phase.memory.begin() for o in optimizations if o.phase.memory}
    copy = {path: jnp.array(value, copy=True) for path, value in params.items()}
    return {
        "params": params,
        "opt_state": {
            one.phase.name: one.optimizer.init({p: params[p] for p in params if p in one.paths})
            for one in optimizations
        },
        "ema": ema_lib.init(ema, params),
        **({COPY: copy} if copied else {}),
        **({MEMORY: memories} if memories else {}),
        "step": jnp.zeros((), jnp.int32),
        "health": {"skipped": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
    }
