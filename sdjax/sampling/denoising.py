"""The guided prediction of one model, the mean of several models', and that of experts in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdjax.diffusion.grids import SamplerConfig, make_grid
from sdjax.diffusion.guidance import (
    SkipLayers,
    guided,
    skipped_timesteps,
    with_skipped_layers,
)
from sdjax.diffusion.schedules import Schedule, make_schedule
from sdjax.diffusion.solvers import SolverPlan, make_plan
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.conditioning import Conditioner, make_conditioner
from sdjax.families.family import GUIDANCE, Context, Family, Model, Networks
from sdjax.sampling.control import Control, Controls, bind_controls
from sdjax.sampling.start import Picture, reading_of, with_channels

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How to draw: the sampler and its guidance.

    image_guidance: towards the picture, of models that edit one.
    embedded_guidance: what a denoiser reads that has learned how guided pictures look.
    skip: of denoisers that can leave blocks out.
    window: the steps first <= i < last to take alone; None for all.
    hands_over: whether the result is latents, for another denoiser, and not pictures.
    """

    sampler: SamplerConfig = SamplerConfig()
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    embedded_guidance: float = 3.5
    image_guidance: float = 1.5
    skip: SkipLayers = SkipLayers()
    window: tuple[int, int] | None = None
    hands_over: bool = False

    def plan(self, schedule: Schedule, size: Sequence[int] = ()) -> SolverPlan:
        """Return the steps, for latents of height and width `size`.

        Raises:
            UserError: sampler, schedule and window do not go together.
        """
        tokens = self.sampler.flow.tokens(*size) if size else 0
        return make_plan(schedule, self.sampler, tokens, self.window)


class Denoising(NamedTuple):
    """A guided denoiser: (xt, t) -> prediction, its network, and the length of its context."""

    function: Denoise
    network: Any
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A model whose predictions are drawn with, ready to be given parameters."""

    model: Model
    drawing: Drawing
    networks: Networks
    conditioner: Conditioner
    schedule: Schedule
    controls: Controls

    def denoise(
        self,
        params: Mapping[str, jax.Array],
        prompts: Mapping[str, jax.Array],
        negative: Mapping[str, jax.Array],
        picture: Picture,
        shape: tuple[int, ...],
    ) -> Denoising:
        """Return the guided denoiser for latents of `shape` [B, h, w, C]; see `Generate`."""
        network, size = self.network(params), shape[1:3]
        contexts = self.contexts(params, prompts, negative, size)
        scale = self.drawing.guidance
        if not self.controls.each:
            guided = self.guided(network, self.beside(contexts, picture), picture, size, scale)
            return Denoising(guided, network, _length(contexts[0]))
        timesteps = self.drawing.plan(self.schedule, size).timesteps
        reads, put = self.controls.beside(network, params, picture, timesteps)
        steered = [put(contexts[0], False), put(contexts[1], True)]
        function = _guided(self.drawing, self.schedule, reads, steered, size, scale)
        return Denoising(function, network, _length(contexts[0]))

    def network(self, params: Mapping[str, jax.Array]) -> Any:
        """Return the denoiser's module."""
        return self.networks.module(self.model.family.denoiser, params)

    def contexts(
        self,
        params: Mapping[str, jax.Array],
        prompts: Mapping[str, jax.Array],
        negative: Mapping[str, jax.Array],
        size: Sequence[int],
    ) -> list[Context]:
        """Return the contexts of the prompts and of the negative ones, for latents of `size`."""
        height, width = size
        batch = len(next(iter(prompts.values())))
        target = height * self.model.vae.downscale, width * self.model.vae.downscale
        prompts = {GUIDANCE: jnp.full(batch, self.drawing.embedded_guidance), **prompts}
        other = {**prompts, **negative}
        return [
            self.conditioner(params, prompts, target=target),
            self.conditioner(params, other, target=target, negative=True),
        ]

    def beside(self, contexts: Sequence[Context], picture: Picture) -> list[Any]:
        """Return the contexts with what the denoiser reads of a picture, if it reads one."""
        reading, (context, away) = reading_of(self.model), contexts
        put = with_channels(None, reading, picture)[1]
        made = [put(context), put(away)]
        if reading is not None and reading.guided:  # the words are dropped first, then the picture
            blank = {**picture, "channels": jnp.zeros_like(picture["channels"])}
            made.append(with_channels(None, reading, blank)[1](away))
        return made

    def guided(
        self,
        network: Any,
        contexts: Sequence[Any],
        picture: Picture,
        size: Sequence[int],
        scale: float | jax.Array,
    ) -> Denoise:
        """Return the guided denoiser of contexts of `beside`.

        Args:
            scale: of guidance, in place of the drawing's; [B, 1, 1, 1] where each picture has one.
        """
        reads = with_channels(network, reading_of(self.model), picture)[0]
        return _guided(self.drawing, self.schedule, reads, contexts, size, scale)


