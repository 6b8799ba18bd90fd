"""One optimizer step: loss -> gradients -> optax -> EMA, as one jittable function.

Everything random in it is a function of (seed, step, position of the example in the global batch),
so neither the mesh, nor the number of hosts, nor gradient accumulation changes the loss, and a
resumed run repeats an unbroken one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.diffusion.losses import example_keys
from sdjax.methods.method import COPY, Aux, Averages, Batch, Draw, Phase
from sdjax.models.params import Params
from sdjax.optim import ema as ema_lib
from sdjax.train.monitoring.telemetry import (
    bucket_means,
    group_norms,
    squares,
    total_norm,
)
from sdjax.train.state import MEMORY, Optimization, State

TrainStep = Callable[[State, Params, Batch], tuple[State, dict[str, Any]]]
Spread = Callable[[Params], Params]


def make_train_step(
    optimizations: Sequence[Optimization],
    *,
    positions: np.ndarray,
    seed: int,
    accumulation: int,
    buckets: int,
    num_timesteps: int,
    copied_at: Sequence[int] = (),
    spread: Spread | None = None,
) -> TrainStep:
    """Build `train_step(state, frozen, batch) -> (state, metrics)`.

    Args:
        optimizations: run in this order within a step; each sees what those before it have trained,
            and the mean of its loss over the global batch is minimised.
        positions: int32 [B], for each row of the batch its place in the stream of examples.
        accumulation: micro-batches computed one after the other; the result is that of the whole
            batch.
        buckets: the loss is reported for so many ranges of the timestep.
        copied_at: see `Method.copied_at`.
        spread: splits gradients, and parameters, over the devices that share the update (see
            `sdjax.parallel.sharding.train_shardings`); the caller's output shardings join the new
            parameters again.

    Metrics are scalars on the device: loss, norms of gradients and parameters, in all and per
    module group, the ratio of update to weights per module group, loss per timestep bucket, and
    `finite`. With several phases each has its own under `phases`, and the loss is the first's. A
    phase whose loss or gradient has a NaN or Inf changes nothing but the counters.
    """

    def train_step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        params, opt_state = state["params"], dict(state["opt_state"])
        moved = params  # as `params`, but with the NaN and Inf of phases that are undone
        found: dict[str, dict[str, Any]] = {}
        averages, copies = dict(state["ema"]), jnp.zeros((), jnp.int32)
        if copied_at:
            averages[COPY] = state[COPY]
            copies = jnp.sum(_updates(state) >= jnp.asarray(copied_at)).astype(jnp.int32)
        for i, one in enumerate(optimizations):
            own = jax.random.fold_in(key, i) if i else key
            draw = functools.partial(_draw, own, state, one, copies, len(positions))
            gradients = _gradients(one, frozen, averages, draw, positions, accumulation, spread)
            phase_step = functools.partial(
                _advance, one, gradients, batch, frozen, state["step"], spread=spread
            )
            name = one.phase.name
            new, params, opt_state[name], found[name] = _every(
                one.phase, state["step"], phase_step, params, opt_state[name]
            )
            moved = moved | new
        finite = functools.reduce(jnp.logical_and, [part["finite"] for part in found.values()])
        memories = _remembered(state, optimizations, found, positions)
        new_state = _finish(state, moved, params, opt_state, finite, copied_at, memories)
        return new_state, _metrics(found, new_state, buckets, num_timesteps)

    return train_step


def _draw(
    key: jax.Array, state: State, one: Optimization, copies: jax.Array, batch_size: int,
    positions: jax.Array,
) -> Draw:  # fmt: skip
    """The randomness of the examples at hand."""
    keys, memory = example_keys(key, positions), state.get(MEMORY, {}).get(one.phase.name, {})
    return Draw(key, keys, positions, batch_size, state["step"], copies, memory)


def _either(finite: jax.Array, new: Any, old: Any) -> Any:
    """The new arrays after a step that was finite, else the old ones."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def _remembered(
    state: State,
    optimizations: Sequence[Optimization],
    found: dict[str, dict[str, Any]],
    positions: np.ndarray,
) -> dict[str, Any]:
    """The memories of the phases after a step; what is remembered leaves the metrics."""
    memories = {}
    for one in optimizations:
        name, memory = one.phase.name, one.phase.memory
        if memory is None:
            continue
        aux, old = found[name]["aux"], state[MEMORY][name]
        seen = {entry: aux[entry][np.argsort(positions)] for entry in memory.reads}
        found[name]["aux"] = {k: v for k, v in aux.items() if k not in memory.reads}
        due = found[name]["finite"] & (state["step"] % one.phase.every == 0)
        due &= state["step"] >= one.phase.first
        memories[name] = _either(due, memory.remember(old, seen), old)
    return memories


