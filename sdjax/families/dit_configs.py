"""The architecture of SD3's and FLUX.1's networks, from the shapes of their weights in files.

Shapes and names say nearly all of it. The rest is that of the releases: heads of 64 channels where
no norm of queries shows their width, latents of 128 x 128, the axes of FLUX.1's positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdjax.families.ldm_configs import HEAD_CHANNELS, clip_config, count, shape_of
from sdjax.families.single_file import Shapes
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.config import ConfigError
from sdjax.models.flux.config import FluxConfig
from sdjax.models.mmdit.config import RMS_NORM, MMDiTConfig
from sdjax.models.t5 import GATED, PLAIN, T5Config


def mmdit_config(shapes: Shapes, prediction: str) -> MMDiTConfig:
    """Return the config of a transformer of SD3 whose weights have these shapes.

    Raises:
        ConfigError: they are none; says what is missing or odd.
    """
    depth = count(shapes, "joint_blocks")
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = shape_of(shapes, norm, 1)[0] if norm in shapes else HEAD_CHANNELS
    rows = shape_of(shapes, "pos_embed", 3)[1]
    dual = (i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes)
    try:
        return MMDiTConfig(
            patch_size=patch,
            in_channels=channels,
            num_layers=depth,
            attention_head_dim=head,
            num_attention_heads=width // max(head, 1),
            joint_attention_dim=shape_of(shapes, "context_embedder.weight", 2)[1],
            caption_projection_dim=width,
            pooled_projection_dim=shape_of(shapes, "y_embedder.mlp.0.weight", 2)[1],
            out_channels=_divided(shape_of(shapes, "final_layer.linear.weight", 2), patch**2),
            pos_embed_max_size=math.isqrt(rows),
            dual_attention_layers=tuple(dual),
            qk_norm=RMS_NORM if norm in shapes else None,
        )
    except ValueError as error:
        raise ConfigError(f"the transformer's shapes: {error}") from error


def flux_config(shapes: Shapes, prediction: str) -> FluxConfig:
    """Return the config of a transformer of FLUX.1 whose weights have these shapes.

    Raises:
        ConfigError: they are none; says what is missing or odd.
    """
    width, channels = shape_of(shapes, "img_in.weight", 2)
    outputs = shape_of(shapes, "final_layer.linear.weight", 2)[0]
    head = shape_of(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    if head != sum(FluxConfig.axes_dims_rope):
        raise ConfigError(
            f"the heads have {head} channels, and the axes of positions are known for "
            f"{sum(FluxConfig.axes_dims_rope)} alone; point --config_from at a diffusers folder or "
            "workdir that has them"
        )
    try:
        return FluxConfig(
            in_channels=channels,
            out_channels=None if outputs == channels else outputs,
            num_layers=count(shapes, "double_blocks"),
            num_single_layers=count(shapes, "single_blocks"),
            attention_head_dim=head,
            num_attention_heads=width // head,
            joint_attention_dim=shape_of(shapes, "txt_in.weight", 2)[1],
            pooled_projection_dim=shape_of(shapes, "vector_in.in_layer.weight", 2)[1],
            guidance_embeds="guidance_in.in_layer.weight" in shapes,
        )
    except ValueError as error:
        raise ConfigError(f"the transformer's shapes: {error}") from error


def t5_config(shapes: Shapes, prediction: str) -> T5Config:
    """Return the config of an encoder of T5 whose weights have these shapes.

    Raises:
        ConfigError: they are none; says what is missing or odd.
    """
    first = "encoder.block.0.layer."
    tied = "shared.weight" not in shapes
    vocab, width = shape_of(shapes, "encoder.embed_tokens.weight" if tied else "shared.weight", 2)
    bias = shape_of(shapes, f"{first}0.SelfAttention.relative_attention_bias.weight", 2)
    gated = f"{first}1.DenseReluDense.wi_0.weight"
    wide = gated if gated in shapes else f"{first}1.DenseReluDense.wi.weight"
    try:
        return T5Config(
            vocab_size=vocab,
            d_model=width,
            d_kv=_divided(shape_of(shapes, f"{first}0.SelfAttention.q.weight", 2), bias[1]),
            d_ff=shape_of(shapes, wide, 2)[0],
            num_layers=count(shapes, "encoder.block"),
            num_heads=bias[1],
            relative_attention_num_buckets=bias[0],
            feed_forward_proj=GATED if wide == gated else PLAIN,
        )
    except ValueError as error:
        raise ConfigError(f"the T5 encoder's shapes: {error}") from error


def clip_l_config(shapes: Shapes, prediction: str) -> CLIPTextConfig:
    """Return the config of CLIP-L, without a projection as FLUX.1 takes it."""
    return clip_config(shapes)


def projected_clip_l_config(shapes: Shapes, prediction: str) -> CLIPTextConfig:
    """Return the config of CLIP-L as SD3 takes it: its projection is square."""
    width = shape_of(shapes, "embeddings.token_embedding.weight", 2)[1]
    return clip_config(shapes, projection_dim=width)


def clip_g_config(shapes: Shapes, prediction: str) -> CLIPTextConfig:
    """Return the config of OpenCLIP-bigG under the names of transformers."""
    projection = shape_of(shapes, "text_projection.weight", 2)[0]
    return clip_config(shapes, hidden_act="gelu", projection_dim=projection)


def _divided(shape: Sequence[int], parts: int) -> int:
    """The rows of each of several equal parts."""
    if parts < 1 or shape[0] % parts:
        raise ConfigError(f"{shape[0]} rows are not {parts} equal parts")
    return shape[0] // parts
