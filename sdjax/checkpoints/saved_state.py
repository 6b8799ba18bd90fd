"""The contents of the train state in a checkpoint: names, shapes and dtypes, without numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from sdjax.system import paths

_MOST = 20  # lines that an error shows
# Parameters compress by a tenth. Those of new networks are random, but for some zeros.
_MOST_RATIO, _FREE = 100, 64 * 2**20


def leaves(tree: Any) -> dict[str, str]:
    """{"params/unet.conv_in.bias": "float32[320]"}; parts without arrays are left out."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if getattr(leaf, "shape", None) is not None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return found


def differences(step_folder: paths.PathLike, wanted: Mapping[str, str]) -> list[str]:
    """Compare the arrays of a checkpoint, each of which is opened, with `leaves` of a state.

    Returns:
      A line for each that differs, 20 at most, and then how many more there are.
    """
    folder = paths.to_path(step_folder) / "state"
    saved = leaves(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    lines = [
        f"only in the checkpoint: {name} {saved[name]}"
        for name in sorted(saved.keys() - wanted.keys())
    ]
    lines += [
        f"not in the checkpoint: {name} {wanted[name]}"
        for name in sorted(wanted.keys() - saved.keys())
    ]
    lines += [
        f"{name}: {saved[name]} in the checkpoint, {wanted[name]} now"
        for name in sorted(saved.keys() & wanted.keys())
        if saved[name] != wanted[name]
    ]
    return lines[:_MOST] + ([f"... and {len(lines) - _MOST} more"] if len(lines) > _MOST else [])


def trained(step_folder: paths.PathLike) -> set[str]:
    """Return the paths of the parameters in a checkpoint, which are those that its run trains."""
    folder = paths.to_path(step_folder) / "state"
    return set(ocp.PyTreeCheckpointHandler().metadata(folder).tree["params"])


def check_size(step_folder: paths.PathLike, size: int) -> None:
    """Raise a ValueError if a checkpoint announces far more bytes of parameters than it has.

    What a file does not hold is read as zeros: a small one could fill any memory.
    """
    folder = paths.to_path(step_folder) / "state"
    if paths.is_remote(folder):
        return
    parts = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    there = sum(os.path.getsize(part) for part in parts if os.path.isfile(part))
    if size > _MOST_RATIO * there + _FREE:
        raise ValueError(f"it announces {size:,} bytes of parameters, and its files have {there:,}")


def stored(step_folder: paths.PathLike) -> set[str]:
    """Return Orbax's names of the arrays in a finished checkpoint, read from its manifest alone."""
    folder = paths.to_path(step_folder) / "state"
    base: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
    if paths.is_remote(folder):
        _, _, bucket, *parts = folder.parts  # "/", "gs", ...
        base = {"driver": "gcs", "bucket": bucket, "path": "/".join(parts) + "/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return {key.decode().partition("/")[0] for key in store.list().result()}
