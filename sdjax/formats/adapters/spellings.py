"""The modules of a model that adapters change, and every name that files have for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from sdjax.families.adapter_names import (
    DENOISER_PREFIXES,
    DOTTED_PREFIXES,
    KOHYA_DENOISER,
    NATIVE_PREFIXES,
    ONLY_ENCODER,
    AdapterNames,
)
from sdjax.families.bind import bind
from sdjax.families.family import Family, Model, Part
from sdjax.families.single_file import Place, unchanged
from sdjax.models.params import component
from sdjax.models.stacked_paths import block_paths, leading_axes
from sdjax.models.weights import tensor_shapes, weight_name

Where = tuple[str, int | None]  # (path of a parameter, number of the block within a stacked one)
_HEAD = "text_projection"  # which lies beside the network that has the prefix


@dataclasses.dataclass(frozen=True)
class Module:
    """A module that adapters can change.

    shape: of its weight, in torch's layout.
    weight, bias: where its parameters are; bias is None if it has none.
    """

    shape: tuple[int, ...]
    weight: Where
    bias: Where | None


@dataclasses.dataclass(frozen=True)
class Target:
    """The modules that one name in a file stands for.

    parts: their paths, in the order in which their outputs follow one another.
    places: of their weights, which may change the order of the outputs.
    """

    parts: tuple[str, ...]
    places: tuple[Place, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is one module whose outputs are in their own order."""
        return len(self.parts) == 1 and self.places[0].from_file is unchanged


def trainable_names(model: Model) -> list[str]:
    """Return the networks that adapters change: the denoiser and the text encoders."""
    names = (model.family.denoiser, *model.family.encoders)
    return [name for name in names if name in model.networks]


def modules_of(model: Model) -> dict[str, Module]:
    """Return {path: module} of everything in a model that an adapter can change.

    A path starts with its network, and has the number of one block where blocks are stacked.
    """
    found: dict[str, Module] = {}
    names = trainable_names(model)
    bound = bind(dataclasses.replace(model, changes=()), names)
    for network in names:
        own = component(bound.abstract, network)
        shapes = tensor_shapes(own)
        places = {part: where for path in own for part, where in _blocks(path)}
        for part, (path, block) in places.items():
            stem, _, leaf = part.rpartition(".")
            if leaf not in ("kernel", "scale"):
                continue
            bias = places.get(f"{stem}.bias")
            found[f"{network}.{stem}"] = Module(
                shapes[weight_name(part)],
                (f"{network}.{path}", block),
                (f"{network}.{bias[0]}", bias[1]) if bias else None,
            )
    return found


def _blocks(path: str) -> Iterator[tuple[str, Where]]:
    """Yield (path with a single block's number, where it is) of each part of a parameter."""
    for block, part in enumerate(block_paths(path)):
        yield part, (path, block if leading_axes(path) else None)


def in_transformers(part: Part, name: str) -> str:
    """Return the name of a module as transformers 4 has it, which files of adapters follow."""
    return name if name == _HEAD else part.prefix + name


def kohya_prefixes(model: Model) -> dict[str, str]:
    """Return {network: prefix of its keys in kohya's files}."""
    names, encoders = _names(model.family), list(model.text_encoders)
    found = {name: names.prefixes.get(name, name) for name in encoders}
    if len(encoders) == 1:
        found = {encoders[0]: ONLY_ENCODER}
    return {model.family.denoiser: KOHYA_DENOISER, **found}


def _names(family: Family) -> AdapterNames:
    return family.adapters or AdapterNames({})


def native_targets(model: Model, modules: Iterable[str]) -> dict[str, Target]:
    """Return {name in the denoiser's original code: its modules}, without prefix or ".weight".

    Args:
        modules: their paths.
    """
    denoiser = model.family.denoiser
    if denoiser not in model.networks:
        return {}
    places = _names(model.family).places(model.networks[denoiser])
    groups: dict[str, list[tuple[int, str, Place]]] = {}
    for path in modules:
        network, _, name = path.partition(".")
        if network == denoiser:
            place = places(f"{name}.weight")
            stem = place.name.rpartition(".")[0]
            groups.setdefault(stem, []).append((place.part or 0, path, place))
    targets = {}
    for stem, group in groups.items():
        group.sort(key=lambda member: member[0])
        targets[stem] = Target(tuple(m[1] for m in group), tuple(m[2] for m in group))
    return targets


def own_target(path: str) -> Target:
    """Return the target of a name that stands for one module, as diffusers has it."""
    return Target((path,), (Place(path),))


def spellings(model: Model, modules: Iterable[str]) -> dict[str, Target]:
    """Return {name of a module in a file of any layout: the modules it stands for}.

    Args:
        modules: their paths.
    """
    denoiser, prefixes = model.family.denoiser, kohya_prefixes(model)
    in_files = list(_file_prefixes(model))
    found: dict[str, Target] = {}
    for path in modules:
        network, _, name = path.partition(".")
        starts = [prefixes[network], _names(model.family).prefixes.get(network, "")]
        dotted = [f"{network}.", *(prefix for part, prefix in in_files if part == network)]
        if network == denoiser:
            starts += DENOISER_PREFIXES
            dotted += DOTTED_PREFIXES
        target = own_target(path)
        longer = in_transformers(model.family.parts[network], name)
        for spelled in dict.fromkeys((name, longer)):
            found |= dict.fromkeys((start + spelled for start in dotted), target)
            found |= dict.fromkeys(_underscored(starts, spelled), target)
    for stem, target in native_targets(model, modules).items():
        starts = [f"{denoiser}.", *NATIVE_PREFIXES]
        every = [*(start + stem for start in starts), *_underscored(DENOISER_PREFIXES, stem)]
        for spelled in every:
            found.setdefault(spelled, target)
    return found


def _underscored(starts: Iterable[str], name: str) -> Iterator[str]:
    """Yield a name after each of kohya's prefixes, in kohya's way and in OneTrainer's."""
    for start in starts:
        if start:
            yield f"{start}_{name.replace('.', '_')}"
            yield f"{start}.{name}"


def _file_prefixes(model: Model) -> Iterator[tuple[str, str]]:
    """Yield (text encoder, prefix) of ComfyUI's names, which are those of single files."""
    for layout in model.family.single_files:
        for name in model.text_encoders:
            if name in layout.networks:
                yield from ((name, prefix) for prefix in layout.networks[name].prefixes if prefix)