def _updates(state: State) -> jax.Array:
    """The updates that were done: the steps but for those that were skipped."""
    return state["step"] - state["health"]["skipped"]


def _gradients(
    one: Optimization,
    frozen: Params,
    averages: Averages,
    draw: Callable[[jax.Array], Draw],
    positions: np.ndarray,
    accumulation: int,
    spread: Spread | None,
) -> Callable[[Params, Params, Batch], tuple[jax.Array, Aux, Params]]:
    """(what the phase trains, what other phases train, batch) -> loss, aux, gradients."""

    def mean_loss(
        trained: Params, others: Params, part: Batch, positions: jax.Array
    ) -> tuple[jax.Array, Aux]:
        every = {**others, **trained}
        per_example, aux = one.phase.loss(every, frozen, averages, part, draw(positions))
        if "weight" in part:
            per_example = per_example * part["weight"]
        return jnp.mean(per_example), aux

    def value_and_grad(*args: Any) -> tuple[tuple[jax.Array, Aux], Params]:
        loss_and_aux, grads = jax.value_and_grad(mean_loss, has_aux=True)(*args)
        return loss_and_aux, spread(grads) if spread else grads

    def gradients(trained: Params, others: Params, batch: Batch) -> tuple[jax.Array, Aux, Params]:
        if accumulation == 1:
            (loss, aux), grads = value_and_grad(trained, others, batch, jnp.asarray(positions))
            return loss, aux, grads
        return _accumulate(
            value_and_grad, trained, others, batch, jnp.asarray(positions), accumulation
        )

    return gradients


def _advance(
    one: Optimization,
    gradients: Callable[[Params, Params, Batch], tuple[jax.Array, Aux, Params]],
    batch: Batch,
    frozen: Params,
    step: jax.Array,
    params: Params,
    opt_state: Any,
    *,
    spread: Spread | None,
) -> tuple[Params, Params, Any, dict[str, Any]]:
    """Return what the phase trains, all parameters, the optimizer's state, and metrics, after it.

    A NaN or Inf leaves the second and the third as they were.
    """
    own = {path: value for path, value in params.items() if path in one.paths}
    others = {path: value for path, value in params.items() if path not in one.paths}
    loss, aux, grads = gradients(own, others, batch)
    own = spread(own) if spread else own
    grad_norm = optax.tree.norm(grads)
    updates, new_opt_state = one.optimizer.update(grads, opt_state, own)
    updates = _within(one, step, updates, jax.tree.map(jnp.zeros_like, updates))
    new = optax.apply_updates(own, updates)
    new = one.phase.project(new, frozen) if one.phase.project else new
    new = _within(one, step, new, own)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    kept = _either(finite, (new, new_opt_state), (own, opt_state))
    moved = squares(updates)
    metrics = {
        "finite": finite,
        "loss": loss,
        "aux": aux,
        "grad_norm": grad_norm,
        "grad_norms": group_norms(squares(grads)),  # which clipping computes too
        "update_norm": total_norm(moved),
        **_relative(group_norms(moved), group_norms(squares(kept[0]))),
    }
    return new, {**others, **kept[0]}, kept[1], metrics


