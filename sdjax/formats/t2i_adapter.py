"""T2I-Adapters in files: the folder that diffusers reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.families.beside.t2i_adapter import ALONE, PART, T2I_ADAPTER
from sdjax.families.family import Model
from sdjax.formats.diffusers_folder import read_network, write_diffusers
from sdjax.formats.folders import ModelError, read_json
from sdjax.models.config import ConfigError
from sdjax.models.params import prefixed
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.weights import WeightsError
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained


def is_t2i_adapter(path: paths.Path) -> bool:
    """Whether a folder's config.json says that it holds a T2I-Adapter."""
    file = path / "config.json"
    return path.is_dir() and file.is_file() and read_json(file).get("_class_name") == PART.kind


def read_t2i_adapter_files(folder: paths.Path) -> tuple[T2IAdapterConfig, dict[str, np.ndarray]]:
    """Return the config and {path: float32 array} of a folder of diffusers.

    Raises:
        ModelError: it is none, or not of a T2I-Adapter that sdjax knows.
    """
    try:
        with explained(folder, "a T2I-Adapter", error=ModelError):
            kind = read_json(folder / "config.json").get("_class_name")
            if kind != PART.kind:
                raise ModelError(
                    f"{folder / 'config.json'}: of a {brief(kind)}; expected a {PART.kind}, as the "
                    "folder of a T2I-Adapter has it"
                )
            config, _, params = read_network(PART, folder, "", True)
            return config, params
    except (ConfigError, WeightsError) as error:
        raise ModelError(str(error)) from error


def write_t2i_adapter(
    folder: paths.Path, config: T2IAdapterConfig, params: Mapping[str, Any]
) -> paths.Path:
    """Write the folder that `T2IAdapter.from_pretrained` loads, in place of an earlier one.

    Args:
        params: {path without prefix: array}.

    Raises:
        ModelError: the folder holds something else.
    """
    model = Model(ALONE, {T2I_ADAPTER: config}, params=prefixed(params, T2I_ADAPTER))
    return write_diffusers(folder, model, overwrite=True)
