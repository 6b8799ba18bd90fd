"""ControlNets in files: the folder that diffusers reads, and single files under LDM's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.families.beside.controlnet import (
    ALONE,
    CONTROLNET,
    MARK,
    PART,
    PREFIX,
    config_of_file,
    places,
)
from sdjax.families.bind import abstract_params
from sdjax.families.family import Model
from sdjax.families.single_file import from_file
from sdjax.formats.diffusers_folder import read_network, write_diffusers
from sdjax.formats.folders import ModelError, read_json
from sdjax.models.config import ConfigError
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.params import prefixed
from sdjax.models.weights import (
    WeightsError,
    from_diffusers,
    load_file,
    read_header,
    tensor_shapes,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained

_LORA = "lora_controlnet"  # the mark of Stability's Control-LoRAs, which are parts of a network


def read_controlnet_files(path: paths.Path) -> tuple[ControlNetConfig, dict[str, np.ndarray]]:
    """Return the config and {path: float32 array} of a folder of diffusers, or of a single file.

    Raises:
        ModelError: it is neither, or not of a ControlNet that sdjax knows.
    """
    try:
        with explained(path, "a ControlNet", error=ModelError):
            return _read_file(path) if path.is_file() else _read_folder(path)
    except (ConfigError, WeightsError) as error:
        raise ModelError(str(error)) from error


def _read_folder(folder: paths.Path) -> tuple[ControlNetConfig, dict[str, np.ndarray]]:
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != PART.kind:
        raise ModelError(
            f"{folder / 'config.json'}: of a {brief(kind)}; expected a {PART.kind}, as the folder "
            "of a ControlNet has it"
        )
    config, _, params = read_network(PART, folder, "", True)
    return config, params


def _read_file(file: paths.Path) -> tuple[ControlNetConfig, dict[str, np.ndarray]]:
    if file.suffix != ".safetensors":
        raise ModelError(
            f"{file} is no .safetensors file; a .pth is a pickle, which can run code: save it as "
            "safetensors where torch is installed"
        )
    header, _ = read_header(file)
    if _LORA in header:
        raise ModelError(
            f"{file} is a Control-LoRA, which sdjax does not read; take a whole ControlNet"
        )
    prefix = PREFIX if PREFIX + MARK in header else ""
    if prefix + MARK not in header:
        folder = "controlnet_cond_embedding.conv_in.weight" in header
        raise ModelError(
            f"{file} has no {PREFIX}{MARK}, with or without {PREFIX!r}, as files of ControlNets "
            "have it; expected such a file, or the folder that diffusers writes"
            + (": this is the weights of one, give the folder with its config.json" * folder)
        )
    shapes = {name[len(prefix) :]: s for name, s in header.items() if name.startswith(prefix)}
    config = config_of_file(shapes)
    wanted = abstract_params(PART, config)
    names = tensor_shapes(wanted)
    found = load_file(file, wanted=lambda name: name.startswith(prefix))
    tensors = {name[len(prefix) :]: value for name, value in found.items()}
    at = places(config)

    def spell(name: str) -> str:
        return prefix + (at(name).name if name in names else name)

    try:
        return config, from_diffusers(from_file(tensors, names, at), wanted, spell=spell)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error


def write_controlnet(
    folder: paths.Path, config: ControlNetConfig, params: Mapping[str, Any]
) -> paths.Path:
    """Write the folder that `ControlNetModel.from_pretrained` loads, in place of an earlier one.

    Args:
        params: {path without prefix: array}.

    Raises:
        ModelError: the folder holds something else.
    """
    own = prefixed(params, CONTROLNET)
    model = Model(ALONE, {CONTROLNET: config}, params=own)
    return write_diffusers(folder, model, overwrite=True)
