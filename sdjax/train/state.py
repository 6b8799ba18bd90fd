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

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sdjax.train import ema as ema_lib

Params = dict[str, jax.Array]
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


def component(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of one network, without its prefix: `unet.conv_in.bias` -> `conv_in.bias`."""
    prefix = name + "."
    return {path[len(prefix) :]: v for path, v in params.items() if path.startswith(prefix)}


def prefixed(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Inverse of `component`."""
    return {f"{name}.{path}": value for path, value in params.items()}
