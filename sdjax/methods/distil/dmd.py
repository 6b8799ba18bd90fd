"""Distribution matching distillation: a few steps draw as the teacher does, not the same pictures.

Yin et al. 2024 (DMD2), arXiv:2405.14867, and tianweiy/DMD2, main/sd_guidance.py and
sd_unified_model.py. There are four networks: the student, which draws; the frozen teacher; a second
copy of it, `fake`, which learns to denoise what the student draws; and a head on the middle of
that, which tells it from real latents. The student goes where the teacher's x0 and not the fake's
leads, and where the head takes its pictures for real. It is trained on states that it meets while
drawing: it draws some steps by itself before the one that is trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import consistency as grids
from sdjax.diffusion.losses import CALLER_STREAM, fold_keys, normal_like
from sdjax.diffusion.prediction import add_noise, target, to_x0
from sdjax.diffusion.schedules import schedule_at
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Context, Model
from sdjax.methods.denoise import LatentDiffusion, bound, latent_diffusion
from sdjax.methods.distil.consistency import (
    TEACHER,
    Predict,
    check_distils,
    guided,
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
from sdjax.models import weights
from sdjax.models.critics.head import HeadConfig, MiddleHead
from sdjax.models.params import Params, component, prefixed

FAKE, HEAD = "fake", "head"  # names of the networks that are trained beside the student
POINTS = 100  # of the grid of LCMScheduler: 4 steps begin at 999, 749, 499 and 249
MOST_STEPS = 8
# Of the whole schedule, the part where teacher and fake are compared (train_sd.py).
MIN_PART, MAX_PART = 0.02, 0.98
# Streams of randomness: of timesteps, each followed by that of their noise; of the number of steps
# that are drawn; and from STATES on of the noise of each step of the student.
LEVEL, REAL, JUDGED = CALLER_STREAM + 16, CALLER_STREAM + 18, CALLER_STREAM + 20
COUNT, STATES = CALLER_STREAM + 22, CALLER_STREAM + 24


@dataclasses.dataclass(frozen=True)
class MatchingConfig(MethodConfig):
    """The losses of distribution matching.

    Raises ValueError where a field is out of its range.
    """

    student_steps: int = 4  # that the student draws in
    teacher_guidance: float = 8.0  # the scale of the teacher's guidance; 1.75 for SD 1.5
    fake_updates: int = 5  # updates of fake and head for one of the student; 10 for SD 1.5
    fake_rate: float = 1.0  # factor of the learning rate of fake and head
    gan_weight: float = 5e-3  # of the head's say in the student's loss; 0: there is no head
    head_weight: float = 1e-2  # of the head's loss in that of fake and head

    def __post_init__(self) -> None:
        for field, good, expected in (
            ("student_steps", 1 <= self.student_steps <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            ("teacher_guidance", self.teacher_guidance >= 1, "1 or more"),
            ("fake_updates", self.fake_updates >= 1, "1 or more"),
            ("fake_rate", self.fake_rate > 0, "more than 0"),
            ("gan_weight", self.gan_weight >= 0, "0 or more"),
            ("head_weight", self.head_weight > 0, "more than 0"),
        ):
            if not good:
                raise ValueError(f"method.{field} is {getattr(self, field)}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class DMDConfig(MatchingConfig):
    """Distribution matching by a whole denoiser."""

    name: str = "dmd"


def matching_gradient(x: jax.Array, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Return the direction in which drawn x0 are to be moved less, [B, ...] as the arguments.

    Args:
        x: drawn.
        real, fake: the x0 that teacher and fake see in x with noise.
    """
    apart = jnp.abs(x - real).mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    return jnp.nan_to_num((fake - real) / apart)


