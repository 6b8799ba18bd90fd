"""ControlNets from wherever they lie: a folder of diffusers, a single file, a run's workdir."""

from __future__ import annotations

import numpy as np

from sdjax.checkpoints.workdir import read_run_config, trained_params
from sdjax.errors import UserError
from sdjax.families.bind import abstract_params
from sdjax.families.controlnet import CONTROLNET, PART
from sdjax.families.registry import model_of
from sdjax.formats.controlnet import read_controlnet_files
from sdjax.formats.folders import ModelError, folder_kind
from sdjax.machine_settings import of_model
from sdjax.methods.control import ControlConfig, network_config
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.params import component
from sdjax.models.weights import WeightsError, check_finite
from sdjax.system import paths
from sdjax.system.untrusted import explained, is_number


def read_controlnet(
    place: paths.PathLike, *, weights: str = "ema"
) -> tuple[ControlNetConfig, dict[str, np.ndarray]]:
    """Return the config and {path: float32 array} of a ControlNet.

    Args:
        place: a folder of diffusers, a single file under LDM's names, or the workdir of a run of
            the method control, or one of its checkpoints.
        weights: of a workdir, as `read_workdir` takes it.

    Raises:
        ModelError: there is none, or it is damaged.
        CheckpointError: there is no such checkpoint.
    """
    path, step = paths.to_path(place), None
    if folder_kind(path) != "workdir":
        return read_controlnet_files(path)
    if path.parent.name == "checkpoints" and is_number(path.name):
        path, step = path.parents[1], int(path.name)
    with explained(path, "a workdir of sdjax"):
        return _read_workdir(path, weights, step)


def _read_workdir(
    folder: paths.Path, weights: str, step: int | None
) -> tuple[ControlNetConfig, dict[str, np.ndarray]]:
    config = of_model(read_run_config(folder))
    if not isinstance(config.method, ControlConfig):
        raise ModelError(
            f"{folder} is a run of the method {config.method.name!r}, which trains no ControlNet; "
            "expected one of 'control'"
        )
    try:
        network = network_config(model_of(config.model).denoiser, config.method)
    except UserError as error:
        raise ModelError(f"{folder}: {error}") from error
    found = component(trained_params(folder, config, weights, step, {CONTROLNET}), CONTROLNET)
    wanted = abstract_params(PART, network)
    wrong = [p for p, w in wanted.items() if p not in found or found[p].shape != w.shape]
    if wrong:
        raise ModelError(
            f"{folder}: its checkpoint has no {CONTROLNET}.{wrong[0]} of "
            f"{list(wanted[wrong[0]].shape)}, nor {len(wrong) - 1} others of its config.json"
        )
    try:
        check_finite(found)
    except WeightsError as error:
        raise ModelError(f"{folder}: {error}") from error
    return network, {path: np.asarray(found[path], np.float32) for path in wanted}
