"""An evaluation made ready: model, data, networks that judge, and what can be computed."""

from __future__ import annotations

import dataclasses
import functools
import sys

from jax.sharding import Mesh

from sdjax.data.config import DataConfig
from sdjax.data.pictures import open_folder
from sdjax.errors import UserError
from sdjax.evaluation.audit import make_labeller, read_audit
from sdjax.evaluation.choice import check_names, choose
from sdjax.evaluation.conditions import (
    Conditions,
    Masked,
    Needs,
    needs,
    open_conditions,
    with_images,
)
from sdjax.evaluation.evaluation import Inputs
from sdjax.evaluation.loading import Loaded, choose_data, make_example_losses, make_validate
from sdjax.evaluation.losses import FindExampleLosses
from sdjax.evaluation.request import (
    Request,
    cache_folder,
    choose_prompts,
    compared_with,
    dataset_name,
    given_statistics,
    needs_pictures,
    open_towers,
    picture_size,
)
from sdjax.evaluation.session import Session, Validate
from sdjax.families.sampler import choose_sampler
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.sampling.generate import check_guidance
from sdjax.system import paths


def open_session(request: Request, loaded: Loaded | None, output: paths.PathLike) -> Session:
    """Make everything ready.

    Args:
        loaded: the model of `request.model`; None to judge `request.images` alone.
        output: the folder of the evaluation.

    Raises:
        UserError and its kin: naming the option, file or field that is wrong.
    """
    check_names(request.metrics)
    if request.lpips:
        raise UserError(f"--lpips={request.lpips} judges autoencoders; --model is none")
    drawn = needs_pictures(request) and not request.images
    if loaded is not None and (drawn or request.audit):  # an error now, before data is read
        choose_sampler(loaded.found, request.sampler, f"--model={request.model}")
    mesh = make_mesh(MeshConfig())
    own = loaded.data if loaded else None
    wanted = _needs(request, loaded)
    data = _data(request, own, wanted)
    split = request.split or (data.eval_split if data else "")
    given, prompts, count, conditions, size = None, None, 0, None, None
    captions: tuple[str, ...] | None = None
    if request.images:
        given = open_folder(request.images, size=request.size, count=request.num_samples)
        size, captions = given.size, given.captions
    elif loaded is not None:
        size = picture_size(request, loaded, data)
        prompts, count = choose_prompts(request, data, split)
        captions = tuple(prompts.text(i) for i in range(count)) if prompts else None
        if prompts is not None and wanted:
            conditions = _conditions(request, loaded, data, split, size)
    audit = read_audit(request.audit) if request.audit else None
    validate = _validate(request, loaded, data, split, mesh)
    example_losses = _example_losses(request, loaded, data, split, mesh)
    found = open_towers(request, mesh, clip_too=audit is not None and audit.needs_clip)
    if audit is not None:
        make_labeller(audit, found.get("clip"))  # what it lacks is an error now
    inputs = Inputs(
        captions=captions,
        pictures=given,
        features=request.features,
        statistics=given_statistics(request, found, size),
        masked=Masked(conditions) if conditions and conditions.fills else None,
        validate=functools.partial(validate, {}) if validate else None,
        example_losses=functools.partial(example_losses, {}) if example_losses else None,
        draws=prompts is not None,
        cache=cache_folder(request, loaded, output),
        **(compared_with(request, data, split, size) if captions is not None else {}),
        **found,
    )
    names, left_out = choose(request.asked, inputs)
    if not names and audit is None:
        raise UserError("no metric can be computed:\n  " + "\n  ".join(left_out))
    return Session(
        request=request, loaded=loaded, mesh=mesh, inputs=inputs, names=names, left_out=left_out,
        prompts=prompts, count=count, size=size, validate=validate, dataset=dataset_name(data),
        split=split, audit=audit, example_losses=example_losses, conditions=conditions,
    )  # fmt: skip


def _data(request: Request, own: DataConfig | None, wanted: Needs) -> DataConfig | None:
    """The dataset, with the pictures that the model reads."""
    data = choose_data(own, request.dataset, data_dir=request.data_dir)
    if data is not None and (wanted or request.named_image):
        return with_images(data, own, wanted, request.named_image)
    return data


def _needs(request: Request, loaded: Loaded | None) -> Needs:
    """The pictures that the model reads; UserError if an option does not suit it."""
    if loaded is None:
        return Needs({}, {})
    check_guidance(loaded.found, request.guidance, f"--model={request.model}")
    found = needs(loaded.found, loaded.controls)
    if request.audit and found:
        raise UserError(
            f"--audit={request.audit} draws prompts alone, and the model reads pictures besides; "
            "leave it out"
        )
    return found


def _conditions(
    request: Request, loaded: Loaded, data: DataConfig | None, split: str, size: tuple[int, int]
) -> Conditions:
    """The pictures that the model reads, of the examples whose captions are drawn."""
    assert data is not None  # `choose_prompts` has checked it
    return open_conditions(
        loaded.found,
        data,
        split,
        size=size,
        per_prompt=request.per_prompt,
        controls=loaded.controls,
        sights=loaded.sights,
        method=loaded.config.method if loaded.config else None,
        dtype=request.dtype,
    )


def _validate(
    request: Request, loaded: Loaded | None, data: DataConfig | None, split: str, mesh: Mesh
) -> Validate | None:
    if loaded is None or loaded.config is None or loaded.others or data is None:
        return None
    config = loaded.config
    count = request.validation_examples
    count = config.validation.examples if count is None else count
    if not count or "validation_loss" not in request.wanted:
        return None
    return make_validate(
        dataclasses.replace(config, data=data), loaded.found, mesh, split=split, count=count
    )


def _example_losses(
    request: Request, loaded: Loaded | None, data: DataConfig | None, split: str, mesh: Mesh
) -> FindExampleLosses | None:
    """The losses of all examples of the split, unless the user says of how many."""
    if loaded is None or loaded.config is None or loaded.others or data is None:
        return None
    count = request.validation_examples
    count = sys.maxsize if count is None else count
    if not count or "example_loss" not in request.wanted:
        return None
    config = dataclasses.replace(loaded.config, data=data)
    return make_example_losses(config, loaded.found, mesh, split=split, count=count)
