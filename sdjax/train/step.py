"""One optimizer step: loss -> gradients -> optax -> EMA, as one jittable function.

Everything random in it is a function of (seed, step, position of the example in the global batch),
so neither the mesh, nor the number of hosts, nor gradient accumulation changes the loss, and a
resumed run repeats an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.diffusion.losses import example_keys
from sdjax.models.params import Params
from sdjax.optim import ema as ema_lib
from sdjax.train.monitoring.telemetry import bucket_means, group_norms
from sdjax.train.state import State

# loss_fn(params, frozen, batch, key=, keys=[b], positions=[b], batch_size=)
#   -> per-example loss [b] float32, aux {name: [b] float32}
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    positions: np.ndarray,
    seed: int,
    accumulation: int,
    buckets: int,
    num_timesteps: int,
    spread: Callable[[Params], Params] | None = None,
) -> Callable[[State, Params, dict[str, jax.Array]], tuple[State, dict[str, Any]]]:
    """Build `train_step(state, frozen, batch) -> (state, metrics)`.

    Args:
        loss_fn: see `LossFn`; its mean over the global batch is minimised.
        positions: int32 [B], for each row of the batch its place in the stream of examples.
        accumulation: micro-batches computed one after the other; the result is that of the whole
        batch.
        buckets: the loss is reported for so many ranges of the timestep.
        spread: splits gradients, and parameters, over the devices that share the update (see
            `sdjax.parallel.sharding.train_shardings`); the caller's output shardings join the new
            parameters again.

    Metrics are scalars on the device: loss, norms of gradients and parameters, in all and per
    module group, the ratio of update to weights per module group, loss per timestep bucket, and
    `finite`. A step whose loss or gradient has a NaN or Inf changes
    nothing but the counters.
    """

    def train_step(
        state: State, frozen: Params, batch: dict[str, jax.Array]
    ) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        batch_size = len(positions)

        def mean_loss(params: Params, part: dict[str, jax.Array], positions: jax.Array):
            per_example, aux = loss_fn(
                params,
                frozen,
                part,
                key=key,
                keys=example_keys(key, positions),
                positions=positions,
                batch_size=batch_size,
            )
            return jnp.mean(per_example), aux

        def value_and_grad(*args: Any):
            loss_and_aux, grads = jax.value_and_grad(mean_loss, has_aux=True)(*args)
            return loss_and_aux, spread(grads) if spread else grads

        if accumulation == 1:
            (loss, aux), grads = value_and_grad(state["params"], batch, jnp.asarray(positions))
        else:
            loss, aux, grads = _accumulate(
                value_and_grad, state["params"], batch, jnp.asarray(positions), accumulation
            )

        old = state | {"params": spread(state["params"])} if spread else state
        new_state, metrics = _advance(old, loss, grads, optimizer)
        metrics |= {
            "loss": loss,
            "grad_norms": group_norms(grads),
            **_relative(metrics.pop("update_norms"), group_norms(new_state["params"])),
            "aux": {name: jnp.mean(value) for name, value in aux.items() if name != "timesteps"},
        }
        if "timesteps" in aux:
            metrics["buckets"] = bucket_means(aux["loss"], aux["timesteps"], buckets, num_timesteps)
        return new_state, metrics

    return train_step


def _advance(
    state: State, loss: jax.Array, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[State, dict[str, Any]]:
    """The next state, which a NaN or Inf leaves as it was but for the counters; and its metrics."""
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates_done = state["step"] - state["health"]["skipped"]
    done = {
        "params": params,
        "opt_state": opt_state,
        "ema": ema_lib.update(state["ema"], params, updates_done + 1),
    }
    kept = {name: state[name] for name in done}
    new_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), done, kept)
    skipped = 1 - finite.astype(jnp.int32)
    new_state["step"] = state["step"] + 1
    new_state["health"] = {
        "skipped": state["health"]["skipped"] + skipped,
        "in_a_row": (state["health"]["in_a_row"] + 1) * skipped,
    }
    metrics = {
        "finite": finite,
        "grad_norm": grad_norm,
        "update_norm": optax.tree.norm(updates),
        "update_norms": group_norms(updates),
        "health": new_state["health"],
    }
    return new_state, metrics


def _relative(
    update_norms: dict[str, jax.Array], param_norms: dict[str, jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """Per module group, what an update is of the weights, and their norm."""
    ratios = {g: norm / jnp.maximum(param_norms[g], 1e-12) for g, norm in update_norms.items()}
    return {"param_norms": param_norms, "update_ratios": ratios}


def _accumulate(
    value_and_grad: Callable,
    params: Params,
    batch: dict[str, jax.Array],
    positions: jax.Array,
    parts: int,
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
    """Loss, aux and gradients of the whole batch, one micro-batch in memory at a time.

    Micro-batch j takes examples j, j + parts, ...: each device then cuts its own block and nothing
    moves between devices.
    """

    def split(x: jax.Array) -> jax.Array:  # [B, ...] -> [parts, B / parts, ...]
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def body(carry, part):
        (loss, aux), grads = value_and_grad(params, *part)
        return jax.tree.map(jnp.add, carry, (loss, grads)), aux

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    (loss, grads), aux = jax.lax.scan(body, zero, jax.tree.map(split, (batch, positions)))
    aux = {name: value.reshape(-1) for name, value in aux.items()}
    return loss / parts, aux, jax.tree.map(lambda g: g / parts, grads)
