"""ControlNets beside a model: their place among its networks, and their names in files of LDM.

A ControlNet is of the family whose UNet it steers, and of no pipeline: it lies in a folder or a
file of its own.
"""

from __future__ import annotations

import dataclasses
import re

from sdjax.errors import UserError
from sdjax.families import ldm_configs
from sdjax.families.family import Family, Model, Part
from sdjax.families.ldm_names import unet_name
from sdjax.families.sd import SD
from sdjax.families.single_file import Place, Places, Shapes
from sdjax.models.config import ConfigError
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.controlnet.network import ControlNet
from sdjax.models.unet_config import UNetConfig

CONTROLNET = "controlnet"  # the name of the network, and the first word of its parameters' paths
PART = Part(ControlNet, ControlNetConfig, "ControlNetModel")
PREFIX = "control_model."  # in files of ControlNet's authors (cldm/cldm.py); others have none
MARK = "input_hint_block.0.weight"  # of such a file, without prefix
# What a ControlNet shares with the UNet that it steers.
_FITTING = (
    "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
    "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
_OWN_ENDS = {
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_mid_block": "middle_block_out.0",
}


def with_controlnet(model: Model, config: ControlNetConfig) -> Model:
    """Return a model that has a ControlNet as well.

    Raises:
        UserError: its denoiser is no UNet, or another than the ControlNet was made for.
    """
    check(model, config, "the ControlNet")
    return dataclasses.replace(
        model, family=family_with(model.family), networks={**model.networks, CONTROLNET: config}
    )


def family_with(family: Family) -> Family:
    """Return a family whose parts include a ControlNet."""
    return dataclasses.replace(family, parts={**family.parts, CONTROLNET: PART})


ALONE = family_with(SD)  # of a ControlNet without a model: its part is the same in every family


def check(model: Model, config: ControlNetConfig, name: str) -> None:
    """Check that a ControlNet steers a model's denoiser.

    Args:
        name: of the ControlNet, for messages.

    Raises:
        UserError: naming the fields that differ.
    """
    unet = model.denoiser
    if not isinstance(unet, UNetConfig):
        raise UserError(
            f"{name} steers a UNet, of SD1, SD2 or SDXL; the model is of the family "
            f"{model.family.name!r}, which has none"
        )
    differing = [
        f"{field} is {getattr(config, field)}, the UNet's {getattr(unet, field)}"
        for field in _FITTING
        if getattr(config, field) != getattr(unet, field)
    ]
    if differing:
        raise UserError(f"{name} is not for this model: its {'; its '.join(differing)}")
    factor = model.vae.downscale
    if config.downscale != factor:
        widths = config.conditioning_embedding_out_channels
        raise UserError(
            f"{name} brings a condition to 1/{config.downscale} of its size by "
            f"conditioning_embedding_out_channels {list(widths)}, and the VAE a picture to "
            f"1/{factor}; expected {factor.bit_length()} widths"
        )


def differences(one: ControlNetConfig, other: ControlNetConfig) -> list[str]:
    """Return a line for each field in which two shapes differ, beyond the way they are written.

    A number for all levels is the same as one for each.
    """
    lines = []
    for field in dataclasses.fields(ControlNetConfig):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("attention_head_dim", "transformer_layers_per_block"):
            count = len(one.block_out_channels)
            left, right = (x if isinstance(x, tuple) else (x,) * count for x in (left, right))
        if left != right and field.name != "upcast_attention":  # which files do not say
            lines.append(f"{field.name} is {left}, not {right}")
    return lines


def places(config: ControlNetConfig) -> Places:
    """Return the places of a ControlNet's weights in a file of LDM, without prefix."""
    unet = config.unet
    last = 4 * len(config.conditioning_embedding_out_channels) - 2

    def place(name: str) -> Place:
        stem, _, leaf = name.rpartition(".")
        if stem in _OWN_ENDS:
            return Place(f"{_OWN_ENDS[stem]}.{leaf}")
        if stem == "controlnet_cond_embedding.conv_out":
            return Place(f"input_hint_block.{last}.{leaf}")
        if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", stem):
            return Place(f"input_hint_block.{2 * (int(match[1]) + 1)}.{leaf}")
        if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", stem):
            return Place(f"zero_convs.{match[1]}.0.{leaf}")
        return Place(unet_name(name, unet))

    return place


def config_of_file(shapes: Shapes) -> ControlNetConfig:
    """Return the config of a ControlNet whose weights have these shapes, by LDM's names.

    Raises:
        ConfigError: they are those of no ControlNet.
    """
    first = ldm_configs.shape_of(shapes, "input_blocks.0.0.weight", 4)
    # Of a UNet it lacks the end alone, whose shape says the channels that come out.
    unet = ldm_configs.unet_config({**shapes, "out.2.weight": (first[1], first[0], 3, 3)},
                                   sample_size=64)  # fmt: skip
    hints = sorted(
        int(match[1])
        for name in shapes
        if (match := re.fullmatch(r"input_hint_block\.(\d{1,3})\.weight", name))
    )
    widths = [
        ldm_configs.shape_of(shapes, f"input_hint_block.{i}.weight", 4)[0] for i in hints[:-1:2]
    ]
    channels = ldm_configs.shape_of(shapes, MARK, 4)[1]
    try:
        return ControlNetConfig.of_unet(
            unet,
            conditioning_channels=channels,
            conditioning_embedding_out_channels=tuple(widths),
        )
    except ValueError as error:
        raise ConfigError(f"the ControlNet's shapes: {error}") from error