@dataclasses.dataclass(frozen=True, eq=False)
class Matching:
    """The losses of student and fake.

    teacher, student, fake: see `Predict`.
    judged: parameters of every network, latents, timesteps, context -> logits [B] of the head;
        None without one.
    grid: the timesteps at which the student's steps begin, falling.
    """

    config: MatchingConfig
    diffusion: LatentDiffusion
    teacher: Predict
    student: Predict
    fake: Predict
    judged: Callable[[Params, jax.Array, jax.Array, Context], jax.Array] | None
    grid: np.ndarray

    def student_loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`: half of the squared distance to where the gradient leads, and the GAN's."""
        every = {**frozen, **trained}
        batch, context, _, like = self._given(every, batch, draw)
        x = self.drawn(every, context, like, draw)
        still = jax.lax.stop_gradient(every)
        seen, here, _ = self._noised(jax.lax.stop_gradient(x), draw, LEVEL, (MIN_PART, MAX_PART))
        nothing = self._nothing(every, batch, draw, like)
        scales = jnp.full(len(x), self.config.teacher_guidance)
        real = guided(self.teacher, still, seen, here, (context, nothing), scales)
        fake = self.fake(still, seen, here, context)
        found = [self._x0(out, seen, here) for out in (real, fake)]
        gradient = jax.lax.stop_gradient(matching_gradient(x, *found))
        wanted = jax.lax.stop_gradient(x - gradient)
        loss = matching = 0.5 * _mean(jnp.square(x - wanted))
        aux = {"matching": matching, "gradient": jnp.sqrt(_mean(jnp.square(gradient)))}
        if self.judged is not None:
            seen, here, _ = self._noised(x, draw, JUDGED)
            aux["gan"] = jax.nn.softplus(-self.judged(still, seen, here, context))
            loss = loss + self.config.gan_weight * aux["gan"]
        return loss, {"loss": loss, **aux}

    def fake_loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`: denoising of what the student draws, and telling it from real latents."""
        every = {**frozen, **trained}
        batch, context, x0, like = self._given(every, batch, draw)
        x = self.drawn(every, context, like, draw, trained=False)
        seen, t, eps = self._noised(x, draw, LEVEL)
        levels = schedule_at(self.diffusion.schedule, t)
        wanted = target(self._kind, x, eps, *levels)
        loss = denoising = _mean(jnp.square(self.fake(every, seen, t, context) - wanted))
        aux = {"denoising": denoising}
        if self.judged is not None:
            made, at, _ = self._noised(x, draw, JUDGED)
            real, there, _ = self._noised(x0, draw, REAL)
            twice = jax.tree.map(lambda each: jnp.concatenate([each] * 2), context)
            both = jnp.concatenate([made, real]), jnp.concatenate([at, there])
            of_made, of_real = jnp.split(self.judged(every, *both, twice), 2)
            aux["head"] = jax.nn.softplus(of_made) + jax.nn.softplus(-of_real)
            aux |= {"logit_drawn": of_made, "logit_real": of_real}
            loss = loss + self.config.head_weight * aux["head"]
        return loss, {"loss": loss, "timesteps": t, **aux}

    def drawn(
        self, every: Params, context: Context, like: jax.Array, draw: Draw, *, trained: bool = True
    ) -> jax.Array:
        """The x0 of one step of the student; the steps before it are as in drawing.

        How many there are is drawn for the whole batch, and no gradient passes through them.

        Args:
            trained: whether gradients pass through the last step. Without, it is one more turn of
                the loop of the others, and the program has one student less to compile.
        """
        still, count = jax.lax.stop_gradient(every), len(self.grid)
        t = jnp.asarray(self.grid, jnp.float32)
        last = jax.random.randint(jax.random.fold_in(draw.key, COUNT), (), 0, count)

        def state(i: jax.Array, x0: jax.Array) -> jax.Array:
            """Where step i begins, [B, ...]: in noise, or in the x0 of the one before with some."""
            noise = normal_like(fold_keys(draw.keys, STATES + i), like)
            later = add_noise(x0, noise, *schedule_at(self.diffusion.schedule, at(i)))
            return jnp.where(i > 0, later, noise)

        def at(i: jax.Array) -> jax.Array:
            return jnp.full(len(like), t[i])

        def step(params: Params, i: jax.Array, x0: jax.Array) -> jax.Array:
            xt = jax.lax.stop_gradient(state(i, x0))
            return self._x0(self.student(params, xt, at(i), context), xt, at(i))

        before = last if trained else last + 1
        x0 = jax.lax.fori_loop(0, before, functools.partial(step, still), like)
        return step(every, last, jax.lax.stop_gradient(x0)) if trained else x0

    @property
    def _kind(self) -> str:
        return self.diffusion.setup.objective.prediction_type

    def _x0(self, out: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        return to_x0(self._kind, out, xt, *schedule_at(self.diffusion.schedule, t))

    def _given(
        self, every: Params, batch: Batch, draw: Draw
    ) -> tuple[Batch, Context, jax.Array, jax.Array]:
        """The batch with captions dropped, its context, its latents, and zeros of their shape."""
        diffusion, objective = self.diffusion, self.diffusion.setup.objective
        rate, own = objective.caption_dropout, objective.encoder_dropout
        captions = diffusion.conditioner.drop(every, batch, draw.keys, rate, encoder_rate=own)
        batch = {**batch, **captions}
        x0 = jax.lax.stop_gradient(diffusion.latents(every, batch, draw.keys))
        return batch, diffusion.context(every, batch, x0), x0, jnp.zeros_like(x0)

    def _nothing(self, every: Params, batch: Batch, draw: Draw, like: jax.Array) -> Context:
        """The context of the empty caption."""
        blank = self.diffusion.conditioner.drop(every, batch, draw.keys, 1.0)
        return self.diffusion.context(every, {**batch, **blank}, like)

    def _noised(
        self, x: jax.Array, draw: Draw, stream: int, part: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Noisy latents, timesteps [B], drawn evenly from a part of the schedule, and the noise."""
        total = self.diffusion.schedule.num_train_timesteps
        low, high = int(part[0] * total), min(int(part[1] * total) + 1, total)
        keys = fold_keys(draw.keys, stream)
        t = jax.vmap(lambda key: jax.random.randint(key, (), low, high))(keys)
        t = t.astype(jnp.float32)
        eps = normal_like(fold_keys(draw.keys, stream + 1), x)
        return add_noise(x, eps, *schedule_at(self.diffusion.schedule, t)), t, eps


