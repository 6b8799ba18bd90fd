"""Adapters by the losses of other methods: of inpaint and edit, and of pairs of pictures."""

from __future__ import annotations

import dataclasses

from sdjax.methods import adapters
from sdjax.methods.adapter_rules import AdaptersConfig
from sdjax.methods.dpo import DPO, DPOConfig, beside_base
from sdjax.methods.edit import EDIT, EditConfig
from sdjax.methods.inpaint import INPAINT, InpaintConfig
from sdjax.methods.method import Kind, Method, Setup
from sdjax.methods.parts import joined


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


def _adapted(kind: Kind, config: type) -> Kind:
    """The entry of a method with the loss of another, which trains adapters and nothing else."""

    def make(setup: Setup) -> Method:
        method = adapters.denoiser(setup, kind.make)
        return joined(method, (adapters.factors(setup, method),))

    return dataclasses.replace(
        adapters.ADAPTERS,
        config=config,
        make=make,
        beside=kind.beside,
        sample=kind.sample,
        data=kind.data,
        encodes=kind.encodes,
    )


INPAINT_ADAPTERS = _adapted(INPAINT, InpaintAdaptersConfig)
EDIT_ADAPTERS = _adapted(EDIT, EditAdaptersConfig)
DPO_ADAPTERS = _adapted(dataclasses.replace(DPO, make=beside_base), DPOAdaptersConfig)
