"""Adapters by the losses of other methods: of inpaint and edit, and of pairs of pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sdjax.errors import UserError
from sdjax.methods import adapters
from sdjax.methods.adapter_rules import AdaptersConfig
from sdjax.methods.condition import CONDITION, ConditionConfig
from sdjax.methods.dpo import DPO, DPOConfig, beside_base
from sdjax.methods.edit import EDIT, EditConfig
from sdjax.methods.inpaint import INPAINT, InpaintConfig
from sdjax.methods.method import Kind, Method, Setup
from sdjax.methods.parts import joined
from sdjax.models.adapters.networks import MARK


@dataclasses.dataclass(frozen=True)
class InpaintAdaptersConfig(AdaptersConfig, InpaintConfig):
    """Training of adapters for a denoiser that reads a mask and a masked picture.

    It has the fields of the methods adapters and inpaint.
    """

    name: str = "inpaint_adapters"

    def __post_init__(self) -> None:
        AdaptersConfig.__post_init__(self)
        InpaintConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class EditAdaptersConfig(AdaptersConfig, EditConfig):
    """Training of adapters for a denoiser that reads the picture to be edited.

    It has the fields of the methods adapters and edit.
    """

    name: str = "edit_adapters"


@dataclasses.dataclass(frozen=True)
class DPOAdaptersConfig(AdaptersConfig, DPOConfig):
    """Training of adapters on pairs of a chosen and a rejected picture.

    The reference is the model without its adapters.
    """

    name: str = "dpo_adapters"

    def __post_init__(self) -> None:
        AdaptersConfig.__post_init__(self)
        DPOConfig.__post_init__(self)
        if self.text_targets:
            raise ValueError(
                f"method.text_targets is {self.text_targets}; expected (): the model and its "
                "reference read the same text"
            )


@dataclasses.dataclass(frozen=True)
class ConditionAdaptersConfig(AdaptersConfig, ConditionConfig):
    """Training of adapters for a denoiser that reads the latents of a condition.

    It has the fields of the methods adapters and condition.
    """

    name: str = "condition_adapters"

    def __post_init__(self) -> None:
        AdaptersConfig.__post_init__(self)
        ConditionConfig.__post_init__(self)


def _adapted(kind: Kind, config: type) -> Kind:
    """The entry of a method with the loss of another, which trains adapters and nothing else."""

    def make(setup: Setup) -> Method:
        method = adapters.denoiser(setup, kind.make)
        method = joined(method, (adapters.factors(setup, method),))

        def start(loaded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if kind.task:
                _check_entrance(setup, method, loaded)
            return method.start(loaded)

        return dataclasses.replace(method, start=start)

    return dataclasses.replace(
        adapters.ADAPTERS,
        config=config,
        make=make,
        task=kind.task,
        sample=kind.sample,
        data=kind.data,
        encodes=kind.encodes,
    )


def _check_entrance(setup: Setup, method: Method, loaded: Mapping[str, np.ndarray]) -> None:
    """Check that the picture has an effect: by the denoiser's weights, or by an adapter.

    Raises:
        UserError: the weights that read it are zeros, which no adapter changes.
    """
    family, latent = setup.model.family, setup.model.vae.latent_channels
    assert family.adapters is not None
    layer = f"{family.denoiser}.{family.adapters.entrance}"
    kernel, added = loaded.get(f"{layer}.kernel"), family.latent_channels(setup.model.denoiser)
    if kernel is None or added == latent or any(layer + MARK in path for path in method.abstract):
        return
    if not kernel[..., kernel.shape[-2] * latent // added :, :].any():  # [..., in, out]
        raise UserError(
            f"{layer} reads the picture through channels of zeros, since init_from is a model that "
            f"reads noisy latents alone, and no adapter of method.targets, {setup.config.targets}, "
            f"changes it: the picture would have no effect. Add {family.adapters.entrance!r}"
        )


INPAINT_ADAPTERS = _adapted(INPAINT, InpaintAdaptersConfig)
EDIT_ADAPTERS = _adapted(EDIT, EditAdaptersConfig)
CONDITION_ADAPTERS = _adapted(CONDITION, ConditionAdaptersConfig)
DPO_ADAPTERS = _adapted(dataclasses.replace(DPO, make=beside_base), DPOAdaptersConfig)