def make_member(
    model: Model, drawing: Drawing, dtype: str, controls: Sequence[Control] = ()
) -> Member:
    """Return a model to draw with.

    Raises:
        UserError: the networks do not fit one another, or the guidance the family.
    """
    assert model.schedule is not None
    _check_skip(drawing, model.family)
    return Member(
        model,
        drawing,
        bind(model, (model.family.denoiser,), dtype=dtype),
        make_conditioner(model, model.tokenizers, dtype=dtype),
        make_schedule(model.schedule),
        bind_controls(model, controls, dtype),
    )


def named_of_member(number: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters or tokens of a model under names that tell it from the first, number 0."""
    return {f"{number}:{name}" if number else name: value for name, value in fields.items()}


def of_member(number: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as one model finds them: its own, and what all of them share."""
    mark = f"{number}:"
    own = {k.removeprefix(mark): v for k, v in fields.items() if k.startswith(mark)}
    return {**{k: v for k, v in fields.items() if ":" not in k}, **own}


def mean_of(functions: Sequence[Denoise]) -> Denoise:
    """Return the mean of predictions, which are of one kind and of the same latents."""
    if len(functions) == 1:
        return functions[0]

    def mean(xt: jax.Array, t: jax.Array) -> jax.Array:
        outputs = [function(xt, t).astype(jnp.float32) for function in functions]
        return sum(outputs[1:], outputs[0]) / len(outputs)

    return mean


def by_level(functions: Sequence[Denoise], bounds: Sequence[float]) -> Denoise:
    """Return the prediction of the one model that a timestep is for; only that one is evaluated.

    Args:
        functions: from the least noise to the most.
        bounds: the timesteps between them, rising; function i is for bounds[i - 1] <= t and
            t < bounds[i].
    """

    def expert(xt: jax.Array, t: jax.Array) -> jax.Array:
        which = sum((t[0] >= jnp.float32(bound)).astype(jnp.int32) for bound in bounds)
        return jax.lax.switch(which, functions, xt, t)

    return expert if bounds else functions[0]


def _check_skip(drawing: Drawing, family: Family) -> None:
    if drawing.skip.layers and not family.skips_layers:
        raise UserError(
            f"skip.layers is {drawing.skip.layers}, but the family {family.name!r} has no "
            "skip-layer guidance; leave it empty"
        )


def _guided(
    drawing: Drawing,
    schedule: Schedule,
    denoiser: Any,
    contexts: Sequence[Any],
    size: Sequence[int],
    scale: float | jax.Array,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return (xt, t) -> the guided prediction, for latents of height and width `size`.

    Args:
        contexts: with the prompt; perhaps with a part of that; with nothing.
        scale: of guidance; [B, 1, 1, 1] where each picture has its own.
    """
    context, *middle, null = contexts
    denoise = guided(
        lambda xt, t, context: denoiser(xt, t, context),
        context,
        null,
        middle=middle[0] if middle else None,
        middle_scale=drawing.image_guidance if middle else 1.0,
        scale=scale,
        rescale=drawing.guidance_rescale,
        interval=drawing.guidance_interval,
        num_train_timesteps=schedule.num_train_timesteps,
    )
    skip = drawing.skip
    if not skip.layers:
        return denoise
    grid = make_grid(schedule, drawing.sampler, drawing.sampler.flow.tokens(*size))
    timesteps = skipped_timesteps(grid.timesteps, skip.start, skip.stop)
    if timesteps is None:
        return denoise
    return with_skipped_layers(
        denoise,
        lambda xt, t: denoiser(xt, t, context),
        lambda xt, t: denoiser(xt, t, context, skip_layers=skip.layers),
        scale=skip.scale,
        timesteps=timesteps,
    )


def _length(context: Context) -> int:
    return (context["context"] if isinstance(context, dict) else context).shape[1]
