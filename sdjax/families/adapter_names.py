"""How files of adapters name the modules of a family: a record of facts, as `single_file` is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sdjax.families.single_file import Places, own_name

KOHYA_DENOISER = "lora_unet"  # in every family: networks/lora*.py of kohya-ss/sd-scripts
ONLY_ENCODER = "lora_te"  # of a model with one text encoder
# Of the denoiser's keys with underscores, to read: LyCORIS outside kohya's trainer, OneTrainer.
DENOISER_PREFIXES = (KOHYA_DENOISER, "lycoris", "lycoris_unet", "lora_transformer")
# Before names of diffusers, and before those of the authors' code: PEFT, ComfyUI.
DOTTED_PREFIXES = ("", "diffusion_model.")
NATIVE_PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")


def unchanged_key(key: str) -> str:
    """Return a key as it is."""
    return key


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """The names of a family's modules in files of adapters.

    prefixes: {text encoder: prefix of its keys in kohya's files}; that of a model's only encoder is
        `ONLY_ENCODER`.
    places: config of the denoiser -> places of its weights under the names of its authors' code.
    native: whether kohya's files have these names; else they have those of diffusers.
    entrance: the module of the denoiser that reads latents, whose inputs a model may have added to.
    facts: model -> entries of a file's metadata that say what it is an adapter of.
    respelled: key -> the same in the style of kohya, for layouts that this family alone has.
    """

    prefixes: Mapping[str, str]
    places: Callable[[Any], Places] = own_name
    native: bool = False
    entrance: str = ""
    facts: Callable[[Any], dict[str, str]] = lambda model: {}
    respelled: Callable[[str], str] = unchanged_key
