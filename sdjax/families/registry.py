"""The families, and the two ways between a recipe's group `model` and the record of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from sdjax.families.config import ModelConfig
from sdjax.families.family import Family, Model
from sdjax.families.flux import FLUX
from sdjax.families.sd import SD
from sdjax.families.sd3 import SD3
from sdjax.families.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL, SD3, FLUX)}
# Names of networks in any family.
NETWORKS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.parts))
# {field of a batch: folder of the tokenizer that fills it} in any family.
TOKENIZERS = {
    part.tokens: part.tokenizer for f in FAMILIES.values() for part in f.encoders.values()
}


def model_of(config: ModelConfig, names: Iterable[str] | None = None, **fields: Any) -> Model:
    """Return the model that a recipe's group describes.

    Args:
        names: of the networks; by default all.
        fields: of `Model`, besides family, networks and settings.
    """
    networks = {n: c for n, c in config.networks.items() if names is None or n in names}
    return Model(FAMILIES[config.family], networks, config.settings, **fields)


def adopted(config: ModelConfig, model: Model, names: Iterable[str], *, whole: bool) -> ModelConfig:
    """Return a recipe's group with networks of a loaded model.

    Args:
        names: networks that are taken if the model has them.
        whole: the model decides the family, which text encoders there are, and the settings.
    """
    networks = {name: model.networks[name] for name in names if name in model.networks}
    if not whole:
        return dataclasses.replace(config, **networks)
    general = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    general["family"] = model.family.name
    fields = {field.name for field in dataclasses.fields(model.family.config)}
    kept = {n: v for n, v in (config.networks | config.settings).items() if n in fields}
    encoders = {}
    if any(name in model.family.encoders for name in networks):
        encoders = {name: model.networks.get(name) for name in model.family.encoders}
        kept |= model.settings
    return model.family.config(**(general | kept | networks | encoders))
