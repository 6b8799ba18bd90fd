"""Adapters that a command line names: --lora=FILE[:WEIGHT], of a file, a folder or a workdir."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdjax.checkpoints import workdir as runs
from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.formats.adapters.layers import Adapter
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.reading import read_adapter
from sdjax.formats.folders import folder_kind
from sdjax.system import paths
from sdjax.system.untrusted import is_number


def with_loras(model: Model, options: Sequence[str]) -> Model:
    """Return a model with the adapters of --lora in its weights, in their order.

    Raises:
        UserError: an option is wrong, or an adapter does not fit the model.
    """
    found = [parse_lora(option) for option in options]
    adapters = [(load_adapter(place, model), weight) for place, weight in found]
    return merged(model, adapters) if adapters else model


def parse_lora(option: str) -> tuple[paths.Path, float]:
    """Return (file or folder, weight) of FILE or FILE:WEIGHT; the weight is 1 where none is said.

    A file whose name ends so comes first.

    Raises:
        UserError: it is not there, or the weight is no finite number.
    """
    place, colon, weight = option.rpartition(":")
    if not colon or paths.exists(paths.to_path(option)):
        return paths.to_path(option), 1.0
    try:
        value = float(weight)
    except ValueError:
        return paths.to_path(option), 1.0
    if not math.isfinite(value):
        raise UserError(f"--lora={option}: the weight is {weight}; expected a finite number")
    return paths.to_path(place), value


def load_adapter(path: paths.PathLike, model: Model) -> Adapter:
    """Return the adapter in a file, a folder, or the workdir of a run that trained one.

    Raises:
        ModelError: it cannot be read, or does not fit the model.
    """
    if is_run(path):
        return read_run(path)[1]
    return read_adapter(path, model)


def is_run(path: paths.PathLike) -> bool:
    """Whether a path is a workdir, or a checkpoint of one: no folder of a file."""
    folder = paths.to_path(path)
    inside = folder.parent.name == "checkpoints" and is_number(folder.name)
    return folder.is_dir() and (inside or (folder / "checkpoints").is_dir())


def read_run(
    path: paths.PathLike, weights: str = "ema", step: int | None = None
) -> tuple[Model, Adapter]:
    """Return (model without parameters, adapter) of a workdir or one of its checkpoints.

    Raises:
        ModelError, CheckpointError: it is no run of an adapter, or has no such weights or step.
    """
    folder = paths.to_path(path)
    assert folder_kind(folder) == "workdir"
    if folder.parent.name == "checkpoints" and is_number(folder.name):
        folder, step = folder.parents[1], int(folder.name)
    return runs.read_adapter_run(folder, weights, step)
