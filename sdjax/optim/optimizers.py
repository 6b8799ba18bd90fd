"""Optimizers and learning-rate schedules, from one frozen config to one optax transformation.

Every optimizer is the same chain: clip by global norm, the optimizer's direction, weight decay,
the multiplier of the parameter group, the learning rate. Parameters are one flat dict
`{path: array}`; groups are regular expressions over its paths. All state is float32, whatever the
dtype of the parameters, unless `optim.moments` says otherwise.

A learning-rate schedule is a function of the number of optimizer steps already taken: it does not
depend on devices, hosts or gradient accumulation. Step `k` (from 0) uses `schedule(k)`; the last
one, `total_steps - 1`, uses `end_value`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sdjax.errors import UserError
from sdjax.models.stacked_paths import leading_axes
from sdjax.optim.moments import in_blocks
from sdjax.optim.muon import scale_by_muon
from sdjax.optim.stacked import each_block

OPTIMIZERS = (
    "adamw", "adam", "adafactor", "lion", "rmsprop", "sgd", "muon", "schedule_free",
)  # fmt: skip
# The formats of the moments between steps, and the optimizers that have them.
MOMENTS = {
    "float32": OPTIMIZERS,
    "bfloat16": ("adamw", "adam", "lion", "muon"),
    "8bit": ("adamw", "adam"),
}
SCHEDULES = ("constant", "linear", "cosine", "rsqrt", "piecewise", "polynomial")

# These decay by a penalty in the gradient, as torch.optim's Adam, SGD and RMSprop do. All others
# decouple it from the direction: p -= lr * (direction + weight_decay * p).
_L2_DECAY = ("adam", "sgd", "rmsprop")

# The RMS of AdamW's updates (Liu et al. 2025, "Muon is Scalable for LLM Training"), so that one
# learning rate serves the matrices (muon) and all other parameters (adam).
_MUON_RMS = 0.2

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """One optimizer with its schedule.

    Attributes:
      name: one of `OPTIMIZERS`. `muon` orthogonalises the kernels of linear layers and of
        convolutions (as a `[kh*kw*cin, cout]` matrix) except `conv_in` and `conv_out`; all other
        parameters take adam. `schedule_free` is AdamW; evaluate with `eval_params`.
      learning_rate: the peak, reached after `warmup_steps`.
      b1, b2: decays of the first and second moment; `rmsprop` uses b2, `schedule_free` takes b1
        as its interpolation.
      eps: added to the root of the second moment; not used by adafactor, lion and sgd.
      weight_decay: on parameters of two and more dimensions only: biases and the scales of norms
        are left alone. `adam`, `sgd` and `rmsprop` add it to the gradient, as torch does; all
        others decay apart from the direction, scaled by the learning rate.
      momentum: of `sgd`, `rmsprop` and `muon` (0.95 is usual there).
      schedule: one of `SCHEDULES`, after a linear warm-up from 0.
      warmup_steps: optimizer steps from 0 to the peak.
      end_value: learning rate of the last step (linear, cosine, polynomial), or the floor (rsqrt).
      power: exponent of `polynomial`.
      rsqrt_steps: `rsqrt` holds the peak until this step, then decays as sqrt(rsqrt_steps / step)
        (EDM2's learning-rate decay); below `warmup_steps` it starts where the warm-up ends.
      cycle_steps: after so many steps the schedule begins anew, warm-up and all, and each cycle
        ends with `end_value`, if the schedule does; 0 = never.
      boundaries, scales: `piecewise` multiplies the rate by `scales[i]` from step
        `boundaries[i]` on.
      clip_norm: largest global norm of the gradient, 0 = no clipping.
      groups: `(regex, multiplier)` pairs searched in the parameter path; the first that matches
        multiplies the learning rate, 0.0 freezes. A path that none matches has multiplier 1.
      moments: their format between steps, one of `MOMENTS`: "float32"; "bfloat16", the first
        alone, the second stays in float32; "8bit", both (see `sdjax.optim.moments`).

    Raises UserError where a field is out of its range or does not go with `name`.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "constant"
    warmup_steps: int = 0
    end_value: float = 0.0
    power: float = 1.0
    rsqrt_steps: int = 0
    cycle_steps: int = 0
    boundaries: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    clip_norm: float = 1.0
    groups: tuple[tuple[str, float], ...] = ()
    moments: str = "float32"

    def __post_init__(self) -> None:
        _check("name", self.name, self.name in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        _check(
            "schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"
        )
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "a number above 0")
        low = 0.0 if self.name != "schedule_free" else 1e-6
        _check("b1", self.b1, low <= self.b1 < 1, f"in [{low}, 1) for {self.name}")
        for field in ("b2", "momentum"):
            value = getattr(self, field)
            _check(field, value, 0 <= value < 1, "in [0, 1)")
        for field in ("eps", "weight_decay", "end_value", "warmup_steps", "rsqrt_steps",
                      "cycle_steps", "clip_norm"):  # fmt: skip
            value = getattr(self, field)
            _check(field, value, value >= 0, "0 or more")
        _check("power", self.power, self.power > 0, "above 0")
        _check("moments", self.moments, self.moments in MOMENTS, f"one of {', '.join(MOMENTS)}")
        able = MOMENTS[self.moments]
        expected = f"'float32' with optim.name={self.name!r}; only {', '.join(able)} keep such"
        _check("moments", self.moments, self.name in able, expected)
        self._check_piecewise()
        self._check_groups()

    def _check_piecewise(self) -> None:
        rising = all(a < b for a, b in zip((self.warmup_steps, *self.boundaries), self.boundaries,
                                           strict=False))  # fmt: skip
        _check("boundaries", self.boundaries, rising, "rising steps above warmup_steps")
        same = len(self.boundaries) == len(self.scales)
        _check("scales", self.scales, same, f"one per boundary, {len(self.boundaries)}")
        if self.schedule == "piecewise":
            _check("boundaries", self.boundaries, len(self.boundaries) > 0, "at least one step")

    def _check_groups(self) -> None:
        for group in self.groups:
            pair = isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], str)
            _check("groups", group, pair, "pairs (regex, learning-rate multiplier)")
            _check("groups", group, group[1] >= 0, "a multiplier of 0 (frozen) or more")
            try:
                re.compile(group[0])
            except re.error as error:
                raise UserError(f"optim.groups: {group[0]!r} is no regex: {error}") from error


