"""Train state: one plain dict of arrays, so that jit, optax and Orbax see nothing but a pytree.

    params     {path: array}, what is trained, float32
    opt_state  optax's
    ema        {profile: {path: array}}, float32
    step       int32 [], optimizer steps done (skipped ones included)
    health     {"skipped": int32 [], "in_a_row": int32 []}, steps with a NaN or Inf

What is not trained (the VAE, a frozen text encoder) is another dict, `frozen`, with the same kind
of paths; it is an argument of the step and never part of a checkpoint's moments.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from sdjax.models.params import Params
from sdjax.optim import ema as ema_lib

State = dict[str, Any]


def init_state(
    params: Params, optimizer: optax.GradientTransformation, ema: ema_lib.EMAConfig
) -> State:
    """The state at step 0 (jittable; under `jax.eval_shape` it costs no memory)."""
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "ema": ema_lib.init(ema, params),
        "step": jnp.zeros((), jnp.int32),
        "health": {"skipped": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
    }
