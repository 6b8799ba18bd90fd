"""The training objective: draw a timestep and noise, compare the network's output with its target.

Everything random is a function of one key per example. The key is a function of the step's key and
of the position in the global batch. The loss does not depend on hosts, mesh or gradient
accumulation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.diffusion import prediction, resampling, timesteps, weighting
from sdjax.diffusion.schedules import Schedule, ScheduleConfig, schedule_at

LOSSES = ("l2", "huber")
HUBER_SCHEDULES = ("constant", "exponential", "snr")

BINS, BIN_LOSSES = "resampling_bins", "resampling_losses"  # what a resampler remembers

# Constants folded into an example's key, one per draw. Callers take CALLER_STREAM and up.
NOISE, TIMESTEP, OFFSET, PERTURBATION, CAPTION, UNMASKED = range(6)
CALLER_STREAM = 16
# Constants folded into a step's key: one stream for the examples, one for what the batch shares.
_EXAMPLES, _BATCH = 0, 1


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The target of the network and the weight of its errors.

    prediction_type: "epsilon", "v_prediction", "sample" or "flow".
    timestep_sampling: "uniform", "logit_normal" (logit_mean, logit_std), "mode" (mode_scale),
      "cosmap" or "cubic".
    logit_mean, logit_std: mean and deviation of the timestep's logit in "logit_normal".
    mode_scale: s of "mode" (SD3, arXiv 2403.03206, section 3.1); 0 is uniform.
    stratified: spread the timesteps evenly over the global batch instead of drawing each alone.
    resampling: "none", or "loss_second_moment": timesteps of large losses more often, weighted so
      that the loss keeps its expectation (`sdjax.diffusion.resampling`).
    resampling_bins: parts of the range of timesteps that have a history each; 0 is one for each
      timestep of a table schedule, and 100 for flow.
    timestep_min, timestep_max: train on t in [min, max) only; a max of 0 is the schedule's end.
    weighting: "uniform", "min_snr" (min_snr_gamma), "p2" (p2_k, p2_gamma), "debiased",
      "edm" (sigma_data), "cosmap" (flow only).
    min_snr_gamma: gamma of "min_snr", where it caps the signal-to-noise ratio.
    p2_k, p2_gamma: k and gamma of "p2"; a gamma of 0 is uniform.
    sigma_data: standard deviation of the scaled latents, for "edm".
    loss: "l2" or "huber" with width huber_c, constant or falling with the noise (huber_schedule).
    huber_c: c of the pseudo-Huber loss, 2 c (sqrt(d**2 + c**2) - c).
    huber_schedule: HUBER_SCHEDULES.
    offset_noise: strength of noise that is constant over each channel, part of the target.
    input_perturbation: strength of extra noise on xt that is not part of the target.
    caption_dropout: share of captions replaced by the null caption, for classifier-free guidance.
    encoder_dropout: share of the captions of each text encoder that it alone gets as the null
      caption, drawn for each encoder apart; so a model with several can do without one. SD3's
      paper has 0.464 and no caption_dropout (section 5.1.1).
    unmasked_weight: the least value of a mask of the loss; OneTrainer's default is 0.1.
    normalize_masked_area: divide the loss of an example by the mean of its mask, so that a small
      mask has as much of a say as a large one.
    unmasked_probability: share of examples that train without their mask; OneTrainer's is 0.1.

    Raises ValueError where a field is out of its range or does not go with another.
    """

    prediction_type: str = "epsilon"
    timestep_sampling: str = "uniform"
    stratified: bool = False
    resampling: str = "none"
    resampling_bins: int = 0
    timestep_min: int = 0
    timestep_max: int = 0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    sigma_data: float = 1.0
    loss: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    caption_dropout: float = 0.1
    encoder_dropout: float = 0.0
    unmasked_weight: float = 0.0
    normalize_masked_area: bool = False
    unmasked_probability: float = 0.0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("prediction_type", prediction.PREDICTIONS),
            ("timestep_sampling", timesteps.TIMESTEP_SAMPLINGS),
            ("resampling", resampling.RESAMPLINGS),
            ("weighting", weighting.WEIGHTINGS),
            ("loss", LOSSES),
            ("huber_schedule", HUBER_SCHEDULES),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"objective.{field} is {getattr(self, field)!r}; "
                    f"expected one of {', '.join(allowed)}"
                )
        for field in ("logit_std", "min_snr_gamma", "p2_k", "sigma_data", "huber_c"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"objective.{field} is {getattr(self, field)}; expected more than 0"
                )
        for field in (
            "p2_gamma", "offset_noise", "input_perturbation", "timestep_min", "resampling_bins",
        ):  # fmt: skip
            if not getattr(self, field) >= 0:
                raise ValueError(f"objective.{field} is {getattr(self, field)}; expected 0 or more")
        for field in (
            "caption_dropout", "encoder_dropout", "unmasked_weight", "unmasked_probability",
        ):  # fmt: skip
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"objective.{field} is {getattr(self, field)}; expected 0 to 1")
        if not -1.0 <= self.mode_scale <= 1.75:  # beyond, the map of u is no longer monotonic
            raise ValueError(f"objective.mode_scale is {self.mode_scale}; expected -1 to 1.75")
        if self.timestep_max != 0 and self.timestep_max <= self.timestep_min:
            raise ValueError(
                f"objective.timestep_max is {self.timestep_max}; expected more than "
                f"timestep_min ({self.timestep_min}), or 0 for the schedule's end"
            )
        if self.weighting == "cosmap" and self.prediction_type != "flow":
            raise ValueError(
                f"objective.weighting is 'cosmap' with prediction_type {self.prediction_type!r}; "
                "it is defined for prediction_type 'flow' only"
            )


