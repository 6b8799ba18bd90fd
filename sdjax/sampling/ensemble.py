"""Several models for one picture: a refiner that takes the last steps, and averaged predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sdjax.diffusion.grids import make_grid
from sdjax.diffusion.schedules import make_schedule
from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.sampling.denoising import named_of_member
from sdjax.sampling.request import SamplingRequest

REFINER_STREAM = 3  # added to the seed: the noise of the refiner's steps is not that of the base's


def with_refiner(
    request: SamplingRequest, refiner: SamplingRequest, start: float, *, name: str
) -> SamplingRequest:
    """Return a request whose last steps another model takes, an ensemble of experts.

    The base takes the steps at timesteps from (1 - start) T on, and the refiner those below, as
    with `denoising_end` and `denoising_start` of diffusers.

    Args:
        refiner: of the same prompts and size.
        start: share of the way from noise to picture.
        name: of the refiner, for messages.

    Raises:
        UserError: the models do not go together, or one of them has no steps.
    """
    if not 0.0 < start < 1.0:
        raise UserError(f"--refiner_start={start}; expected a share between 0 and 1, as 0.8")
    for one, option in ((request.model, "--model"), (refiner.model, name)):
        if one.family.name != "sdxl":
            raise UserError(
                f"--refiner is for SDXL, and {option} is of the family {one.family.name!r}; leave "
                "it out, or take models of SDXL"
            )
    check_alike(request.model, refiner.model, f"{name} refines the pictures of --model", ())
    if "mask" in request.picture or "channels" in request.picture:
        raise UserError("--mask_image does not go with --refiner; leave out one of them")
    sampler, schedule = request.drawing.sampler, request.model.schedule
    assert schedule is not None
    tables = make_schedule(schedule)
    timesteps = make_grid(tables, sampler).timesteps
    cutoff = round(tables.num_train_timesteps - start * tables.num_train_timesteps)
    cut, (first, last) = int((timesteps >= cutoff).sum()), request.drawing.window or (0, 0)
    last = last or sampler.steps
    if not first < cut < last:
        raise UserError(
            f"--refiner_start={start} leaves steps {first} to {cut} to the base and {cut} to "
            f"{last} to the refiner; expected some for each, give more --steps or another "
            "--refiner_start"
        )
    base = dataclasses.replace(request.drawing, window=(first, cut), hands_over=True)
    ending = dataclasses.replace(
        refiner,
        drawing=dataclasses.replace(request.drawing, window=(cut, last)),
        shape=request.shape,
        seed=request.seed + REFINER_STREAM,
        positions=request.positions,
    )
    base.plan(tables)  # a sampler that cannot stop is an error now
    return dataclasses.replace(request, drawing=base, refiner=ending)


def with_others(
    request: SamplingRequest, others: Sequence[tuple[str, SamplingRequest]]
) -> SamplingRequest:
    """Return a request whose predictions are the mean over several models.

    Args:
        others: with their names, for messages; of the same prompts and size.

    Raises:
        UserError: the models do not go together.
    """
    params, prompts, negative = dict(request.params), dict(request.prompts), dict(request.negative)
    for i, (name, other) in enumerate(others, 1):
        what = f"{name} is averaged with the first --model"
        check_alike(request.model, other.model, what, ("family", "prediction_type", "in_channels"))
        params |= named_of_member(i, other.params)
        prompts |= named_of_member(i, other.prompts)
        negative |= named_of_member(i, other.negative)
    models = tuple(other.model for _, other in others)
    return dataclasses.replace(
        request, params=params, prompts=prompts, negative=negative, others=models
    )


def check_alike(first: Model, other: Model, what: str, more: Sequence[str]) -> None:
    """Check that two models may draw one picture.

    Args:
        what: the beginning of the message; more: names of further facts that must be equal.

    Raises:
        UserError: schedule, latent space or another of the facts differs.
    """
    ours, theirs = _facts(first), _facts(other)
    for field in (*more, "schedule", "latent space"):
        if ours[field] != theirs[field]:
            raise UserError(
                f"{what}, but its {field} is {theirs[field]}, not {ours[field]}; take models with "
                "the same"
            )


def _facts(model: Model) -> dict[str, Any]:
    vae = model.vae
    return {
        "family": model.family.name,
        "prediction_type": model.prediction_type,
        "in_channels": model.denoiser.in_channels,
        "schedule": model.schedule,
        "latent space": (
            f"{vae.latent_channels} channels, downscale {vae.downscale}, scaling_factor "
            f"{vae.scaling_factor:g}, shift_factor {vae.shift_factor:g}"
        ),
    }
