"""The transformer of Stable Diffusion 3 and 3.5 under the names of Stability's code.

Files have these names after `model.diffusion_model.`. The layouts that differ:

    qkv           query, key and value in one tensor, in this order
    final_layer   its modulation is shift, scale; diffusers' `norm_out` is scale, shift
    context_block of the last block alone: shift, scale too, where diffusers has scale, shift

Sources: Stability-AI/sd3.5, mmditx.py; diffusers' loaders/single_file_utils.py reads what is
written here.
"""

from __future__ import annotations

from sdjax.families.single_file import Place, Places, halves_swapped
from sdjax.models.mmdit.config import MMDiTConfig

_ENDS = {
    "pos_embed": "",  # the table of positions, whose own name is the same
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# The order of the weights that share a tensor.
_PARTS = {
    "to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2,
}  # fmt: skip


def sd3_places(config: MMDiTConfig) -> Places:
    """Return the places of the weights of an `SD3Transformer2DModel`."""
    last = f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear"

    def place(name: str) -> Place:
        stem, _, leaf = name.rpartition(".")
        if stem in ("norm_out.linear", last):
            return Place(_name(stem, leaf), to_file=halves_swapped, from_file=halves_swapped)
        return Place(_name(stem, leaf), part=_PARTS.get(stem.rpartition(".")[2]))

    return place


def _name(stem: str, leaf: str) -> str:
    """The name in a file of the weight `stem.leaf`."""
    blocks, _, rest = stem.partition(".")
    if blocks != "transformer_blocks":
        return f"{_ENDS[stem]}.{leaf}".removeprefix(".")
    number, _, inner = rest.partition(".")
    return f"joint_blocks.{number}.{_BLOCK[inner]}.{leaf}"