def check(schedule: ScheduleConfig, objective: ObjectiveConfig) -> None:
    """Raise ValueError where schedule and objective, each valid alone, do not go together."""
    ends_in_noise = schedule.zero_terminal_snr or schedule.kind == "flow"
    if ends_in_noise and objective.prediction_type == "epsilon":
        why = "zero_terminal_snr is True" if schedule.zero_terminal_snr else "kind is 'flow'"
        raise ValueError(
            "objective.prediction_type is 'epsilon', but the schedule ends in pure noise "
            f"(schedule.{why}), where eps says nothing of x0; use 'v_prediction', 'sample' or "
            "'flow'"
        )
    for field in ("timestep_min", "timestep_max"):
        if getattr(objective, field) > schedule.num_train_timesteps:
            raise ValueError(
                f"objective.{field} is {getattr(objective, field)}; expected at most "
                f"schedule.num_train_timesteps ({schedule.num_train_timesteps})"
            )
    if objective.timestep_max == 0 and objective.timestep_min >= schedule.num_train_timesteps:
        raise ValueError(
            f"objective.timestep_min is {objective.timestep_min}; expected less than "
            f"schedule.num_train_timesteps ({schedule.num_train_timesteps})"
        )


def fold_keys(keys: jax.Array, stream: int | jax.Array) -> jax.Array:
    """Fold the constant `stream` into each of the keys [b]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, stream))(keys)


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """One key per example, [b], from a step's key and positions int32 [b] in the global batch."""
    key = jax.random.fold_in(key, _EXAMPLES)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)


