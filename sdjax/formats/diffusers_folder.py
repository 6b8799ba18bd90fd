"""Folders in the layout of diffusers: pipelines, and the folder of one network.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

and what else a family has. What is written loads in torch's `DiffusionPipeline.from_pretrained`,
with transformers 4 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.data.text.tokenizer_files import TokenizerError
from sdjax.data.text.tokenizers import load_tokenizer
from sdjax.families.bind import abstract_params
from sdjax.families.family import Family, Model, Part
from sdjax.families.registry import FAMILIES, NETWORKS, TOKENIZERS
from sdjax.formats.folders import (
    ModelError,
    check_components,
    read_json,
    replaced_folder,
    scheduler_file,
    write_json,
)
from sdjax.formats.scheduler_json import scheduler_from_diffusers
from sdjax.formats.single_file_layout import counted
from sdjax.formats.weight_files import find_weights, parse_size, untied, write_weights
from sdjax.models.config import ConfigError
from sdjax.models.weight_checks import quantised_config
from sdjax.models.weights import (
    WeightsError,
    from_diffusers,
    load_file,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained, plain

# {class of diffusers: the family whose folders it reads}.
PIPELINES = {cls: family for family in FAMILIES.values() for cls in family.pipelines}
DTYPES = ("float32", "bfloat16", "float16")
# Parts of a pipeline that have no part in training or drawing.
_IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def read_diffusers(
    folder: paths.PathLike,
    *,
    components: Sequence[str] = NETWORKS,
    variant: str = "",
    with_weights: bool = True,
) -> Model:
    """Reads a pipeline folder, or the folder of one network (its config.json and weights).

    A tokenizer comes with its text encoder, the schedule with the UNet. Without weights, `params`
    is empty and the folder need not have any.

    Raises:
        ModelError: listing everything wrong in any part: fields that are not supported,
            weights that are missing, unused or of another shape, files that cannot be read.
    """
    folder = paths.to_path(folder)
    check_components(components)
    with explained(folder, "a diffusers folder", error=ModelError):
        return _read(folder, components, variant, with_weights)


def _read(folder: paths.Path, components: Sequence[str], variant: str, with_weights: bool) -> Model:
    """See `read_diffusers`."""
    problems: list[str] = []
    ignored: list[str] = []
    index = read_json(folder / "model_index.json") if _is_whole(folder) else {}
    if index:
        family, listed = _parts(folder / "model_index.json", index, ignored)
        folders = {name: folder / name for name in listed}
    else:
        family, folders = _single_part(folder, components)
    networks: dict[str, Any] = {}
    params: dict[str, np.ndarray] = {}
    for name in [name for name in family.parts if name in folders and name in components]:
        part = family.parts[name]
        try:
            config, skipped, own = read_network(part, folders[name], variant, with_weights)
        except (ConfigError, WeightsError, ModelError) as error:
            problems.append(str(error))
            continue
        networks[name] = config
        params |= {f"{name}.{path}": value for path, value in own.items()}
        ignored += [f"{name}: {field}" for field in skipped if not field.startswith("_")]
    fields: dict[str, Any] = {}
    if family.denoiser in components and "scheduler" in folders:
        try:
            fields |= _read_scheduler(folders["scheduler"], family, index)
        except ValueError as error:
            problems.append(str(error))
    settings = family.settings_of_index(index) if index else {}
    model = Model(family, networks, settings, params=params, **fields)
    tokenizers: dict[str, TextTokenizer] = {}
    for name, part in family.encoders.items():
        if name in components and part.tokenizer in folders:
            try:
                tokenizer = _read_tokenizer(model, name, folders[part.tokenizer], ignored)
                tokenizers[part.tokens] = tokenizer
            except TokenizerError as error:
                problems.append(str(error))
    if problems:
        raise ModelError("\n".join(problems))
    return dataclasses.replace(model, tokenizers=tokenizers, ignored=tuple(ignored))


def _is_whole(folder: paths.Path) -> bool:
    return (folder / "model_index.json").is_file()


def _parts(
    file: paths.Path, index: Mapping[str, Any], ignored: list[str]
) -> tuple[Family, list[str]]:
    """(family, names of the parts) of a pipeline, from its model_index.json."""
    cls = index.get("_class_name")
    family = PIPELINES.get(cls) if isinstance(cls, str) else None
    own = family.parts if family else NETWORKS
    known = (*own, "scheduler", *TOKENIZERS.values(), *_IGNORED_PARTS)
    listed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    # As in diffusers, names that begin so are somebody's own notes (configuration_utils.py).
    private = [name for name in listed if name.startswith("_")]
    listed = [name for name in listed if name not in private]
    unknown = [name for name in listed if name not in known]
    if family is None or unknown:
        more = f" with {', '.join(map(plain, unknown[:8]))}" if unknown else ""
        raise ModelError(f"{file}: a {plain(cls)}{more}; sdjax reads {', '.join(PIPELINES)}")
    ignored += [*private, *(name for name in listed if name in _IGNORED_PARTS)]
    return family, [name for name in listed if name not in _IGNORED_PARTS]


def _single_part(
    folder: paths.Path, components: Sequence[str]
) -> tuple[Family, dict[str, paths.Path]]:
    """(family, {name: folder}) of a folder that holds one network.

    Where several families have such a network it is the first's.
    """
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or config.get("model_type")
    found = [
        (family, name)
        for family in FAMILIES.values()
        for name, part in family.parts.items()
        if part.kind == kind and part.owns(config)
    ]
    if not found:
        what = kind or config.get("architectures")
        known = dict.fromkeys(p.kind for f in FAMILIES.values() for p in f.parts.values())
        raise ModelError(
            f"{folder / 'config.json'}: of a {brief(what)}; expected one of {', '.join(known)}"
        )
    wanted = [(family, name) for family, name in found if name in components]
    if not wanted:
        raise ModelError(f"{folder} holds a {found[0][1]}; expected {' or '.join(components)}")
    family, name = wanted[0]
    parts, tokenizer = {name: folder}, family.parts[name].tokenizer
    if tokenizer and (folder / "tokenizer_config.json").is_file():
        parts[tokenizer] = folder
    return family, parts


def read_network(
    part: Part, folder: paths.Path, variant: str, with_weights: bool
) -> tuple[Any, list[str], dict[str, np.ndarray]]:
    """(config, ignored fields and weights, float32 params without prefix) of a network's folder.

    Raises:
        UserError: config or weights are missing, or are not those of such a network.
    """
    file = folder / "config.json"
    content = read_json(file)
    if problem := quantised_config(content):
        raise WeightsError(f"{file}: {problem}")
    config, ignored = part.config.from_json(content, where=str(file))
    if not with_weights:
        return config, ignored, {}
    shapes = abstract_params(part, config)
    found = find_weights(folder, variant)
    surplus: list[str] = []

    def wanted(key: str) -> bool:
        label = part.surplus(config, key)
        surplus.extend([label] if label else [])
        return not label

    tensors = load_file(found, wanted=wanted)
    try:
        own = from_diffusers(untied(tensors, part.tied, found), shapes)
        return config, [*ignored, *counted(surplus)], own
    except WeightsError as error:
        raise WeightsError(f"{found}: {error}") from error


def _read_scheduler(folder: paths.Path, family: Family, index: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model that a scheduler's folder fills."""
    file = folder / "scheduler_config.json"
    # Pipelines load the class that their index names, whatever the file says of itself.
    content = {**read_json(file), "_class_name": index["scheduler"][-1]}
    changes = family.scheduler_changes(index["_class_name"])
    read = scheduler_from_diffusers(content, where=str(file), changes=changes)
    return {
        "schedule": read.schedule,
        "prediction_type": read.prediction_type,
        "sampler": read.sampler,
        "unsupported_sampler": read.unsupported,
        "scheduler": content,
    }


