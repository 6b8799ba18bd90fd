"""IP-Adapters beside a model, and the CLIP image tower whose features they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.families.beside.unets import plain_unet
from sdjax.families.family import Model, Part
from sdjax.models.clip_vision import CLIPVision, CLIPVisionConfig
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.ip_adapter.network import IPAdapter
from sdjax.models.unet_config import DOWN_TYPES, UP_TYPES, UNetConfig

IP_ADAPTER = "ip_adapter"  # names of networks, and the first words of their parameters' paths
IMAGE_ENCODER = "image_encoder"  # as in pipelines of diffusers
PART = Part(IPAdapter, IPAdapterConfig, "")  # which files have without a config
ENCODER_PART = Part(CLIPVision, CLIPVisionConfig, "clip_vision_model")


def with_ip_adapter(
    model: Model, config: IPAdapterConfig, encoder: CLIPVisionConfig | None = None
) -> Model:
    """Return a model that has an IP-Adapter as well, and perhaps an image tower.

    Raises:
        UserError: see `check`.
    """
    check(model, config, "the IP-Adapter")
    parts = {**model.family.parts, IP_ADAPTER: PART}
    networks = {**model.networks, IP_ADAPTER: config}
    if encoder is not None:
        parts[IMAGE_ENCODER], networks[IMAGE_ENCODER] = ENCODER_PART, encoder
    family = dataclasses.replace(model.family, parts=parts)
    return dataclasses.replace(model, family=family, networks=networks)


def check(model: Model, config: IPAdapterConfig, name: str) -> None:
    """Check that an IP-Adapter is for a model's denoiser.

    Args:
        name: of the adapter, for messages.

    Raises:
        UserError: the denoiser is no UNet, or another than the adapter was made for.
    """
    unet = plain_unet(model, name)
    if config.cross_attention_dim != unet.cross_attention_dim:
        raise UserError(
            f"{name} is not for this model: it makes words of {config.cross_attention_dim} "
            f"numbers, and the UNet reads {unet.cross_attention_dim}"
        )
    wanted = tuple(width for _, width in crossings(unet))
    if config.widths != wanted:
        raise UserError(
            f"{name} is not for this model: it has {len(config.widths)} layers of the widths "
            f"{sorted(set(config.widths))}, and the UNet {len(wanted)} of {sorted(set(wanted))}"
        )


def check_encoder(config: IPAdapterConfig, encoder: CLIPVisionConfig, name: str) -> None:
    """Raise a UserError, naming the adapter, unless it reads the features of an image tower."""
    field = "hidden_size" if config.resampler_layers else "projection_dim"
    if config.embedding_dim != getattr(encoder, field):
        raise UserError(
            f"{name} reads {config.embedding_dim} features of a picture, and the image encoder "
            f"gives {getattr(encoder, field)} ({field}); give the one it was trained with"
        )


def features(config: IPAdapterConfig, tower: CLIPVision, pixels: jax.Array) -> jax.Array:
    """Return what an IP-Adapter reads of pictures, pixels [B, S, S, 3], [B, (N,) E] float32."""
    if not config.resampler_layers:
        return tower(pixels)
    return tower.patches(pixels).astype(jnp.float32)


def no_features(config: IPAdapterConfig, tower: CLIPVision) -> jax.Array:
    """Return what it reads where there is no picture, [1, (N,) E] float32.

    Of a tower's features zeros, and of its patches those of a picture of zeros (the pipelines of
    diffusers, `encode_image`).
    """
    side = tower.embeddings.size
    if not config.resampler_layers:
        return jnp.zeros((1, config.embedding_dim))
    return features(config, tower, jnp.zeros((1, side, side, 3)))


def crossings(unet: UNetConfig) -> Iterator[tuple[str, int]]:
    """Yield (path, width) of each cross-attention of a UNet, in the order of its files.

    It is that of diffusers' `attn_processors`: on the way down, then up, then in the middle.
    """
    channels, layers = unet.block_out_channels, unet.layers_per_block
    last = len(channels) - 1
    stages = [
        *((f"down_blocks.{i}", i, layers, DOWN_TYPES[0], kind)
          for i, kind in enumerate(unet.down_block_types)),
        *((f"up_blocks.{i}", last - i, layers + 1, UP_TYPES[0], kind)
          for i, kind in enumerate(unet.up_block_types)),
        ("mid_block", last, 1, "", ""),
    ]  # fmt: skip
    for stage, level, count, wanted, kind in stages:
        for i in range(count if kind == wanted else 0):
            for j in range(unet.depth(level)):
                path = f"{stage}.attentions.{i}.transformer_blocks.{j}.attn2"
                yield path, channels[level]
