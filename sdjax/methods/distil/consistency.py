"""Latent consistency distillation: a few steps draw what took the teacher many, guidance included.

Luo et al. 2023, arXiv:2310.04378, and diffusers, train_lcm_distill_sd_wds.py. With f the
consistency function of `diffusion.consistency`, xt a noisy state at a point t of the solver's grid,
and xs the teacher's step of DDIM from there to the point s before, guided by w:

    loss = d(f(xt, t, w; student), stop_gradient f(xs, s, w; average of the student)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import consistency
from sdjax.diffusion.losses import (
    CALLER_STREAM,
    NOISE,
    fold_keys,
    normal_like,
    sample_timesteps,
)
from sdjax.diffusion.prediction import add_noise, to_eps, to_x0
from sdjax.diffusion.schedules import schedule_at
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import GUIDANCE, Context, Model
from sdjax.methods.adapter_rules import without_adapters
from sdjax.methods.denoise import (
    STRATA,
    LatentDiffusion,
    bound,
    latent_diffusion,
    plain_objective,
)
from sdjax.methods.drawings import caption_pictures
from sdjax.methods.fields import picture_fields
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Kind,
    Method,
    MethodConfig,
    Phase,
    Setup,
)
from sdjax.models.params import Params, component, prefixed
from sdjax.models.unet_config import UNetConfig

TEACHER = "teacher"  # the denoiser as it was at the start, among frozen networks
GUIDANCE_STREAM = CALLER_STREAM + 8  # of the guidance scales of a step's examples
LOSSES = ("huber", "l2")

# (params of every network, xt, t, context) -> the prediction of a denoiser.
Predict = Callable[[Params, jax.Array, jax.Array, Context], jax.Array]


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """The loss of consistency distillation.

    Raises ValueError where a field is out of its range.
    """

    # Guidance scales that the student learns, drawn uniformly. The paper counts them from 0: its
    # w of 5 to 15 is 6 to 16 here.
    guidance: tuple[float, float] = (6.0, 16.0)
    original_steps: int = 50  # points of the teacher's solver
    loss: str = "huber"  # sqrt(d^2 + c^2) - c of each difference d; or "l2", its square
    huber_c: float = 0.001

    def __post_init__(self) -> None:
        check_scales(self.guidance)
        if self.loss not in LOSSES:
            raise ValueError(f"method.loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")
        for field, good in (
            ("huber_c", self.huber_c > 0),
            ("original_steps", self.original_steps >= 1),
        ):
            if not good:
                raise ValueError(f"method.{field} is {getattr(self, field)}; expected more than 0")


@dataclasses.dataclass(frozen=True)
class LCMConfig(ConsistencyConfig):
    """Distillation of a whole denoiser, which learns to read the guidance scale.

    Raises ValueError where a field is out of its range.
    """

    name: str = "lcm"
    guidance_width: int = 256  # of the sinusoids in which the student reads the scale

    def __post_init__(self) -> None:
        super().__post_init__()
        check_guidance(self.guidance, self.guidance_width)


def check_scales(scales: tuple[float, ...]) -> None:
    """Raise ValueError unless these are the least and the largest of guidance scales."""
    if len(scales) != 2 or not 1.0 <= scales[0] <= scales[1]:
        raise ValueError(
            f"method.guidance is {scales}; expected two scales of 1 or more, the smaller one first"
        )


def check_guidance(scales: tuple[float, ...], width: int) -> None:
    """Raise ValueError unless a student can read these scales in sinusoids of this width."""
    check_scales(scales)
    if width < 2 or width % 2:
        raise ValueError(f"method.guidance_width is {width}; expected an even number")


def difference(kind: str, a: jax.Array, b: jax.Array, c: float) -> jax.Array:
    """Return the loss of each example, float32 [B], of a and b [B, ...]; kind: one of LOSSES."""
    d = a.astype(jnp.float32) - b.astype(jnp.float32)
    each = jnp.square(d) if kind == "l2" else jnp.sqrt(jnp.square(d) + c**2) - c
    return each.mean(axis=tuple(range(1, each.ndim)))


@dataclasses.dataclass(frozen=True, eq=False)
class Consistency:
    """The loss of the distillation.

    teacher, student: see `Predict`; the student reads the guidance in its context, if it does.
    """

    config: ConsistencyConfig
    diffusion: LatentDiffusion
    teacher: Predict
    student: Predict

    def loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`; the target is that of the recipe's average, if it has one.

        Raises:
            UserError: it has several, which JAX would bring into the order of their names.
        """
        if len(averages) > 1:
            raise UserError(
                f"ema.profiles has the averages {', '.join(sorted(averages))}, but the target of "
                f"method {self.config.name!r} is that of one; leave the others out"
            )
        every = {**frozen, **trained}
        averaged = {**every, **next(iter(averages.values()), trained)}
        setup, schedule = self.diffusion.setup, self.diffusion.schedule
        rate, own = setup.objective.caption_dropout, setup.objective.encoder_dropout
        captions = self.diffusion.conditioner.drop(every, batch, draw.keys, rate, encoder_rate=own)
        t = sample_timesteps(
            draw.keys, draw.positions, draw.batch_size, schedule, setup.objective, draw.key
        )
        points = self.config.original_steps
        index = jnp.floor(t * points / schedule.num_train_timesteps).astype(jnp.int32)
        scales = jax.vmap(jax.random.uniform)(fold_keys(draw.keys, GUIDANCE_STREAM))
        low, high = self.config.guidance
        loss, timesteps = self._per_example(
            every,
            jax.lax.stop_gradient(averaged),
            {**batch, **captions},
            draw.keys,
            jnp.clip(index, 0, points - 1),
            low + (high - low) * scales,
            NOISE,
        )
        return loss, {"loss": loss, "timesteps": timesteps}

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, n] at n timesteps, with the middle of the scales; see `Method.validate`."""
        batch = self.diffusion.captions(every, batch, keys)
        scales = jnp.full(len(keys), sum(self.config.guidance) / 2)
        points, last = self.config.original_steps, self.diffusion.schedule.num_train_timesteps
        indices = jnp.floor(jnp.asarray(timesteps) * points / last).astype(jnp.int32)

        def at(stratum: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, index = stratum
            own = jnp.full(len(keys), jnp.clip(index, 0, points - 1))
            return self._per_example(every, every, batch, keys, own, scales, STRATA + number)[0]

        return jax.lax.map(at, (jnp.arange(len(timesteps)), indices)).T

    def _per_example(
        self,
        every: Params,
        averaged: Params,
        batch: Batch,
        keys: jax.Array,
        index: jax.Array,
        scales: jax.Array,
        stream: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The loss [b] at points `index` [b] of the grid, and their timesteps.

        Args:
            averaged: the parameters of the target.
            scales: of guidance, [b].
            stream: of the noise.
        """
        diffusion, schedule = self.diffusion, self.diffusion.schedule
        grid = consistency.solver_grid(self.config.original_steps, schedule.num_train_timesteps)
        before = np.maximum(grid - grid[0] - 1, 0)
        t, s = jnp.asarray(grid, jnp.float32)[index], jnp.asarray(before, jnp.float32)[index]
        x0 = jax.lax.stop_gradient(diffusion.latents(every, batch, keys))
        xt = add_noise(x0, normal_like(fold_keys(keys, stream), x0), *schedule_at(schedule, t))
        context = diffusion.context(every, {**batch, GUIDANCE: scales}, x0)
        blank = diffusion.conditioner.drop(every, batch, keys, 1.0)
        nothing = diffusion.context(every, {**batch, **blank}, x0)
        xs = self._before(every, xt, t, s, (context, nothing), scales)
        xs = jax.lax.stop_gradient(xs)
        wanted = jax.lax.stop_gradient(self._consistent(averaged, xs, s, context))
        found = self._consistent(every, xt, t, context)
        config = self.config
        return difference(config.loss, found, wanted, config.huber_c), t

    def _before(
        self,
        every: Params,
        xt: jax.Array,
        t: jax.Array,
        s: jax.Array,
        contexts: tuple[Context, Context],
        scales: jax.Array,
    ) -> jax.Array:
        """The teacher's guided state at s, one step of DDIM from xt at t."""
        kind = self.diffusion.setup.objective.prediction_type
        alpha, sigma = schedule_at(self.diffusion.schedule, t)
        out = guided(self.teacher, every, xt, t, contexts, scales)
        x0, eps = (convert(kind, out, xt, alpha, sigma) for convert in (to_x0, to_eps))
        return add_noise(x0, eps, *schedule_at(self.diffusion.schedule, s))

    def _consistent(
        self, params: Params, x: jax.Array, t: jax.Array, context: Context
    ) -> jax.Array:
        """The consistency function of a student."""
        kind = self.diffusion.setup.objective.prediction_type
        out = self.student(params, x, t, context)
        x0 = to_x0(kind, out, x, *schedule_at(self.diffusion.schedule, t))
        table = consistency.boundary(np.arange(self.diffusion.schedule.num_train_timesteps))
        skip, weight = (jnp.asarray(c, jnp.float32)[t.astype(jnp.int32)] for c in table)
        shape = (-1, *[1] * (x.ndim - 1))
        return skip.reshape(shape) * x + weight.reshape(shape) * x0


