"""Which fields of the configuration are this machine's, and not the model's.

A recipe is its user's own, who sets both. The config.json of a workdir may be a stranger's: it says
what the model is, and nothing of caches, folders, workers, hosts and limits here. A compiled
program that is loaded from a cache runs, for instance, and a folder that is prepared is written to.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import Any, TypeVar

from sdjax.config import Config
from sdjax.data.config import DataConfig, parts

T = TypeVar("T")

# Shell patterns on dotted names. Every other field is the model's.
MACHINE = (
    "init_from",
    "init_prediction_type",
    "init_zero_terminal_snr",
    "vae_from",
    "text_encoder_from",
    "method.controlnet_from",
    "method.adapter_from",
    "method.image_encoder_from",
    "method.lpips_from",
    "tokenizer.path",
    "tokenizer.path_2",
    "data.name",  # TFDS downloads some by their names, and runs what it downloads
    "data.path",
    "data.data_dir",
    "data.mixture",
    "data.importance.weights",
    "data.text_embeddings",  # which only some of those datasets have
    "data.outside_links",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_pixels",
    "train.xla_options",
    "monitor.*",
    "validation.inception",
    "validation.clip",
    "validation.features",
    "sample.fidelity",  # of data.name
    "mesh.*",
    "stages",  # which have mixtures
    "compilation_cache",
)
# Of these, what a user may take from a workdir by asking for it: where its data are.
_DATA = ("data.name", "data.path", "data.data_dir", "data.mixture", "data.text_embeddings",
         "data.outside_links")  # fmt: skip


def is_machine(name: str) -> bool:
    """Whether a field, by its dotted name, is this machine's."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MACHINE)


def of_model(config: Config) -> Config:
    """Return a configuration without the settings of the machine that it was made on."""
    return _without(config, Config(), "", keep=())


def data_of_model(config: Config) -> DataConfig:
    """Return the data that a model was trained on, with folders and names as they were there.

    They are a stranger's words: `asks_for` says whether a user has to agree to them.
    """
    return _without(config.data, DataConfig(), "data.", keep=_DATA)


def _without(group: T, defaults: Any, prefix: str, keep: tuple[str, ...]) -> T:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        name, value = prefix + field.name, getattr(group, field.name)
        default = getattr(defaults, field.name, None)
        kind: Any = type(value)
        if dataclasses.is_dataclass(value) and type(default) is not kind:
            default = kind()  # another variant of the group than by default
        if name not in keep and is_machine(name):
            changes[field.name] = default
        elif dataclasses.is_dataclass(value) and dataclasses.is_dataclass(default):
            changes[field.name] = _without(value, default, f"{name}.", keep)
    return dataclasses.replace(group, **changes)  # type: ignore[type-var]


def asks_for(data: DataConfig) -> str:
    """Return what opening a model's own data takes of this machine, in words; "" for nothing.

    Nothing is taken where sdjax, or a builder of TFDS, makes the data in this machine's own folder.
    """
    found = []
    for i, part in enumerate(parts(data)):
        where = f"data.mixture[{i}]" if data.mixture else "data"
        for field in ("path", "data_dir"):
            if getattr(part, field):
                found.append(f"{where}.{field} = {getattr(part, field)!r}")
        # Not NAMESPACE:NAME, whose builders TFDS downloads.
        if not re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", part.name):
            found.append(f"{where}.name = {part.name!r}")
    return ", ".join(found)
