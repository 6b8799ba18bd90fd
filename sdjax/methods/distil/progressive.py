"""Progressive distillation: the steps that draw a picture are halved, and halved again.

Salimans & Ho 2022, arXiv:2202.00512, and, for guidance, Meng et al. 2023, arXiv:2210.03142. A run
has stages: in the first of a guided one the student learns to draw by itself what its teacher draws
with two passes of the network, at any timestep; in each other one to do in one step of DDIM what
its teacher does in two. The teacher of the first stage is the model at the start, and of each other
one the student as the stage before has left it, which is the copy in the train state
(`Method.copied_at`). So the stages are one program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import progressive
from sdjax.diffusion.losses import NOISE, fold_keys, normal_like, sample_timesteps
from sdjax.diffusion.prediction import add_noise, to_x0
from sdjax.diffusion.progressive import WEIGHTINGS, Halving
from sdjax.errors import UserError
from sdjax.families.family import GUIDANCE, Context
from sdjax.methods.denoise import LatentDiffusion, bound, latent_diffusion
from sdjax.methods.distil.consistency import GUIDANCE_STREAM, check_distils, check_guidance
from sdjax.methods.drawings import caption_pictures
from sdjax.methods.fields import picture_fields
from sdjax.methods.method import (
    COPY,
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
from sdjax.models.params import Params


@dataclasses.dataclass(frozen=True)
class ProgressiveConfig(MethodConfig):
    """The stages of progressive distillation, and its loss.

    Raises ValueError where a field is out of its range.
    """

    name: str = "progressive"
    steps: tuple[int, ...] = (32, 16, 8, 4)  # of the students, each half of the one before
    # Optimizer steps of each stage; the last one goes on to the end of the run.
    stage_steps: int = 50000
    # Guidance scales that the student learns, in a stage before the others, drawn uniformly. The
    # paper counts them from 0: its w of 2 to 14 is 3 to 15 here. () distils the model without.
    guidance: tuple[float, ...] = (3.0, 15.0)
    guidance_width: int = 256  # of the sinusoids in which the student reads the scale
    weighting: str = "truncated_snr"  # max(SNR, 1) of the error of x0; or "snr_plus_one"

    def __post_init__(self) -> None:
        halved = all(a == 2 * b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or self.steps[-1] < 1 or not halved:
            raise ValueError(
                f"method.steps is {self.steps}; expected numbers of steps, each half of the one "
                "before, as (32, 16, 8, 4)"
            )
        if self.stage_steps < 1:
            raise ValueError(f"method.stage_steps is {self.stage_steps}; expected 1 or more")
        if self.guidance:
            check_guidance(self.guidance, self.guidance_width)
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"method.weighting is {self.weighting!r}; expected one of {', '.join(WEIGHTINGS)}"
            )

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.steps) + bool(self.guidance)


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """The points of all stages, those of each filled up to the most that one has.

    counts: int32 [stages], the points of each.
    guided: bool [stages], whether the student learns guidance there, at each timestep.
    points: of all, arrays [stages, most, ...].
    """

    counts: np.ndarray
    guided: np.ndarray
    points: Halving


def make_stages(diffusion: LatentDiffusion, config: ProgressiveConfig) -> Stages:
    """Return the points of the stages.

    Raises:
        UserError: the schedule has fewer timesteps than the first teacher takes steps.
    """
    schedule, sampler = diffusion.schedule, diffusion.setup.sample.sampler
    every = [progressive.halving(schedule, sampler, steps) for steps in config.steps]
    if config.guidance:
        t = np.arange(schedule.num_train_timesteps)[::-1].astype(np.float64)
        own = np.stack([schedule.alpha64[::-1], schedule.sigma64[::-1]], axis=-1)
        every.insert(0, Halving(t, t, own, own, own))
    counts = [len(one.timesteps) for one in every]

    def filled(name: str) -> np.ndarray:
        parts = [getattr(one, name) for one in every]
        room = [[(0, max(counts) - len(part)), *[(0, 0)] * (part.ndim - 1)] for part in parts]
        return np.stack([np.pad(*each, "edge") for each in zip(parts, room, strict=True)])

    points = Halving(**{field.name: filled(field.name) for field in dataclasses.fields(Halving)})
    guided = np.arange(len(every)) < bool(config.guidance)
    return Stages(np.array(counts, np.int32), guided, points)


@dataclasses.dataclass(frozen=True, eq=False)
class Progressive:
    """The loss of a student, with the teacher that its stage has."""

    config: ProgressiveConfig
    diffusion: LatentDiffusion
    stages: Stages

    def loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`; the teacher is the copy."""
        every = {**frozen, **trained}
        teacher = jax.lax.stop_gradient({**every, **averages.get(COPY, trained)})
        diffusion, setup = self.diffusion, self.diffusion.setup
        rate, own = setup.objective.caption_dropout, setup.objective.encoder_dropout
        captions = diffusion.conditioner.drop(every, batch, draw.keys, rate, encoder_rate=own)
        scales = self.scales(draw.keys)
        batch = {**batch, **captions, GUIDANCE: scales}
        x0 = jax.lax.stop_gradient(diffusion.latents(every, batch, draw.keys))
        context = diffusion.context(every, batch, x0)

        stage = jnp.asarray(draw.copies, jnp.int32)
        t, middles, begin, middle, end = self.points(draw, stage)
        noise = normal_like(fold_keys(draw.keys, NOISE), x0)
        xt = add_noise(x0, noise, *begin)
        out = self.predict(teacher, xt, t, context)
        kind = setup.objective.prediction_type
        between = progressive.ddim(kind, out, xt, begin, middle)
        second = context
        if self.config.guidance:
            # The first stage's second pass is the one without words, at the same place.
            guided = jnp.asarray(self.stages.guided)[stage]
            blank = diffusion.conditioner.drop(every, batch, draw.keys, 1.0)
            nothing = diffusion.context(every, {**batch, **blank}, x0)
            second = jax.tree.map(lambda a, b: jnp.where(guided, a, b), nothing, context)
            between = jnp.where(guided, xt, between)
        other = self.predict(teacher, between, middles, second)
        # [B, h, w, c], where one step leads to the end of the teacher's two
        wanted = progressive.target(
            xt, progressive.ddim(kind, other, between, middle, end), begin, end
        )
        if self.config.guidance:
            scale = scales.reshape(-1, *[1] * (xt.ndim - 1))
            whole = to_x0(kind, other + scale * (out - other), xt, *begin)
            wanted = jnp.where(guided, whole, wanted)
        wanted = jax.lax.stop_gradient(wanted)
        found = to_x0(kind, self.predict(every, xt, t, context), xt, *begin)
        error = jnp.square(found - wanted).mean(axis=tuple(range(1, xt.ndim)))
        loss = progressive.weight(self.config.weighting, *begin) * error
        return loss, {"loss": loss, "timesteps": t, "stage": jnp.full(len(t), stage, jnp.float32)}

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, n] of plain denoising, at the middle of the scales; see `Method.validate`."""
        middle = sum(self.config.guidance) / 2
        scales = {GUIDANCE: jnp.full(len(keys), middle)} if self.config.guidance else {}
        return self.diffusion.validate(every, {**batch, **scales}, keys, timesteps)

    def predict(self, params: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        """The output of the denoiser that has these parameters."""
        networks = self.diffusion.networks
        return networks.module(networks.family.denoiser, params)(xt, t, context)

    def scales(self, keys: jax.Array) -> jax.Array:
        """The guidance scales of examples, [b]; 1 for none."""
        if not self.config.guidance:
            return jnp.ones(len(keys))
        low, high = self.config.guidance
        uniform = jax.vmap(jax.random.uniform)(fold_keys(keys, GUIDANCE_STREAM))
        return low + (high - low) * uniform

    def points(self, draw: Draw, stage: jax.Array) -> tuple[Any, ...]:
        """Points of the stage: timesteps, the teacher's second ones, and the levels at three ends.

        The objective says how they are drawn.
        """
        schedule, objective = self.diffusion.schedule, self.diffusion.setup.objective
        t = sample_timesteps(
            draw.keys, draw.positions, draw.batch_size, schedule, objective, draw.key
        )
        count = jnp.asarray(self.stages.counts)[stage]
        rising = jnp.floor(t * count / schedule.num_train_timesteps).astype(jnp.int32)
        index = count - 1 - jnp.clip(rising, 0, count - 1)

        def at(table: np.ndarray) -> jax.Array:
            return jnp.asarray(table, jnp.float32)[stage][index]

        points = self.stages.points
        ends = [at(table) for table in (points.begin, points.middle, points.end)]
        return at(points.timesteps), at(points.middles), *((e[:, 0], e[:, 1]) for e in ends)


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: the model has no UNet on a table of noise levels, reads guidance where it should
            not, or the recipe asks for another objective, or draws with another sampler.
    """
    config, name = setup.config, setup.model.family.denoiser
    width = config.guidance_width if config.guidance else None
    check_distils(setup, width)
    _check_sampler(setup)
    diffusion = latent_diffusion(setup)
    method = bound(diffusion, images=picture_fields(setup), pictures=caption_pictures(setup))
    loss = Progressive(config, diffusion, make_stages(diffusion, config))
    return dataclasses.replace(
        method,
        phases=(Phase("main", loss.loss, lambda path: path.startswith(f"{name}.")),),
        validate=loss.validate,
        copied_at=tuple(config.stage_steps * i for i in range(1, config.stages)),
    )


def _check_sampler(setup: Setup) -> None:
    """Check that pictures are drawn at the points that the last student learns."""
    sampler, steps = setup.sample.sampler, setup.config.steps[-1]
    expected = {
        "name": "ddim", "steps": steps, "spacing": "trailing", "eta": 0.0, "clip_sample": False,
        "distilled": True,
    }  # fmt: skip
    for field, value in expected.items():
        if getattr(sampler, field) != value:
            raise UserError(
                f"sample.sampler.{field} is {getattr(sampler, field)!r}; method "
                f"{setup.config.name!r} with method.steps = {setup.config.steps} makes a model "
                f"that is drawn with {value!r}"
            )
    schedule = setup.model.schedule
    assert schedule is not None
    if schedule.num_train_timesteps % steps:
        raise UserError(
            f"method.steps ends with {steps}, which does not divide the "
            f"{schedule.num_train_timesteps} timesteps of the schedule: diffusers would leave the "
            "points that the student learns"
        )


PROGRESSIVE = Kind(
    config=ProgressiveConfig,
    make=make,
    networks=tuple,
    draws=True,
    guidance_width=lambda config: config.guidance_width if config.guidance else None,
)
