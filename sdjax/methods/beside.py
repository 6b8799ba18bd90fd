"""The file side of methods that train one network beside a frozen model: its start and its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.methods.method import Export
from sdjax.models.params import component, prefixed
from sdjax.system import paths

CONDITION = "control"  # the picture of data.images that steers
Config = TypeVar("Config")


def field_differences(one: Any, other: Any) -> list[str]:
    """Return a line for each field in which two dataclasses of a kind differ."""
    names = [field.name for field in dataclasses.fields(one)]
    return [
        f"{name} is {getattr(one, name)}, not {getattr(other, name)}"
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]


def read_start(
    name: str,
    field: str,
    place: str,
    read: Callable[[paths.Path], tuple[Config, Mapping[str, np.ndarray]]],
    wanted: Config,
    *,
    hint: str,
    differences: Callable[[Config, Config], list[str]] = field_differences,
) -> dict[str, np.ndarray]:
    """Return {path: array} of a network to go on with, which a field of the recipe names.

    Args:
        name: of the network; place: the value of the field, a folder or a file.
        wanted: the shape that the recipe says; hint: which of its fields are which of the shape.

    Raises:
        UserError: there is none, or it is of another shape.
    """
    path = paths.to_path(place)
    if not paths.exists(path):
        raise UserError(f"{field} is {str(path)!r}: no such folder or file")
    found, params = read(path)
    if lines := differences(found, wanted):
        raise UserError(
            f"{field}={path} is of another shape than the recipe's: {'; '.join(lines)}. {hint}; "
            "the rest is the UNet's"
        )
    return prefixed(params, name)


def exporting(
    name: str, label: str, write: Callable[[paths.Path, Mapping[str, np.ndarray]], paths.Path]
) -> Export:
    """Return what writes the network that a run has trained, as others load it.

    Args:
        name: of the network; label: on the last screen, and of the folder in the workdir.
        write: (folder, its parameters) -> what was written.
    """

    def export(
        model: Model, trained: Mapping[str, np.ndarray], folder: paths.Path
    ) -> dict[str, paths.Path | str]:
        return {label: write(folder / label, component(trained, name))}

    return export


def of_network(name: str) -> Callable[[str], bool]:
    """Return whether a path is of a network; see `Phase.trains`."""
    return lambda path: path.startswith(f"{name}.")
