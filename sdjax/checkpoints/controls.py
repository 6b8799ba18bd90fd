"""Networks that steer a model, from wherever they lie: a folder, a single file, a run's workdir."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints.workdir import read_run_config, trained_params
from sdjax.errors import UserError
from sdjax.families.beside import controlnet, ip_adapter, t2i_adapter
from sdjax.families.bind import abstract_params
from sdjax.families.family import Model, Part
from sdjax.families.registry import model_of
from sdjax.formats.controlnet import read_controlnet_files
from sdjax.formats.folders import ModelError, folder_kind
from sdjax.formats.ip_adapter import is_ip_adapter, read_ip_adapter_file
from sdjax.formats.t2i_adapter import is_t2i_adapter, read_t2i_adapter_files
from sdjax.machine_settings import of_model
from sdjax.methods import control
from sdjax.methods import ip_adapter as ip_method
from sdjax.methods import t2i_adapter as t2i_method
from sdjax.models.params import component
from sdjax.models.weights import WeightsError, check_finite
from sdjax.sampling.control import SteeringConfig
from sdjax.system import paths
from sdjax.system.untrusted import explained, is_number


class _Trained(NamedTuple):
    """The network that a method trains.

    shape: (model, the method's group) -> its config; raises a UserError where there is none.
    """

    name: str
    part: Part
    shape: Callable[[Model, Any], Any]


_METHODS = {
    control.ControlConfig: _Trained(
        controlnet.CONTROLNET,
        controlnet.PART,
        lambda model, config: control.network_config(model.denoiser, config),
    ),
    t2i_method.T2IAdapterMethodConfig: _Trained(
        t2i_adapter.T2I_ADAPTER, t2i_adapter.PART, t2i_method.network_config
    ),
    ip_method.IPAdapterMethodConfig: _Trained(
        ip_adapter.IP_ADAPTER, ip_adapter.PART, ip_method.network_config
    ),
}


def read_control(
    place: paths.PathLike, *, weights: str = "ema"
) -> tuple[SteeringConfig, dict[str, np.ndarray]]:
    """Return the config and {path: float32 array} of a network that steers.

    Args:
        place: a folder of diffusers; a single file of an IP-Adapter, or of a ControlNet under LDM's
            names; the workdir of a run of the method control, t2i_adapter or ip_adapter, or one of
            its checkpoints.
        weights: of a workdir, as `read_workdir` takes it.

    Raises:
        ModelError: there is none, or it is damaged.
        CheckpointError: there is no such checkpoint.
    """
    path, step = paths.to_path(place), None
    if is_ip_adapter(path):
        return read_ip_adapter_file(path)
    if folder_kind(path) != "workdir":
        return read_t2i_adapter_files(path) if is_t2i_adapter(path) else read_controlnet_files(path)
    if path.parent.name == "checkpoints" and is_number(path.name):
        path, step = path.parents[1], int(path.name)
    with explained(path, "a workdir of sdjax"):
        return _read_workdir(path, weights, step)


def _read_workdir(
    folder: paths.Path, weights: str, step: int | None
) -> tuple[SteeringConfig, dict[str, np.ndarray]]:
    config = of_model(read_run_config(folder))
    kind = _METHODS.get(type(config.method))
    if kind is None:
        raise ModelError(
            f"{folder} is a run of the method {config.method.name!r}, which trains no network that "
            f"steers; expected {', '.join(cls().name for cls in _METHODS)}"
        )
    try:
        network = kind.shape(model_of(config.model), config.method)
    except UserError as error:
        raise ModelError(f"{folder}: {error}") from error
    found = component(trained_params(folder, config, weights, step, {kind.name}), kind.name)
    wanted = abstract_params(kind.part, network)
    wrong = [p for p, w in wanted.items() if p not in found or found[p].shape != w.shape]
    if wrong:
        raise ModelError(
            f"{folder}: its checkpoint has no {kind.name}.{wrong[0]} of "
            f"{list(wanted[wrong[0]].shape)}, nor {len(wrong) - 1} others of its config.json"
        )
    try:
        check_finite(found)
    except WeightsError as error:
        raise ModelError(f"{folder}: {error}") from error
    return network, {path: np.asarray(found[path], np.float32) for path in wanted}