def _check(field: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise UserError(f"optim.{field}={value!r}: expected {expected}")


def make_lr_schedule(cfg: OptimConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the optimizer steps already taken.

    If `total_steps` ends within the warm-up, the peak and `end_value` are never reached.
    Raises UserError where `total_steps` is less than 1.
    """
    if total_steps < 1:
        raise UserError(f"total_steps={total_steps}: expected 1 or more")
    if cfg.cycle_steps:
        one = make_lr_schedule(dataclasses.replace(cfg, cycle_steps=0), cfg.cycle_steps)
        return lambda count: one(jnp.asarray(count) % cfg.cycle_steps)
    warmup, peak, end = cfg.warmup_steps, cfg.learning_rate, cfg.end_value
    decay = max(total_steps - 1 - warmup, 1)  # the last step is total_steps - 1
    after: optax.Schedule
    if cfg.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif cfg.schedule == "linear":
        after = _until(decay, end, optax.linear_schedule(peak, end, decay))
    elif cfg.schedule == "polynomial":
        after = _until(decay, end, optax.polynomial_schedule(peak, end, cfg.power, decay))
    elif cfg.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(1.0, decay)
        after = _until(decay, end, lambda count: end + (peak - end) * cosine(count))
    elif cfg.schedule == "rsqrt":
        start = max(cfg.rsqrt_steps, warmup, 1)
        after = lambda count: jnp.maximum(  # noqa: E731
            peak * jnp.sqrt(start / jnp.maximum(count + warmup, start)), end
        )
    else:
        steps = {b - warmup: s for b, s in zip(cfg.boundaries, cfg.scales, strict=True)}
        after = optax.piecewise_constant_schedule(peak, steps)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _until(steps: int, end: float, decay: optax.Schedule) -> optax.Schedule:
    """Return the schedule that is `end` from step `steps` on.

    XLA multiplies by 1 / steps where optax divides: a compiled 1 - count / steps may end at -3e-8.
    """
    return lambda count: jnp.where(jnp.asarray(count) < steps, decay(count), end)


def multipliers(cfg: OptimConfig, paths: Iterable[str]) -> dict[str, float]:
    """The learning-rate multiplier of each path, from the first group whose regex is found in it.

    Raises:
      UserError: some groups take no path; the message names them, and some of the paths.
    """
    rates: dict[str, float] = {}
    taken = [0] * len(cfg.groups)
    for path in paths:
        rates[path] = 1.0
        for i, (pattern, multiplier) in enumerate(cfg.groups):
            if re.search(pattern, path):
                rates[path] = float(multiplier)
                taken[i] += 1
                break
    idle = [cfg.groups[i][0] for i, count in enumerate(taken) if count == 0]
    if idle:
        examples = ", ".join(sorted(rates)[:: max(1, len(rates) // 5)][:6])
        raise UserError(
            f"optim.groups: {idle} match no parameter that an earlier group has not taken. "
            f"Paths are like: {examples}"
        )
    return rates


def trainable_paths(cfg: OptimConfig, paths: Iterable[str]) -> set[str]:
    """The paths that no group freezes."""
    return {path for path, m in multipliers(cfg, paths).items() if m != 0}


def decay_mask(params: Params) -> dict[str, bool]:
    """Whether weight decay applies to each path: to kernels and tables, not to norms and biases."""
    return {path: leaf.ndim - leading_axes(path) > 1 for path, leaf in params.items()}


def is_muons(path: str, ndim: int) -> bool:
    """Whether muon takes a parameter; adam takes all others.

    As Muon's author advises, the first and the last layer and embeddings go to adam.
    """
    ends = re.search(r"(^|\.)conv_(in|out)\.", path)
    return path.endswith("kernel") and ndim - leading_axes(path) > 1 and not ends


def make_optimizer(
    cfg: OptimConfig,
    total_steps: int,
    abstract_params: Params,
    *,
    all_paths: Iterable[str] | None = None,
    factors: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optax transformation for a flat dict of parameters.

    Frozen parameters may be in `abstract_params` or be left out (see `trainable_paths`). They have
    no moments either way, and the optimizer state is the same.

    Args:
      cfg: the optimizer.
      total_steps: optimizer steps of the whole run, for the schedule.
      abstract_params: `{path: array or ShapeDtypeStruct}`, as `init` and `update` take them.
      all_paths: the paths that `cfg.groups` is about, if they are more than these.
      factors: `{path: factor of its learning rate}` besides the group's, above 0; 1 for others.

    Raises:
      UserError: a group takes no path, or `total_steps` is less than 1.
    """
    every = set(abstract_params) | set(all_paths or ())
    rates = multipliers(cfg, sorted(every))
    trained = {p: leaf for p, leaf in abstract_params.items() if rates[p] != 0}
    schedule = _apart(make_lr_schedule(cfg, total_steps))
    decay = optax.add_decayed_weights(cfg.weight_decay, decay_mask(trained))
    direction = _direction(cfg, trained)
    parts = [decay, direction] if cfg.name in _L2_DECAY else [direction, decay]
    factors = factors or {}
    parts += [_scale_groups({p: rates[p] * factors.get(p, 1.0) for p in trained})]
    tx = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if cfg.name == "schedule_free":
        tx = contrib.schedule_free(tx, schedule, b1=cfg.b1)
    # No part is left out when its rate is 0, so the state has one structure for all rates.
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm > 0 else optax.identity()
    tx = optax.chain(clip, tx)
    return _on_trained(tx, tuple(trained))


def _apart(schedule: optax.Schedule) -> optax.Schedule:
    """The same learning rate, which XLA computes in one place.

    XLA for CPUs would compute it, cosine and all, in the kernel of every array's update, which
    takes the compiler long. It moves nothing out of a conditional.
    """

    def rate(count: jax.Array) -> jax.Array:
        return jax.lax.cond(  # no count is below 0, but XLA does not know that
            count < 0,
            lambda _: jnp.zeros((), jnp.float32),
            lambda count: jnp.asarray(schedule(count), jnp.float32),
            count,
        )

    return rate


def _direction(cfg: OptimConfig, params: Params) -> optax.GradientTransformation:
    """The direction of an update at learning rate 1, without weight decay; it is subtracted."""
    first = jnp.bfloat16 if cfg.moments == "bfloat16" else None  # None: the parameters' dtype
    if cfg.name in ("adamw", "adam"):
        adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=first)
        return in_blocks(adam) if cfg.moments == "8bit" else adam
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.b1, cfg.b2, mu_dtype=first)
    if cfg.name == "sgd":
        return optax.trace(cfg.momentum) if cfg.momentum > 0 else optax.identity()
    if cfg.name == "rmsprop":
        rms = optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False)
        return optax.chain(rms, optax.trace(cfg.momentum)) if cfg.momentum > 0 else rms
    if cfg.name == "adafactor":
        factored = optax.chain(optax.adafactor(learning_rate=None), optax.scale(-1.0))
        return each_block(factored, params)
    if cfg.name == "muon":
        matrix = scale_by_muon(momentum=cfg.momentum, eps=cfg.eps, rms=_MUON_RMS, mu_dtype=first)
        adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=first, nesterov=True)
        labels = {p: "muon" if is_muons(p, v.ndim) else "adam" for p, v in params.items()}
        return optax.partition({"muon": matrix, "adam": adam}, labels)
    # schedule_free: AdamW without its first moment (optax.contrib.schedule_free_adamw).
    return optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False, bias_correction=True)


