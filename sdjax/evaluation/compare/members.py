"""Several models that draw as one: their predictions averaged, or experts by noise level."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.experts import read_expert_option
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.evaluation.loading import Loaded
from sdjax.families.family import Model
from sdjax.sampling.denoising import named_of_member
from sdjax.sampling.ensemble import (
    Expert,
    check_experts,
    check_member,
    ordered,
    params_of_experts,
)


def with_members(
    loaded: Loaded,
    others: Sequence[str],
    experts: Sequence[str],
    *,
    weights: str,
    loras: Sequence[str],
    change: Callable[[Model, str], Model],
) -> Loaded:
    """Return a model that draws with others, whose parameters are among its own.

    Args:
        others, experts: as --model, given again, and --expert name them.
        weights: of workdirs; loras: for experts, as --lora names them.
        change: (model, its name for messages) -> the model as the options have it.

    Raises:
        UserError and its kin: they are of both kinds, cannot be read or do not go together.
    """
    if others and experts:
        raise UserError("--expert does not go with a second --model; leave out one of them")
    params: dict[str, Any] = dict(loaded.found.params)
    if others:
        found = []
        for i, folder in enumerate(others, 1):
            name = f"--model={folder}"
            model = change(read_any(folder, weights=weights), name)
            check_member(loaded.found, model, name)
            params |= named_of_member(i, model.params)
            found.append(model)
        return _joined(loaded, params, found, None)
    read = []
    for option in experts:
        folder, levels = read_expert_option(option)
        name = f"--expert={option}"
        model = change(with_loras(read_any(folder, weights=weights), loras), name)
        read.append(Expert(name, model, levels))
    order = ordered(read)
    bounds = tuple(check_experts(loaded.found, order))
    params = params_of_experts(params, [expert.model.params for expert in order])
    return _joined(loaded, params, [expert.model for expert in order], bounds)


def _joined(
    loaded: Loaded,
    params: dict[str, Any],
    others: Sequence[Model],
    bounds: tuple[float, ...] | None,
) -> Loaded:
    found = dataclasses.replace(loaded.found, params=params)
    bare = tuple(dataclasses.replace(model, params={}) for model in others)
    return dataclasses.replace(loaded, found=found, others=bare, bounds=bounds)