def normal_like(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise, float32 of x's shape [b, ...]; example i is drawn from keys[i]."""
    # A draw in one dimension has the same values as one in x's shape, and compiles much faster.
    draw = lambda key: jax.random.normal(key, (math.prod(x.shape[1:]),), jnp.float32)  # noqa: E731
    return jax.vmap(draw)(keys).reshape(x.shape)


def caption_draws(keys: jax.Array) -> jax.Array:
    """The number in [0, 1) that decides whether an example loses its caption, float32 [b]."""
    return jax.vmap(jax.random.uniform)(fold_keys(keys, CAPTION))


def dropped_captions(keys: jax.Array, rate: float) -> jax.Array:
    """Whether each example trains without its caption, bool [b], true with probability `rate`."""
    return caption_draws(keys) < rate


def drop_captions(
    keys: jax.Array, captions: jax.Array, null_caption: jax.Array, rate: float
) -> jax.Array:
    """Replace rows of captions [b, ...] (tokens, embeddings) by null_caption [...]."""
    dropped = dropped_captions(keys, rate).reshape(-1, *[1] * (captions.ndim - 1))
    return jnp.where(dropped, null_caption[None], captions)


def sample_timesteps(
    keys: jax.Array,
    positions: jax.Array,
    batch_size: int,
    schedule: Schedule,
    objective: ObjectiveConfig,
    batch_key: jax.Array | None = None,
) -> jax.Array:
    """Training timesteps, float32 [b]: integers for a table schedule, real for flow.

    keys: [b], one per example; positions: int32 [b], of the examples in the global batch.
    batch_size: the number of examples of the global batch.
    batch_key: the step's key, the same for every part of the batch; needed when stratified.

    Raises ValueError where the objective is stratified and batch_key is None.
    """
    u = _uniform(keys, positions, batch_size, objective, batch_key)
    return _timesteps(u, schedule, objective)


def _drawn(
    u: jax.Array, schedule: Schedule, objective: ObjectiveConfig, memory: resampling.Memory | None
) -> tuple[jax.Array, jax.Array | float, dict[str, jax.Array]]:
    """Timesteps [b] of uniform numbers [b], weights [b] or 1, and BINS with a memory."""
    if memory is None:
        return _timesteps(u, schedule, objective), 1.0, {}
    one_each = resampling.is_one_each(objective, schedule.config, len(memory["counts"]))
    u, bins, weight = resampling.draw(memory, u, centred=one_each)
    return _timesteps(u, schedule, objective), weight, {BINS: bins}


def _uniform(
    keys: jax.Array, positions: jax.Array, batch_size: int, objective: ObjectiveConfig,
    batch_key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The numbers in [0, 1) of which timesteps are made, float32 [b]."""
    if objective.stratified:
        if batch_key is None:
            raise ValueError(
                "objective.stratified is True, but batch_key is None; pass the step's key, "
                "the one given to example_keys"
            )
        shared = jax.random.uniform(jax.random.fold_in(batch_key, _BATCH))
        return timesteps.stratified_uniform(shared, positions, batch_size)
    return jax.vmap(jax.random.uniform)(fold_keys(keys, TIMESTEP))


def _timesteps(u: jax.Array, schedule: Schedule, objective: ObjectiveConfig) -> jax.Array:
    """Map uniform numbers [b] to timesteps."""
    level = timesteps.noise_level(
        objective.timestep_sampling,
        u,
        logit_mean=objective.logit_mean,
        logit_std=objective.logit_std,
        mode_scale=objective.mode_scale,
    )
    high = objective.timestep_max or schedule.num_train_timesteps
    return timesteps.to_timesteps(level, schedule, objective.timestep_min, high)


def huber_width(
    objective: ObjectiveConfig, t: jax.Array, alpha: jax.Array, sigma: jax.Array, steps: int
) -> jax.Array:
    """The width c of the Huber loss at each timestep, [b] (kohya sd-scripts, get_huber_threshold).

    t, alpha, sigma: float32 [b]; steps: the number of training timesteps.
    """
    c = objective.huber_c
    if objective.huber_schedule == "exponential":
        return c ** (t / steps)
    if objective.huber_schedule == "snr":
        return (1.0 - c) * (alpha / (alpha + sigma)) ** 2 + c
    return jnp.full_like(alpha, c)


def pointwise_loss(difference: jax.Array, width: jax.Array | None) -> jax.Array:
    """The loss of each element: d**2, or the pseudo-Huber 2c(sqrt(d**2 + c**2) - c) with a width c.

    difference: d, [b, ...]; width: c, [b], or None for d**2.
    The gradient of the pseudo-Huber is bounded by 2c; near 0 it is d**2.
    """
    if width is None:
        return difference**2
    c = width.reshape(width.shape + (1,) * (difference.ndim - width.ndim))
    # sqrt(d^2 + c^2) - c, written without the cancellation.
    return 2.0 * c * difference**2 / (jnp.sqrt(difference**2 + c**2) + c)


def area_mean(mask: jax.Array, factor: int) -> jax.Array:
    """The mean of each factor x factor square of a mask: [..., H, W, 1] -> [..., H/f, W/f, 1]."""
    *outer, height, width, channels = mask.shape
    squares = (*outer, height // factor, factor, width // factor, factor, channels)
    return mask.reshape(squares).mean(axis=(-4, -2))  # [..., H/f, W/f, 1]


def loss_mask(keys: jax.Array, mask: jax.Array, objective: ObjectiveConfig) -> jax.Array:
    """Return what multiplies the loss at each position, of the shape of a mask [b, ..., 1].

    OneTrainer's modelSetup/mixin/ModelSetupDiffusionLossMixin.py: clamped, perhaps all ones, and
    perhaps divided by its mean.
    """
    factor = jnp.maximum(mask, objective.unmasked_weight)
    each = (-1, *[1] * (mask.ndim - 1))  # [b, 1, ..., 1]
    if objective.unmasked_probability:
        draws = jax.vmap(jax.random.uniform)(fold_keys(keys, UNMASKED))
        factor = jnp.where((draws < objective.unmasked_probability).reshape(each), 1.0, factor)
    if objective.normalize_masked_area:
        area = factor.mean(axis=tuple(range(1, mask.ndim)), keepdims=True)
        factor = factor / jnp.maximum(area, 1e-6)  # a mask of zeros has no loss
    return factor


def _noise(
    keys: jax.Array, x0: jax.Array, objective: ObjectiveConfig
) -> tuple[jax.Array, jax.Array]:
    """The noise of the target, and that of xt, both of the shape of x0 [b, *frames, h, w, c].

    Offset noise is constant over each channel of a frame.
    """
    eps = normal_like(fold_keys(keys, NOISE), x0)
    if objective.offset_noise:
        offset = normal_like(fold_keys(keys, OFFSET), x0[..., 0, 0, :])  # [b, *frames, c]
        eps = eps + objective.offset_noise * offset[..., None, None, :]
    noise = eps
    if objective.input_perturbation:
        extra = normal_like(fold_keys(keys, PERTURBATION), x0)
        noise = eps + objective.input_perturbation * extra
    return eps, noise


def _weight(objective: ObjectiveConfig, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The weight of the loss at each timestep, [b]."""
    return weighting.loss_weight(
        objective.weighting, objective.prediction_type, alpha, sigma,
        min_snr_gamma=objective.min_snr_gamma, p2_k=objective.p2_k, p2_gamma=objective.p2_gamma,
        sigma_data=objective.sigma_data,
    )  # fmt: skip


def denoising_loss(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    *,
    keys: jax.Array,
    positions: jax.Array,
    batch_size: int,
    schedule: Schedule,
    objective: ObjectiveConfig,
    batch_key: jax.Array | None = None,
    t: jax.Array | None = None,
    mask: jax.Array | None = None,
    memory: resampling.Memory | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss of each example, float32 [b], and a dict of arrays to log.

    With a mask m, weight w and pointwise loss e it is

        L_i = w(t_i) / (F h w c) * sum_{f,y,x,c} m_i[f,y,x] e_i[f,y,x,c].

    The mean is over all positions, as in kohya's sd-scripts: a mask of 15 % of ones has 15 % of the
    loss, and one of ones changes nothing. `loss_mask` says how the objective changes m.

    denoise_fn: (xt [b,*frames,h,w,c] float32, timesteps [b] float32) -> prediction of that shape.
    x0: clean latents [b,*frames,h,w,c].
    mask: float32 [b,*frames,h,w,1] on the grid of the latents, see `area_mean`; None for ones.
    keys: [b], from example_keys; positions: int32 [b], in the global batch of batch_size examples.
    batch_key: the step's key, needed only when the objective is stratified.
    t: timesteps float32 [b] to use; None draws them.
    memory: see `sdjax.diffusion.resampling`; None draws as the objective says without it.
    The dict: "loss" float32 [b], unweighted; "timesteps" float32 [b]; with a memory BINS and
    BIN_LOSSES, what it is to remember.
    """
    x0 = x0.astype(jnp.float32)
    seen: dict[str, jax.Array] = {}
    correction: jax.Array | float = 1.0
    if t is None:
        u = _uniform(keys, positions, batch_size, objective, batch_key)
        t, correction, seen = _drawn(u, schedule, objective, memory)
    alpha, sigma = schedule_at(schedule, t)

    eps, noise = _noise(keys, x0, objective)
    xt = prediction.add_noise(x0, noise, alpha, sigma)

    out = denoise_fn(xt, t).astype(jnp.float32)
    wanted = prediction.target(objective.prediction_type, x0, eps, alpha, sigma)
    width = None
    if objective.loss == "huber":
        width = huber_width(objective, t, alpha, sigma, schedule.num_train_timesteps)
    errors = pointwise_loss(out - wanted, width)
    if mask is not None:
        errors = errors * loss_mask(keys, mask, objective)
    loss = errors.mean(axis=tuple(range(1, errors.ndim)))  # [b]
    weight = _weight(objective, alpha, sigma)
    if seen:
        seen = {**seen, BIN_LOSSES: weight * loss}
    return weight * loss * correction, {"loss": loss, "timesteps": t, **seen}
