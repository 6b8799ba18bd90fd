"""Which family's adapter a file is, by its names and shapes."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from sdjax.families.adapter_names import AdapterNames
from sdjax.families.family import Model
from sdjax.families.registry import FAMILIES, model_of
from sdjax.families.single_file import Shapes
from sdjax.formats.adapters import keys
from sdjax.formats.adapters.spellings import (
    Module,
    Target,
    modules_of,
    spellings,
    trainable_names,
)
from sdjax.formats.folders import ModelError
from sdjax.models.weights import read_header
from sdjax.system import paths

# Parts whose second axis, or first, is that of the module's inputs, or outputs.
_INPUTS, _OUTPUTS = ("lora_down",), ("lora_up",)


def family_of(file: paths.Path) -> str:
    """Return the title of the family whose modules a file of an adapter has; "" if of none."""
    model = _model_of(read_header(file)[0])
    return model.family.title if model else ""


def release_of(file: paths.Path) -> Model:
    """Return the published model whose modules an adapter has, without weights.

    Raises:
        ModelError: it is of no release.
    """
    model = _model_of(read_header(file)[0])
    if model is None:
        raise ModelError(
            f"{file}: its names and shapes are those of no release that sdjax knows; give "
            "--base=MODEL, the model that it changes"
        )
    return model


def _model_of(shapes: Shapes) -> Model | None:
    for name, family in FAMILIES.items():
        for preset in family.presets:
            model, modules, spelled = _release(name, preset)
            if _fits(shapes, model, modules, spelled):
                return model
    return None


@functools.cache
def _release(family: str, preset: str) -> tuple[Model, dict[str, Module], dict[str, Target]]:
    """(model without weights, its modules, their names) of a preset."""
    config = FAMILIES[family].presets[preset]
    model = model_of(config, trainable_names(model_of(config)))
    modules = modules_of(model)
    return model, modules, spellings(model, modules)


def _fits(
    shapes: Shapes, model: Model, modules: Mapping[str, Module], spelled: Mapping[str, Target]
) -> bool:
    """Whether every key of a file is of a module of the model, with its inputs and outputs."""
    names = model.family.adapters or AdapterNames({})
    for key, shape in shapes.items():
        if key.startswith(keys.BUNDLED):
            continue
        found = keys.split(names.respelled(key))
        target = spelled.get(found[0]) if found else None
        if found is None or target is None:
            return False
        if not _sizes_fit(found[1], tuple(shape), [modules[path] for path in target.parts]):
            return False
    return True


def _sizes_fit(part: str, shape: tuple[int, ...], modules: list[Module]) -> bool:
    if part in _INPUTS and len(shape) > 1 and len(modules[0].shape) > 1:
        return shape[1] == modules[0].shape[1]
    if part in _OUTPUTS and shape:
        return shape[0] <= sum(module.shape[0] for module in modules)
    return True
