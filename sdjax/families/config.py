"""The group `model` of a recipe: which networks, and how they are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sdjax.families.family import Part
from sdjax.models.kernels.choice import WANTED
from sdjax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """How the networks of a recipe are run; a family's own group adds which networks they are.

    With `init_from` and its kin the loaded folder decides the networks instead.
    """

    parts: ClassVar[Mapping[str, Part]] = {}

    family: str = ""
    dtype: str = "float32"  # of matmuls and convolutions; parameters stay in float32
    remat: str = "none"  # "attention", "block", "full" or the name of a jax.checkpoint policy
    # "auto": the kernel that is faster there; "dense": none; "flash" (TPU), "cudnn" (NVIDIA GPUs):
    # that one, wherever it takes the shape.
    attention: str = "auto"
    # "int8": kernels of the frozen denoiser and text encoders in 8 bits on devices, with a scale
    # for each output; for methods of adapters. "": in `dtype`.
    frozen_dtype: str = ""
    vae: VAEConfig = VAEConfig()  # every family has one

    def __post_init__(self):
        if self.attention not in WANTED:
            raise ValueError(
                f"model.attention is {self.attention!r}; expected one of {', '.join(WANTED)}"
            )
        if self.frozen_dtype not in ("", "int8"):
            raise ValueError(f"model.frozen_dtype is {self.frozen_dtype!r}; expected '' or 'int8'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "model.attention is 'cudnn', which has no float32; set model.dtype to 'bfloat16', "
                "or model.attention to 'auto'"
            )

    @property
    def networks(self) -> dict[str, Any]:
        """{name: config} of the networks that are there."""
        every = {name: getattr(self, name) for name in self.parts}
        return {name: config for name, config in every.items() if config is not None}

    @property
    def text_encoders(self) -> dict[str, Any]:
        """{name: config} of the text encoders that are there."""
        return {name: c for name, c in self.networks.items() if self.parts[name].tokens}

    @property
    def settings(self) -> dict[str, Any]:
        """The family's own fields, those that are no networks."""
        general = {field.name for field in dataclasses.fields(ModelConfig)} | set(self.parts)
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in general}