def _within(one: Optimization, step: jax.Array, new: Params, old: Params) -> Params:
    """The new arrays; the old ones of paths that this step does not train."""
    kept = dict(new)
    for path, (first, end) in one.spans.items():
        kept[path] = jnp.where((step >= first) & (step < end), new[path], old[path])
    return kept


def _every(
    phase: Phase, step: jax.Array, phase_step: Callable, params: Params, opt_state: Any
) -> tuple[Params, Params, Any, dict[str, Any]]:
    """A phase at the steps that it takes; at others its metrics are NaN, and finite."""
    if phase.every == 1 and not phase.first:
        return phase_step(params, opt_state)
    new, _, _, metrics = jax.eval_shape(phase_step, params, opt_state)

    def rest(params: Params, opt_state: Any) -> tuple[Params, Params, Any, dict[str, Any]]:
        blank = {name: value for name, value in metrics.items() if name != "finite"}
        blank = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), blank)
        own = {path: params[path] for path in new}
        return own, params, opt_state, blank | {"finite": jnp.asarray(True)}

    due = (step % phase.every == 0) & (step >= phase.first)
    return jax.lax.cond(due, phase_step, rest, params, opt_state)


def _finish(
    state: State,
    moved: Params,
    params: Params,
    opt_state: Any,
    finite: jax.Array,
    copied_at: Sequence[int],
    memories: dict[str, Any],
) -> State:
    """The next state; averages follow only steps in which every phase was finite."""
    updates = _updates(state) + 1
    averages = ema_lib.update(state["ema"], moved, updates)
    copied = {}
    if copied_at:
        taken = finite & jnp.any(updates == jnp.asarray(copied_at))
        copied[COPY] = _either(taken, params, state[COPY])
    skipped = 1 - finite.astype(jnp.int32)
    return {
        "params": params,
        "opt_state": opt_state,
        "ema": _either(finite, averages, state["ema"]),
        **copied,
        **({MEMORY: memories} if memories else {}),
        "step": state["step"] + 1,
        "health": {
            "skipped": state["health"]["skipped"] + skipped,
            "in_a_row": (state["health"]["in_a_row"] + 1) * skipped,
        },
    }


def _metrics(
    found: dict[str, dict[str, Any]], state: State, buckets: int, num_timesteps: int
) -> dict[str, Any]:
    """The metrics of a step from those of its phases."""
    first = next(iter(found.values()))
    aux = first["aux"]
    metrics = {**first, "aux": _means(aux), "health": state["health"]}
    metrics["finite"] = state["health"]["in_a_row"] == 0
    if "timesteps" in aux:
        metrics["buckets"] = bucket_means(aux["loss"], aux["timesteps"], buckets, num_timesteps)
    if len(found) > 1:
        metrics["phases"] = {
            name: {**part, "aux": _means(part["aux"])} for name, part in found.items()
        }
    return metrics


def _means(aux: Aux) -> dict[str, jax.Array]:
    return {name: jnp.mean(value) for name, value in aux.items() if name != "timesteps"}


def _relative(
    update_norms: dict[str, jax.Array], param_norms: dict[str, jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """Per module group, what an update is of the weights, and their norm."""
    ratios = {g: norm / jnp.maximum(param_norms[g], 1e-12) for g, norm in update_norms.items()}
    return {"param_norms": param_norms, "update_ratios": ratios}


def _accumulate(
    value_and_grad: Callable,
    params: Params,
    others: Params,
    batch: Batch,
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
        (loss, aux), grads = value_and_grad(params, others, *part)
        return jax.tree.map(jnp.add, carry, (loss, grads)), aux

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    (loss, grads), aux = jax.lax.scan(body, zero, jax.tree.map(split, (batch, positions)))
    # [parts, B / parts] -> [B], as the batch has them
    aux = {name: jnp.swapaxes(value, 0, 1).reshape(-1) for name, value in aux.items()}
    return loss / parts, aux, jax.tree.map(lambda g: g / parts, grads)