def guided(
    predict: Predict,
    every: Params,
    xt: jax.Array,
    t: jax.Array,
    contexts: tuple[Context, Context],
    scales: jax.Array,
) -> jax.Array:
    """Return a guided prediction; x0 and eps are linear in it, so that they are guided as well.

    Args:
        contexts: of the captions and of none.
        scales: of guidance, [B].
    """
    both = jax.tree.map(lambda *each: jnp.concatenate(each), *contexts)
    out = predict(every, jnp.concatenate([xt] * 2), jnp.concatenate([t] * 2), both)
    said, unsaid = jnp.split(out, 2)
    return unsaid + scales.reshape(-1, *[1] * (xt.ndim - 1)) * (said - unsaid)


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model, whose denoiser reads the guidance scale.

    Raises:
        UserError: see `bound_method`; or the denoiser reads another width of guidance.
    """
    check_distils(setup, setup.config.guidance_width)
    name = setup.model.family.denoiser
    method = bound_method(
        setup, lambda every: prefixed(component(every, TEACHER), name), lambda path: True
    )
    of_teacher = bind(without_guidance(setup.model), (name,)).abstract

    def renamed(fields: dict) -> dict:
        own = {path: fields[path] for path in of_teacher if path in fields}
        return prefixed(component(own, name), TEACHER)

    return dataclasses.replace(
        method,
        abstract=method.abstract | renamed(method.abstract),
        start=lambda loaded: renamed(dict(loaded)),
        copies={TEACHER: name},
        dtypes={**method.dtypes, **renamed(dict(method.dtypes))},
    )


def bound_method(
    setup: Setup, of_teacher: Callable[[Params], Params], trains: Callable[[str], bool]
) -> Method:
    """Return the method that distils a denoiser.

    Args:
        of_teacher: parameters of every network -> those of the teacher, as a denoiser's.
        trains: whether a path of the denoiser is trained.

    Raises:
        UserError: the model has no UNet on a table of noise levels, or the recipe asks for another
            objective, or draws with another sampler.
    """
    check_distils(setup, getattr(setup.config, "guidance_width", None))
    check_sampler(setup)
    name = setup.model.family.denoiser
    diffusion = latent_diffusion(setup)
    method = bound(diffusion, images=picture_fields(setup), pictures=caption_pictures(setup))
    plain = bind(without_guidance(setup.model), (name,), dtype=setup.dtype)

    def teacher(every: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        own = of_teacher(every)
        return plain.module(name, {path: own[path] for path in plain.abstract})(xt, t, context)

    def student(every: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        return diffusion.networks.module(name, every)(xt, t, context)

    loss = Consistency(setup.config, diffusion, teacher, student)
    phase = Phase("main", loss.loss, lambda path: path.startswith(f"{name}.") and trains(path))
    return dataclasses.replace(method, phases=(phase,), validate=loss.validate)


def without_guidance(model: Model) -> Model:
    """Return the model whose denoiser reads no guidance scale, as the teacher is."""
    name = model.family.denoiser
    config = dataclasses.replace(model.denoiser, time_cond_proj_dim=None)
    return dataclasses.replace(without_adapters(model), networks={**model.networks, name: config})


def check_sampler(setup: Setup) -> None:
    """Check that pictures are drawn at points of the grid that the student learns.

    Raises:
        UserError: naming the field, its value and what is expected.
    """
    sampler, points = setup.sample.sampler, setup.config.original_steps
    if (sampler.name, sampler.original_steps) != ("lcm", points):
        raise UserError(
            f"sample.sampler is {sampler.name!r} with original_steps = {sampler.original_steps}; "
            f"method {setup.config.name!r} makes a model for 'lcm' with method.original_steps = "
            f"{points}"
        )


def check_distils(setup: Setup, width: int | None) -> None:
    """Check that a model can be distilled, and that the recipe asks for no other loss.

    Args:
        width: in which the denoiser is to read the guidance scale; None for not at all.

    Raises:
        UserError: naming the field, its value and what is expected.
    """
    model, objective, method = setup.model, setup.objective, setup.config.name
    own = model.denoiser
    if not isinstance(own, UNetConfig):
        raise UserError(
            f"method {method!r} is for UNets, of SD1, SD2 and SDXL; model.family is "
            f"{model.family.name!r}"
        )
    if own.time_cond_proj_dim != width and width is not None:
        raise UserError(
            f"model.unet.time_cond_proj_dim is {own.time_cond_proj_dim}, but "
            f"method.guidance_width is {width}; expected the same, which init_from brings about"
        )
    if own.time_cond_proj_dim != width:
        raise UserError(
            f"model.unet.time_cond_proj_dim is {own.time_cond_proj_dim}: the UNet reads the "
            f"guidance scale, so it was distilled already; method {method!r} expects the model it "
            "was distilled from"
        )
    plain = plain_objective(objective)
    for field in ("weighting", "loss", "offset_noise", "input_perturbation"):
        if getattr(objective, field) != getattr(plain, field):
            raise UserError(
                f"objective.{field} is {getattr(objective, field)!r}, but method {method!r} has a "
                f"loss of its own; set it to {getattr(plain, field)!r}"
            )


LCM = Kind(
    config=LCMConfig,
    make=make,
    networks=tuple,
    draws=True,
    guidance_width=lambda config: config.guidance_width,
)
