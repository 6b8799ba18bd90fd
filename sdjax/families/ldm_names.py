"""Networks under the names of the original Stable Diffusion code (LDM, SGM, OpenCLIP).

`unet_places`, `vae_places`, `clip_places` and `open_clip_places` give the place in a file of each
weight of diffusers or transformers. Reading asks for the places that writing gives, so the two
directions cannot differ. The layouts that differ:

    VAE attention       1x1 convolutions [C, C, 1, 1] where diffusers has matrices [C, C]
    OpenCLIP attention  query, key and value in one `in_proj_weight` [3 D, D], in this order
    OpenCLIP head       `text_projection` is [D, P], applied as x @ P: no Linear's weight [P, D]

Sources: ldm/modules/diffusionmodules/{openaimodel,model}.py of CompVis/latent-diffusion,
open_clip/transformer.py; diffusers' loaders/single_file_utils.py reads what is written here.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from sdjax.families.single_file import Place, Places
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.unet_config import UNetConfig
from sdjax.models.vae import VAEConfig

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_FUSED = ("q_proj", "k_proj", "v_proj")


def unet_name(name: str, config: UNetConfig) -> str:
    """The original name of a weight of `UNet2DConditionModel`."""
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    per_level = config.layers_per_block + 1  # with the downsampler, or one more block of the way up
    where, rest = _block(name)
    if where[0] == "mid_block":
        kind, number = where[1], int(where[2])
        place = f"middle_block.{2 * number if kind == 'resnets' else 1}"
        return f"{place}.{_unet_inner(kind, rest)}"
    side, level, kind, number = where[0], int(where[1]), where[2], int(where[3])
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = config.up_block_types[level] == "CrossAttnUpBlock2D"
        return f"output_blocks.{per_level * (level + 1) - 1}.{2 if attends else 1}.{rest}"
    block = per_level * level + number
    place = f"input_blocks.{block + 1}" if side == "down_blocks" else f"output_blocks.{block}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{_unet_inner(kind, rest)}"


def _block(name: str) -> tuple[list[str], str]:
    """(the parts of a name up to the number of the module within its block, the rest)."""
    parts = name.split(".")
    length = 3 if parts[0] == "mid_block" else 4
    return parts[:length], ".".join(parts[length:])


def _unet_inner(kind: str, rest: str) -> str:
    """The name within a residual block; a transformer's are the same in both."""
    if kind != "resnets":
        return rest
    stem, _, leaf = rest.rpartition(".")
    return f"{_UNET_RESNET[stem]}.{leaf}"


def vae_name(name: str, config: VAEConfig) -> str:
    """The original name of a weight of `AutoencoderKL`. The way up is numbered from its end."""
    last = len(config.block_out_channels) - 1
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(\w+)$", name)
    if attention:
        part = _VAE_ATTENTION[attention[2]]
        return f"{attention[1]}mid.attn_1.{part}.{attention[3]}"
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
    return re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name
    )


def open_clip_name(name: str) -> str:
    """The name in OpenCLIP of a weight of transformers' CLIP; q, k and v share one."""
    if name in _OPEN_CLIP:
        return _OPEN_CLIP[name]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    assert match, name
    layer, rest = f"transformer.resblocks.{match[1]}", match[2]
    part, _, leaf = rest.removeprefix("self_attn.").partition(".")
    if part in _FUSED:
        return f"{layer}.attn.in_proj_{leaf}"
    for theirs, ours in _OPEN_CLIP_LAYER.items():
        rest = rest.replace(theirs, ours)
    return f"{layer}.{rest}"


def unet_places(config: UNetConfig) -> Places:
    """Return the places of a UNet's weights."""
    return lambda name: Place(unet_name(name, config))


def vae_places(config: VAEConfig) -> Places:
    """Return the places of an autoencoder's weights."""

    def place(name: str) -> Place:
        new = vae_name(name, config)
        if ".mid.attn_1." in new and new.endswith(".weight") and ".norm." not in new:
            return Place(new, to_file=_as_convolution, from_file=_as_matrix)
        return Place(new)

    return place


def _as_convolution(value: np.ndarray) -> np.ndarray:
    return value[:, :, None, None] if value.ndim == 2 else value


def _as_matrix(value: np.ndarray) -> np.ndarray:
    return value[:, :, 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value


def clip_places(config: Any) -> Places:
    """Return the places of CLIP's weights: the names of transformers 4, which A1111 has."""
    heads = ("text_projection.",)
    return lambda name: Place(name if name.startswith(heads) else f"text_model.{name}")


def clip_spelling(name: str) -> str:
    """Return a name of CLIP's as transformers 5 spells it, which some files follow."""
    return name.removeprefix("text_model.")


def open_clip_places(config: CLIPTextConfig) -> Places:
    """Return the places of the weights of an encoder of OpenCLIP."""

    def place(name: str) -> Place:
        new = open_clip_name(name)
        if ".attn.in_proj_" in new:
            return Place(new, part=_FUSED.index(name.split(".")[-2]))
        if new == "text_projection":
            return Place(new, to_file=np.transpose, from_file=np.transpose)
        return Place(new)

    return place


def open_clip_surplus(config: CLIPTextConfig, name: str) -> str:
    """Return the label of what an encoder of OpenCLIP has in a file and diffusers drops, or "".

    SD2's files hold the layer after the one that is used, and the head.
    """
    last = f"transformer.resblocks.{config.num_hidden_layers}."
    if name.startswith(last):
        return f"{last}*"
    heads = ("text_projection", "text_projection.weight") if config.projection_dim is None else ()
    return name if name in heads else ""
