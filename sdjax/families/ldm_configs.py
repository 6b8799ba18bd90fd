"""The architecture of a network, from the shapes of its weights under original names.

Single-file checkpoints have no config. Shapes say all of it but the number of attention heads, the
groups of the norms (32 in every release) and activations. These follow from the family, as in
SGM's and Stability's yaml files: SD1 (convolutions around its transformers) has 8 heads and
quick_gelu; SD2, SDXL and its refiner (linear layers there) heads of 64 channels, and OpenCLIP the
exact gelu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdjax.families.single_file import Shapes
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.config import ConfigError
from sdjax.models.unet_config import UNetConfig
from sdjax.models.vae import VAEConfig
from sdjax.system.untrusted import is_number

SD1_HEADS = 8
HEAD_CHANNELS = 64  # of SD2, SDXL and every CLIP text encoder
TIME_ID_CHANNELS = 256  # of SDXL: sgm's ConcatTimestepEmbedderND(outdim=256)


def unet_config(shapes: Shapes, *, sample_size: int, upcast: bool = False) -> UNetConfig:
    """The config of a UNet whose weights have these `shapes`, by name without prefix.

    Raises:
        ConfigError: they are no UNet of Stable Diffusion; says what is missing or odd.
    """
    levels: list[list[tuple[int, int]]] = []
    level: list[tuple[int, int]] = []  # (width, depth of the transformer or 0) of each block
    for i in range(1, count(shapes, "input_blocks")):
        place = f"input_blocks.{i}"
        if f"{place}.0.op.weight" in shapes:
            levels.append(level)
            level = []
        else:
            width = shape_of(shapes, f"{place}.0.out_layers.3.weight", 4)[0]
            level.append((width, count(shapes, f"{place}.1.transformer_blocks")))
    levels.append(level)
    if not all(level and len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels):
        raise ConfigError(f"the UNet's levels differ within or in length: {levels}")
    widths, depths = (tuple(level[0][axis] for level in levels) for axis in (0, 1))
    middle = count(shapes, "middle_block.1.transformer_blocks")
    attends = tuple(depth > 0 for depth in depths)
    projection = shape_of(shapes, "middle_block.1.proj_in.weight")
    linear = len(projection) == 2
    label = "label_emb.0.0.weight"
    added = shape_of(shapes, label, 2) if label in shapes else None
    text_time: dict[str, Any] = {}
    if added is not None:
        text_time = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_CHANNELS,
            "projection_class_embeddings_input_dim": added[1],
        }
    cross = shape_of(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    try:
        return UNetConfig(
            sample_size=sample_size,
            in_channels=shape_of(shapes, "input_blocks.0.0.weight", 4)[1],
            out_channels=shape_of(shapes, "out.2.weight", 4)[0],
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)
            ),
            block_out_channels=widths,
            layers_per_block=len(levels[0]),
            cross_attention_dim=cross,
            transformer_layers_per_block=_depths(depths, middle),
            attention_head_dim=tuple(w // HEAD_CHANNELS for w in widths) if linear else SD1_HEADS,
            use_linear_projection=linear,
            upcast_attention=upcast,
            **text_time,
        )
    except ValueError as error:
        raise ConfigError(f"the UNet's shapes: {error}") from error


def _depths(depths: tuple[int, ...], middle: int) -> int | tuple[int, ...]:
    """`transformer_layers_per_block`; where nothing attends, it says nothing and is 1.

    diffusers gives the middle the depth of the last level, which has transformers or none.
    """
    if depths[-1] not in (0, middle):
        raise ConfigError(f"the UNet's middle is {middle} transformers deep, its end {depths[-1]}")
    present = {depth for depth in (*depths, middle) if depth}
    if len(present) == 1:
        return present.pop()
    return (*(depth or 1 for depth in depths[:-1]), middle)


def vae_config(
    shapes: Shapes, *, scaling_factor: float, sample_size: int, shift_factor: float = 0.0
) -> VAEConfig:
    """The config of an autoencoder; shapes do not say its `scaling_factor` and `shift_factor`."""
    levels = count(shapes, "encoder.down")
    widths = tuple(
        shape_of(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)
    )
    try:
        return VAEConfig(
            in_channels=shape_of(shapes, "encoder.conv_in.weight", 4)[1],
            out_channels=shape_of(shapes, "decoder.conv_out.weight", 4)[0],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=widths,
            layers_per_block=count(shapes, "encoder.down.0.block"),
            latent_channels=shape_of(shapes, "decoder.conv_in.weight", 4)[1],
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
            mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
        )
    except ValueError as error:
        raise ConfigError(f"the VAE's shapes: {error}") from error


def clip_config(
    shapes: Shapes, *, hidden_act: str = "quick_gelu", projection_dim: int | None = None
) -> CLIPTextConfig:
    """The config of a CLIP text encoder, under the names of transformers 5."""
    vocab, width = shape_of(shapes, "embeddings.token_embedding.weight", 2)
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=count(shapes, "encoder.layers"),
        num_attention_heads=max(width // HEAD_CHANNELS, 1),
        max_position_embeddings=shape_of(shapes, "embeddings.position_embedding.weight", 2)[0],
        hidden_act=hidden_act,
        projection_dim=projection_dim,
    )


def open_clip_config(shapes: Shapes, *, penultimate: bool) -> CLIPTextConfig:
    """The config of an encoder of OpenCLIP.

    Args:
        shapes: of its weights, without prefix.
        penultimate: it is SD2's, of which the last of 24 layers is not used and the config has 23
            (files from diffusers lack it). SDXL's keeps all layers and its projection.
    """
    vocab, width = shape_of(shapes, "token_embedding.weight", 2)
    layers = count(shapes, "transformer.resblocks")
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        num_hidden_layers=layers - 1 if penultimate and layers == 24 else layers,
        num_attention_heads=max(width // HEAD_CHANNELS, 1),
        max_position_embeddings=shape_of(shapes, "positional_embedding", 2)[0],
        hidden_act="gelu",
        projection_dim=None if penultimate else shape_of(shapes, "text_projection", 2)[1],
    )


def count(shapes: Shapes, prefix: str) -> int:
    """Return how many modules `prefix.0`, `prefix.1`, ... there are."""
    start = prefix + "."
    numbers = {n[len(start) :].split(".")[0] for n in shapes if n.startswith(start)}
    return len({number for number in numbers if is_number(number)})


def shape_of(shapes: Shapes, name: str, *ranks: int) -> Sequence[int]:
    """Return the shape of a weight. ConfigError if it is not there, or has other axes."""
    if name not in shapes:
        raise ConfigError(f"no {name} among the weights, which every such network has")
    if len(shapes[name]) not in (ranks or (1, 2, 4)):
        raise ConfigError(f"{name} has the shape {list(shapes[name])[:8]}, as in no such network")
    return shapes[name]
