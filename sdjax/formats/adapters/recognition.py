"""Which family's adapter a file is, by its names and shapes."""

from __future__ import annotations

from sdjax.families.adapter_names import AdapterNames
from sdjax.families.family import Model
from sdjax.families.registry import FAMILIES, model_of
from sdjax.families.single_file import Shapes
from sdjax.formats.adapters import keys
from sdjax.formats.adapters.spellings import Module, modules_of, spellings, trainable_names
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
    for family in FAMILIES.values():
        for preset in family.presets.values():
            model = model_of(preset)
            model = model_of(preset, trainable_names(model))
            if _fits(shapes, model):
                return model
    return None


def _fits(shapes: Shapes, model: Model) -> bool:
    """Whether every key of a file is of a module of the model, with its inputs and outputs."""
    names = model.family.adapters or AdapterNames({})
    modules = modules_of(model)
    spelled = spellings(model, modules)
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
