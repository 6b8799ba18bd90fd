"""FLUX.1's transformer under the names of Black Forest Labs' code.

ComfyUI's files have these names too, after `model.diffusion_model.`. The layouts that differ:

    qkv         query, key and value in one tensor, in this order
    linear1     of a single block: query, key, value and the hidden channels of its MLP
    final_layer its modulation is shift, scale; diffusers' `norm_out` is scale, shift

Sources: black-forest-labs/flux, modules/layers.py; diffusers' loaders/single_file_utils.py reads
what is written here. Blocks have the names of scripts/lora_block_weight.py of
hako-mikan/sd-webui-lora-block-weight, `BLOCKIDFLUX`: IN is what is before them, D00 the first of
the double ones, S00 of the single ones, OUT what is after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdjax.families.adapter_names import TEXT, BlockLists
from sdjax.families.single_file import Place, Places, halves_swapped
from sdjax.models.flux.config import FluxConfig

_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
}
_BLOCKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
# The order of the weights that share a tensor.
_PARTS = {
    "attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3,
    "attn.add_q_proj": 0, "attn.add_k_proj": 1, "attn.add_v_proj": 2,
}  # fmt: skip

# Attention of a block as XLabs-AI/x-flux names it: 1 is of the picture, 2 of the text.
_XLABS = re.compile(r"(.*)(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(\w+)")
_XLABS_NAMES = {
    ("double", "qkv", "1"): "img_attn.qkv",
    ("double", "qkv", "2"): "txt_attn.qkv",
    ("double", "proj", "1"): "img_attn.proj",
    ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "linear1",
    ("single", "proj", ""): "linear2",
}


def xlabs_respelled(key: str) -> str:
    """Return a key of a LoRA of XLabs' trainer under the names of Black Forest Labs."""
    found = _XLABS.match(key)
    name = _XLABS_NAMES.get((found[2], found[4], found[5])) if found else None
    if not found or not name:
        return key
    rest = key[found.end() :]
    return f"{found[1]}{found[2]}_blocks.{found[3]}.{name}.lora_{found[6]}{rest}"


def flux_place(name: str) -> Place:
    """Return the place in a file of a weight of `FluxTransformer2DModel`."""
    stem, _, leaf = name.rpartition(".")
    blocks, _, rest = stem.partition(".")
    if blocks not in _BLOCKS:
        new = f"{_ENDS[stem]}.{leaf}"
        if stem == "norm_out.linear":
            return Place(new, to_file=halves_swapped, from_file=halves_swapped)
        return Place(new)
    (theirs, names), (number, _, inner) = _BLOCKS[blocks], rest.partition(".")
    leaf = "scale" if inner.startswith("attn.norm_") else leaf
    return Place(f"{theirs}.{number}.{names[inner]}.{leaf}", part=_PARTS.get(inner))


def flux_places(config: FluxConfig) -> Places:
    """Return the places of a transformer's weights, the same for every config."""
    return flux_place


def flux_blocks(config: FluxConfig, *, texts: Mapping[str, str]) -> BlockLists:
    """Return the blocks of a transformer.

    The longer list is `BLOCKIDFLUX`, the shorter one that of ltdrdata/ComfyUI-Inspire-Pack,
    inspire/lora_block_weight.py: a number for all that is in no block, then one for each block.

    Args:
        texts: {text encoder: its name in the longer list}, in its order.
    """
    blocks = [(f"D{i:02}",) for i in range(config.num_layers)]
    blocks += [(f"S{i:02}",) for i in range(config.num_single_layers)]
    names = tuple(texts.values())
    longer = *((name,) for name in names), ("IN",), *blocks, ("OUT",)
    return BlockLists(_block, (((TEXT, *names, "IN", "OUT"), *blocks), longer), texts=texts)


def _block(module: str) -> str:
    """The block of a module, by its path within the transformer."""
    kind, _, rest = module.partition(".")
    if kind in _BLOCKS:
        return f"{_BLOCKS[kind][0][0].upper()}{int(rest.partition('.')[0]):02}"
    return "OUT" if kind in ("norm_out", "proj_out") else "IN"
