"""The layouts of single-file checkpoints: records of facts and a few pure functions.

A `SingleFile` says how the networks of a family lie in one file, which shapes tell the layout, and
what such a file means without saying it. Readers and writers know no more than this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.diffusion.schedules import ScheduleConfig

Shapes = Mapping[str, Sequence[int]]
Change = Callable[[np.ndarray], np.ndarray]


def unchanged(value: np.ndarray) -> np.ndarray:
    """Return a tensor as it is."""
    return value


def halves_swapped(value: np.ndarray) -> np.ndarray:
    """Return a tensor with its second half before its first, along the first axis."""
    half = len(value) // 2
    return np.concatenate([value[half:], value[:half]])


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a weight of diffusers in a file.

    name: of the tensor, without the prefix of its network.
    part: its number among the weights that share the tensor, one after the other along the first
        axis; None if it has the tensor to itself.
    to_file, from_file: change the weight's layout there, and back.
    default: the weight, by its shape, that programs take without reading it; None if they read
        it. A file of sdjax's own holds it where it is another.
    """

    name: str
    part: int | None = None
    to_file: Change = unchanged
    from_file: Change = unchanged
    default: Callable[[Sequence[int]], np.ndarray] | None = None


Places = Callable[[str], Place]


def own_name(config: Any) -> Places:
    """Return the places of a network that has the names of diffusers in files."""
    return Place


@dataclasses.dataclass(frozen=True)
class FileNetwork:
    """One network in a layout.

    prefixes: of its weights, in the order they are looked for; the first is that of new files, but
        "" that of a file with this network alone, where it is among them.
    configure: (shapes by name without prefix, prediction type) -> config.
    places: config -> the function from names of diffusers to places.
    bare: beginnings of its names, for files where it has no prefix.
    spelling: makes one of the ways in which files spell a name.
    surplus: (config, name) -> a label for the log if the network does not read it, else "".
    leftover: name -> the same, for what no config of this network reads.
    averages: {prefix: beginning of the names of its average}; LDM's names have no dots after it.
    pad_token: of its tokenizer, if that is not what the tokenizer's folder says.
    vocabulary: tokens that other programs take a text encoder to have; 0 if they take any.
    """

    prefixes: tuple[str, ...]
    configure: Callable[[Shapes, str], Any]
    places: Callable[[Any], Places] = own_name
    bare: tuple[str, ...] = ()
    spelling: Callable[[str], str] = lambda name: name
    surplus: Callable[[Any, str], str] = lambda config, name: ""
    leftover: Callable[[str], str] = lambda name: ""
    averages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pad_token: str | None = None
    vocabulary: int = 0

    def holds(self, name: str, prefix: str) -> bool:
        """Whether a tensor is one of this network under a prefix."""
        return name.startswith(prefix) if prefix else name.startswith(self.bare or ("\0",))

    def prefix_in(self, shapes: Shapes) -> str | None:
        """Return the prefix that the network has in a file; None if it is not there."""
        for prefix in self.prefixes:
            if any(self.holds(name, prefix) for name in shapes):
                return prefix
        return None


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """One layout of the checkpoints that hold all networks in one file.

    name: of the release, as "sd1".
    networks: those that a file may hold; a file without some of them is read without them.
    tells: whether names and shapes are surely of this layout.
    objective: names and shapes -> (noise schedule, prediction type) that they stand for; "" for the
        latter if they do not say it.
    scaling_factor, shift_factor: of the latents.
    question: completes "FILE: ", where `objective` does not say the prediction type.
    settings: the family's settings, where the file does not say them.
    leftover: name -> a label for the log if it is of no network and does not matter, else "".
    predictions: prediction types that readers of such files know.
    scheduler: the scheduler file that such a model is drawn with; None for a recipe's sampler.
    partial: whether files without an autoencoder or text encoders are usual.
    marks: (noise schedule, prediction type) -> names of empty tensors that say these; None if
        readers look for none.
    """

    name: str
    networks: Mapping[str, FileNetwork]
    tells: Callable[[Shapes], bool]
    objective: Callable[[Shapes], tuple[ScheduleConfig, str]]
    scaling_factor: float
    shift_factor: float = 0.0
    question: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    leftover: Callable[[str], str] = lambda name: ""
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    scheduler: Mapping[str, Any] | None = None
    partial: bool = False
    marks: Callable[[ScheduleConfig, str], tuple[str, ...]] | None = None


def to_file(tensors: Mapping[str, np.ndarray], places: Places) -> dict[str, np.ndarray]:
    """Return weights of diffusers under the names and in the layouts of a file.

    Args:
        tensors: of a whole network; those that share a tensor are there together.
    """
    laid: dict[str, np.ndarray] = {}
    shared: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        place = places(name)
        if place.default is not None and np.array_equal(value, place.default(value.shape)):
            continue
        value = np.ascontiguousarray(place.to_file(value))
        if place.part is None:
            laid[place.name] = value
        else:
            shared.setdefault(place.name, {})[place.part] = value
    for name, parts in shared.items():
        laid[name] = np.concatenate([parts[i] for i in sorted(parts)])
    return laid


def from_file(
    tensors: Mapping[str, np.ndarray], shapes: Shapes, places: Places
) -> dict[str, np.ndarray]:
    """The inverse of `to_file`, unchecked: for `from_diffusers`, which reports what does not fit.

    Args:
        tensors: a network's, under names without its prefix.
        shapes: of all the network's weights, by names of diffusers.

    Returns:
        What was found of `shapes`; and what was not asked for, under the names it has.
    """
    placed = {name: places(name) for name in shapes}
    spans = _spans(placed, shapes)
    found: dict[str, np.ndarray] = {}
    for name, place in placed.items():
        if place.name in tensors:
            value = np.asarray(tensors[place.name])
            if value.ndim:  # a number fits nowhere, which is reported by its shape
                value = place.from_file(value[spans.get(name, slice(None))])
            found[name] = value
        elif place.default is not None:
            found[name] = place.default(shapes[name])
    used = {place.name for place in placed.values()}
    return found | {name: value for name, value in tensors.items() if name not in used}


def _spans(placed: Mapping[str, Place], shapes: Shapes) -> dict[str, slice]:
    """The rows of weights that share a tensor; too many or too few are left to the last."""
    shared: dict[str, list[tuple[int, str]]] = {}
    for name, place in placed.items():
        if place.part is not None:
            shared.setdefault(place.name, []).append((place.part, name))
    spans: dict[str, slice] = {}
    for group in shared.values():
        start = 0
        for _, name in sorted(group):
            spans[name] = slice(start, start + shapes[name][0])
            start += shapes[name][0]
        spans[name] = slice(spans[name].start, None)
    return spans