def _mean(each: jax.Array) -> jax.Array:
    """The mean of each example, [B]."""
    return each.mean(axis=tuple(range(1, each.ndim)))


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: see `bound_method`.
    """
    name = setup.model.family.denoiser
    method, fake = bound_method(
        setup, lambda every: prefixed(component(every, TEACHER), name), keep_teacher=True
    )
    student = dataclasses.replace(method.phases[0], every=setup.config.fake_updates)
    return dataclasses.replace(method, phases=(fake, student))


def bound_method(
    setup: Setup, of_teacher: Callable[[Params], Params], *, keep_teacher: bool
) -> tuple[Method, Phase]:
    """Return the method that trains the student at every step, and the phase of fake and head.

    Args:
        of_teacher: parameters of every network -> those of the teacher, as a denoiser's.
        keep_teacher: whether the teacher is a copy of its own, `TEACHER`.

    Raises:
        UserError: the model has no UNet on a table of noise levels, or reads the guidance scale;
            or the recipe asks for another objective, or draws with another sampler.
    """
    check_distils(setup, None)
    _check_sampler(setup)
    config, name = setup.config, setup.model.family.denoiser
    diffusion = latent_diffusion(setup)
    method = bound(diffusion, images=picture_fields(setup), pictures=caption_pictures(setup))
    loss = _matching(setup, diffusion, of_teacher)
    plain = bind(_unchanged(setup), (name,))
    _, head = _head(setup)

    def copied(fields: dict) -> dict:
        """Fields of the denoiser's parameters for the networks that begin as its copies."""
        own = component({path: fields[path] for path in plain.abstract if path in fields}, name)
        teachers = prefixed(own, TEACHER) if keep_teacher else {}
        return teachers | prefixed(own, FAKE)

    init_model = method.init

    def init(key: jax.Array) -> Params:
        drawn = init_model(key)
        found = {**drawn, **copied(drawn)}
        if config.gan_weight:
            own = weights.init(
                MiddleHead, _head_config(setup), jax.random.fold_in(key, CALLER_STREAM)
            )
            found |= prefixed(own, HEAD)
        return found

    kept = {
        path: kind for path, kind in copied(dict(method.dtypes)).items() if path.startswith(TEACHER)
    }
    method = dataclasses.replace(
        method,
        abstract=method.abstract | copied(method.abstract) | prefixed(head, HEAD),
        init=init,
        start=lambda loaded: copied(dict(loaded)),
        copies={TEACHER: name} if keep_teacher else {},
        dtypes={**method.dtypes, **kept},
        phases=(Phase("student", loss.student_loss, lambda path: path.startswith(f"{name}.")),),
    )
    beside = (f"{FAKE}.", f"{HEAD}.")
    phase = Phase(
        FAKE,
        loss.fake_loss,
        lambda path: path.startswith(beside),
        rate=lambda path: config.fake_rate,
    )
    return method, phase


