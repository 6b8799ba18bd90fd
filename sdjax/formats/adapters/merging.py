"""Adapters merged into the weights of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sdjax.families.family import Model
from sdjax.formats.adapters.layers import Adapter, AdapterLayer, bias_delta, delta, fitted
from sdjax.formats.adapters.spellings import Module, modules_of
from sdjax.formats.folders import ModelError

Weight = float | Callable[[str], float]  # of an adapter: of all of it, or of a module by its path


def merged(model: Model, adapters: Sequence[tuple[Adapter, Weight]]) -> Model:
    """Return the model with adapters in its weights, in float32.

    All LoRA, LoHa, LoKr and whole differences are added to one another. A DoRA turns and scales the
    weight that the adapters before it have made: with one, their order counts. Its weight w gives
    W + w (W' - W), a way from the model to the DoRA.

    Args:
        model: with parameters; they stay as they are.
        adapters: (adapter, weight); 1 is the whole change, 0 none.

    Raises:
        ModelError: an adapter changes what the model does not have, or does not fit it.
    """
    modules = modules_of(model)
    params = dict(model.params)
    own: set[str] = set()  # parameters that are copies
    for adapter, weight in adapters:
        for path, layer in adapter.items():
            factor = weight(path) if callable(weight) else weight
            if factor:
                _add(params, own, path, modules.get(path), layer, factor)
    return dataclasses.replace(model, params=params)


def _add(
    params: dict[str, np.ndarray],
    own: set[str],
    path: str,
    module: Module | None,
    layer: AdapterLayer,
    factor: float,
) -> None:
    """Add a change to one module's parameters, which are copied the first time."""
    if module is None or module.weight[0] not in params:
        raise ModelError(f"the adapter changes {path}, which the model does not have")
    try:
        layer = fitted(layer, module.shape)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    bias = bias_delta(layer)
    if bias is not None and module.bias is None:
        raise ModelError(f"the adapter changes the bias of {path}, which has none")
    for where in (module.weight, module.bias):
        if where is not None and where[0] not in own:
            params[where[0]] = np.array(params[where[0]], np.float32)
            own.add(where[0])
    if layer.changes_weight:
        value = part(params, module.weight)
        value += _from_torch(np.float32(factor) * delta(layer, torch_weight(value)))
    if bias is not None:
        assert module.bias is not None
        value = part(params, module.bias)
        value += np.float32(factor) * bias


def part(params: Mapping[str, np.ndarray], where: tuple[str, int | None]) -> np.ndarray:
    """Return a view of a parameter, or of one block's part of it."""
    path, block = where
    return params[path] if block is None else params[path][block]


def torch_weight(value: np.ndarray) -> np.ndarray:
    """Return a weight in torch's layout: [in, out] -> [out, in], HWIO -> OIHW."""
    return value.transpose({1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim])


def _from_torch(value: np.ndarray) -> np.ndarray:
    return value.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])
