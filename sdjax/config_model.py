"""The model and the method that a configuration describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.config import Config
from sdjax.errors import UserError
from sdjax.families.conditioning import Tokenize, blank_tokenizers
from sdjax.families.family import Model
from sdjax.families.registry import FAMILIES, model_of
from sdjax.methods.method import Method, Setup
from sdjax.methods.registry import METHODS
from sdjax.models.int8 import Int8


def model_of_run(
    config: Config,
    tokenizers: Mapping[str, Tokenize],
    params: Mapping[str, np.ndarray] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Model:
    """Return the model that a run trains, with these parameters.

    Args:
        tokenizers: by the field of a batch that each fills; stand-ins where only shapes matter.
    """
    kind = METHODS[config.method.name]
    names = kind.networks(config.model.networks)
    return model_of(
        config.model,
        names,
        schedule=config.schedule,
        prediction_type=config.objective.prediction_type,
        sampler=config.sample.sampler,
        scheduler=scheduler,
        tokenizers=tokenizers,
        params=params or {},
        changes=kind.changes(config.method, FAMILIES[config.model.family]),
    )


def method_of_run(
    config: Config, tokenizers: Mapping[str, Tokenize], model: Model | None = None
) -> Method:
    """Return the method of a run, bound to its networks.

    Args:
        model: what to bind it to; by default what the run trains, its frozen kernels in
            `model.frozen_dtype`.

    Raises:
        UserError: the networks do not belong together, or do not suit the method.
    """
    setup = Setup(
        config=config.method,
        model=model or _kept(config, model_of_run(config, tokenizers)),
        objective=config.objective,
        data=config.data,
        sample=config.sample,
        dtype=config.model.dtype,
        remat=config.model.remat,
        adopted=bool(config.vae_from or config.init_from),
    )
    method = METHODS[config.method.name].make(setup)
    if config.objective.resampling != "none" and not any(one.memory for one in method.phases):
        raise UserError(
            f"objective.resampling is {config.objective.resampling!r} with method "
            f"{config.method.name!r}, whose loss is not that of a denoiser at one timestep; set it "
            "to 'none'"
        )
    return method


def _kept(config: Config, model: Model) -> Model:
    """The model with its frozen kernels as the devices have them."""
    if config.model.frozen_dtype != "int8":
        return model
    change = Int8((model.family.denoiser, *model.text_encoders))
    return dataclasses.replace(model, changes=(*model.changes, change))


def blank_method(config: Config) -> Method:
    """Return the method of a run where only shapes matter: no tokenizer is read or made."""
    return method_of_run(config, blank_tokenizers(model_of(config.model)))