def _read_tokenizer(
    model: Model, name: str, folder: paths.Path, ignored: list[str]
) -> TextTokenizer:
    """The tokenizer of a text encoder, for at most as many tokens as that reads."""
    part = model.family.parts[name]
    tokenizer = load_tokenizer(part.tokenizer_kind, folder)
    if (config := model.networks.get(name)) is None:
        return tokenizer
    length, own = model.text_length(name), tokenizer.context_length
    if part.length_setting:
        tokenizer = tokenizer.of_length(length)
    elif own > length:
        ignored.append(f"tokenizer: model_max_length {own}, taken as {length}")
        tokenizer = tokenizer.of_length(length)
    tokenizer.check_vocabulary(config.vocab_size, folder)
    return tokenizer


def write_diffusers(
    folder: paths.PathLike,
    model: Model,
    *,
    dtype: str = "float32",
    max_shard_size: str = "",
    overwrite: bool = False,
) -> paths.Path:
    """Writes a pipeline folder, or the folder of one network if there is but one.

    It appears under its name only once it is complete.

    Args:
        folder: to write.
        model: all networks of a pipeline, tokenizers and schedule; or one network.
        dtype: of the weights in the files: float32, bfloat16 or float16.
        max_shard_size: of a file of weights, as "2GB"; larger networks take several. "" is what
            diffusers and transformers take.
        overwrite: replace a folder of networks that is there.

    Raises:
        ModelError: something is missing, a weight overflows in `dtype`, or `folder` is not
            empty.
        OSError: the disk's own error; nothing is left behind.
    """
    folder = paths.to_path(folder)
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    networks = model.networks
    single = next(iter(networks)) if len(networks) == 1 else None
    if single is None and (missing := model.missing()):
        raise ModelError(f"{folder}: a pipeline needs {', '.join(missing)} as well")
    try:
        if max_shard_size:
            parse_size(max_shard_size)
        with replaced_folder(folder, overwrite=overwrite) as partial:
            for name, config in networks.items():
                own, part = partial if single else partial / name, model.family.parts[name]
                own.mkdir(exist_ok=True)
                write_json(own / "config.json", part.described(config))
                write_weights(
                    own, model.component(name), name=name, text=bool(part.tokens),
                    prefix=part.prefix, dtype=dtype, max_shard_size=max_shard_size,
                )  # fmt: skip
            if single is None:
                _write_pipeline(partial, model)
    except WeightsError as error:
        raise ModelError(str(error)) from error
    return folder


def _write_pipeline(folder: paths.Path, model: Model) -> None:
    """Write the parts of a pipeline that are no networks: scheduler, tokenizers, index."""
    family, scheduler = model.family, scheduler_file(model)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": family.pipeline_class(model),
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    for name, config in model.networks.items():
        part = family.parts[name]
        if not part.tokens:
            index[name] = ["diffusers", part.kind]
            continue
        index[name] = ["transformers", config.architecture]
        tokenizer = model.tokenizers[part.tokens]
        index[part.tokenizer] = ["transformers", tokenizer.transformers_class]
        tokenizer.save(folder / part.tokenizer)
    write_json(folder / "model_index.json", index | family.index(model))
