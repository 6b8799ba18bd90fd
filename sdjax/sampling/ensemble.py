"""Several models for one picture: a refiner, averaged predictions, experts by noise level.

A noise level is t / T, 1 for noise and 0 for a picture.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.diffusion.grids import make_grid
from sdjax.diffusion.schedules import make_schedule
from sdjax.errors import UserError
from sdjax.families.family import AUTOENCODER, Model
from sdjax.sampling.denoising import named_of_member
from sdjax.sampling.request import SamplingRequest

Levels = tuple[float, float]  # from the least to the most noise, within 0 and 1

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
        check_member(request.model, other.model, name)
        params |= named_of_member(i, other.params)
        prompts |= named_of_member(i, other.prompts)
        negative |= named_of_member(i, other.negative)
    models = tuple(other.model for _, other in others)
    return dataclasses.replace(
        request, params=params, prompts=prompts, negative=negative, others=models
    )


def check_member(first: Model, other: Model, name: str) -> None:
    """Check that predictions of two models have a mean; name: of the other, for messages.

    Raises:
        UserError: they are of different kinds.
    """
    what = f"{name} is averaged with the first --model"
    check_alike(first, other, what, ("family", "prediction_type", "in_channels"))


@dataclasses.dataclass(frozen=True, eq=False)
class Expert:
    """A model that predicts at some noise levels.

    name: for messages.
    levels: low <= t / T < high; that of 1 counts to 1 too.
    """

    name: str
    model: Model
    levels: Levels


def with_experts(
    request: SamplingRequest, experts: Sequence[tuple[Expert, SamplingRequest]]
) -> SamplingRequest:
    """Return a request whose steps each are taken by the expert of their noise level.

    The VAE is that of the request.

    Args:
        experts: with requests of the same prompts and size.

    Raises:
        UserError: see `ordered`, or the models do not go together.
    """
    order = ordered([expert for expert, _ in experts])
    bounds = check_experts(request.model, order)
    own = {expert.name: each for expert, each in experts}
    prompts, negative = dict(request.prompts), dict(request.negative)
    for i, expert in enumerate(order, 1):
        prompts |= named_of_member(i, own[expert.name].prompts)
        negative |= named_of_member(i, own[expert.name].negative)
    return dataclasses.replace(
        request,
        params=params_of_experts(request.params, [own[expert.name].params for expert in order]),
        prompts=prompts,
        negative=negative,
        others=tuple(expert.model for expert in order),
        bounds=bounds,
    )


def ordered(experts: Sequence[Expert]) -> list[Expert]:
    """Return experts from the least noise to the most.

    Raises:
        UserError: their intervals leave out a level, or have one twice.
    """
    order = sorted(experts, key=lambda expert: expert.levels)
    said = "; ".join(f"{one.name} is for {_interval(one.levels)}" for one in order)
    ends = [(0.0, 0.0), *(expert.levels for expert in order), (1.0, 1.0)]
    for (_, end), (start, _) in itertools.pairwise(ends):
        if start < end:
            twice = _interval((start, min(end, 1.0)))
            raise UserError(
                f"two experts are for the noise levels {twice}: {said}; "
                "give intervals that meet, as --expert=DIR:0:0.5 --expert=DIR:0.5:1"
            )
        if start > end:
            raise UserError(
                f"no expert is for the noise levels {_interval((end, start))}: {said}; give one, "
                f"which may be the base itself, as --expert=BASE:{end:g}:{start:g}"
            )
    return order


def _interval(levels: Levels) -> str:
    return f"{levels[0]:g} to {levels[1]:g}"


def check_experts(base: Model, order: Sequence[Expert]) -> list[float]:
    """Check that experts may draw pictures of one model; return the timesteps between them.

    Raises:
        UserError: they may not.
    """
    assert base.schedule is not None
    for expert in order:
        what = f"{expert.name} draws with --model"
        check_alike(base, expert.model, what, ("family", "prediction_type", "in_channels"))
        if not _encode_alike(base, expert.model):
            raise UserError(
                f"{what}, but its VAE encodes pictures otherwise; take experts that were trained "
                "with the VAE of --model"
            )
    return [expert.levels[0] * base.schedule.num_train_timesteps for expert in order[1:]]


def _encode_alike(base: Model, other: Model) -> bool:
    """Whether two VAEs have one encoder, but for what half precision rounds off."""
    start = f"{AUTOENCODER}.encoder."
    pairs = [(v, other.params.get(k)) for k, v in base.params.items() if k.startswith(start)]
    return all(
        there is not None
        and np.shape(there) == np.shape(own)
        and np.allclose(np.asarray(own), np.asarray(there), rtol=2**-7, atol=1e-4)
        for own, there in pairs
    )


def params_of_experts(
    base: Mapping[str, Any], experts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the parameters that experts take, those that they share once; see `of_member`.

    Args:
        base: those of the model whose VAE decodes, and of networks that steer; experts: in their
            order.
    """
    own = [{k: v for k, v in each.items() if _network(k) != AUTOENCODER} for each in experts]
    networks = {_network(path) for each in own for path in each}
    predicting = {path for path in base if _network(path) in networks}
    kept = base.keys() - predicting
    every: dict[str, Any] = {}
    for i, params in enumerate(own, 1):
        same = set[str]()
        if all(each.keys() == predicting for each in own):  # no need to have it again
            same = {k for k, v in params.items() if np.array_equal(np.asarray(base[k]), v)}
        kept |= same
        every |= named_of_member(i, {k: v for k, v in params.items() if k not in same})
    return {**{path: value for path, value in base.items() if path in kept}, **every}


def _network(path: str) -> str:
    return path.partition(".")[0]


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