def _scale_groups(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiply each update by the multiplier of its group."""

    def scale(path: str, update: jax.Array) -> jax.Array:
        return update if rates[path] == 1 else update * rates[path]

    return optax.stateless(lambda updates, _: {p: scale(p, u) for p, u in updates.items()})


def _on_trained(
    tx: optax.GradientTransformation, paths: tuple[str, ...]
) -> optax.GradientTransformation:
    """Apply `tx` in float32 to these paths of the dict; the updates of all others are zero."""

    def pick(tree: Params) -> dict[str, jax.Array]:
        return {p: jnp.asarray(tree[p], jnp.float32) for p in paths}

    def init(params: Params) -> optax.OptState:
        return tx.init(pick(params))

    def update(
        grads: Params, state: optax.OptState, params: Params
    ) -> tuple[dict[str, jax.Array], optax.OptState]:
        updates, state = tx.update(pick(grads), state, pick(params))
        frozen = {p: jnp.zeros_like(g) for p, g in grads.items() if p not in updates}
        return {**updates, **frozen}, state

    return optax.GradientTransformation(init, update)


def eval_params(opt_state: optax.OptState, params: Params) -> dict[str, jax.Array]:
    """The parameters to evaluate, sample and export with: schedule-free's average, else `params`.

    Schedule-free takes gradients at `y = b1 x + (1 - b1) z`. Training holds y as its parameters;
    the model is `x`.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_schedule_free)
             if _is_schedule_free(s)]  # fmt: skip
    if not found:
        return dict(params)
    averaged: dict[str, jax.Array] = {}
    for state in found:
        averaged |= contrib.schedule_free_eval_params(state, {p: params[p] for p in state.z})
    return {p: jnp.asarray(averaged.get(p, leaf), leaf.dtype) for p, leaf in params.items()}


_is_schedule_free: Callable[[Any], bool] = lambda s: isinstance(s, contrib.ScheduleFreeState)  # noqa: E731