def _unchanged(setup: Setup) -> Model:
    """The model as it is loaded, of which teacher and fake are copies."""
    return dataclasses.replace(setup.model, changes=())


def _matching(
    setup: Setup, diffusion: LatentDiffusion, of_teacher: Callable[[Params], Params]
) -> Matching:
    """The losses; see `bound_method`."""
    config, name, model = setup.config, setup.model.family.denoiser, _unchanged(setup)
    plain = bind(model, (name,), dtype=setup.dtype)
    trained = bind(model, (name,), dtype=setup.dtype, remat=setup.remat)
    head_graph, _ = _head(setup)

    def teacher(every: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        own = of_teacher(every)
        return plain.module(name, {path: own[path] for path in plain.abstract})(xt, t, context)

    def student(every: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        return diffusion.networks.module(name, every)(xt, t, context)

    def fake(every: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        return trained.module(name, prefixed(component(every, FAKE), name))(xt, t, context)

    def judged(every: Params, xt: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        unet = trained.module(name, prefixed(component(every, FAKE), name))
        return weights.merge(head_graph, component(every, HEAD))(unet.middle(xt, t, context))

    total = diffusion.schedule.num_train_timesteps
    grid = grids.sampling_grid(config.student_steps, POINTS, total)
    judges = judged if config.gan_weight else None
    return Matching(config, diffusion, teacher, student, fake, judges, grid)


def _head_config(setup: Setup) -> HeadConfig:
    """The head for the middle of the model's UNet, at the size of the pictures."""
    unet = setup.model.denoiser
    latents = setup.data.resolution // setup.model.vae.downscale
    side = latents // 2 ** (len(unet.block_out_channels) - 1)
    return HeadConfig(unet.block_out_channels[-1], side, unet.norm_num_groups)


def _head(setup: Setup) -> tuple[Any, Params]:
    """The graph of the head and its abstract parameters; none where the GAN has no weight.

    Raises:
        UserError: pictures have several shapes, of which a head reads one.
    """
    if not setup.config.gan_weight:
        return None, {}
    if setup.data.buckets.step:
        raise UserError(
            f"data.buckets.step is {setup.data.buckets.step} with method.gan_weight = "
            f"{setup.config.gan_weight}: the head reads pictures of one shape; set one of them to 0"
        )
    return weights.abstract(MiddleHead, _head_config(setup))


def _check_sampler(setup: Setup) -> None:
    """Check that pictures are drawn at the points that the student learns."""
    sampler, steps = setup.sample.sampler, setup.config.student_steps
    expected = {"name": "lcm", "steps": steps, "original_steps": POINTS}
    for field, value in expected.items():
        if getattr(sampler, field) != value:
            raise UserError(
                f"sample.sampler.{field} is {getattr(sampler, field)!r}; method "
                f"{setup.config.name!r} with method.student_steps = {steps} makes a model that is "
                f"drawn with {value!r}"
            )


DMD = Kind(
    config=DMDConfig,
    make=make,
    networks=tuple,
    draws=True,
)
