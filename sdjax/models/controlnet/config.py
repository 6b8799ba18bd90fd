"""The config of a ControlNet: its shape in the field names of diffusers `ControlNetModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.models.config import check, check_bounds, json_values, read_config
from sdjax.models.unet_config import DOWN_TYPES, IGNORED, NEUTRAL, UP_TYPES, UNetConfig

CHANNEL_ORDERS = ("rgb", "bgr")
# Fields of diffusers' ControlNetModel that are not implemented (controlnets/controlnet.py).
_NOT_IMPLEMENTED = (
    "act_fn", "class_embed_type", "downsample_padding", "encoder_hid_dim", "encoder_hid_dim_type",
    "mid_block_scale_factor", "mid_block_type", "num_attention_heads", "num_class_embeds",
    "only_cross_attention", "resnet_time_scale_shift",
)  # fmt: skip
_OWN_BOUNDS: dict[str, tuple[float, float]] = {
    "conditioning_channels": (1, 64),
    "conditioning_embedding_out_channels": (1, 4096),
}
_MOST_HALVINGS = 8  # of a condition; the VAE of Stable Diffusion halves 3 times


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """The shape of a ControlNet, in the words of diffusers; the defaults are SD1.5's.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """

    in_channels: int = 4
    conditioning_channels: int = 3  # of the condition picture
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads, as in a UNet's config
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    # Widths of the condition's embedding, which halves the picture between them.
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False  # the same addition everywhere: style, not places

    def __post_init__(self) -> None:
        check_bounds(self, _OWN_BOUNDS)
        order, widths = (
            self.controlnet_conditioning_channel_order,
            self.conditioning_embedding_out_channels,
        )
        check(
            order in CHANNEL_ORDERS,
            "controlnet_conditioning_channel_order",
            order,
            f"one of {CHANNEL_ORDERS}",
        )
        check(
            1 <= len(widths) <= 1 + _MOST_HALVINGS,
            "conditioning_embedding_out_channels",
            widths,
            f"1 to {1 + _MOST_HALVINGS} widths",
        )
        _ = self.unet  # checks the rest

    @property
    def unet(self) -> UNetConfig:
        """The config of the UNet whose way down it has."""
        shared = {name: getattr(self, name) for name in _SHARED}
        up = tuple(
            UP_TYPES[DOWN_TYPES.index(kind)] if kind in DOWN_TYPES else kind
            for kind in reversed(self.down_block_types)
        )
        return UNetConfig(**shared, up_block_types=up)

    @property
    def downscale(self) -> int:
        """The side of a condition picture over that of the latents."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @classmethod
    def of_unet(cls, unet: UNetConfig, **own: Any) -> ControlNetConfig:
        """Return the config of a ControlNet for a UNet.

        Args:
            own: fields that a UNet does not have.
        """
        return cls(**{name: getattr(unet, name) for name in _SHARED}, **own)

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "controlnet/config.json"
    ) -> tuple[ControlNetConfig, list[str]]:
        """(config, ignored fields) of a diffusers config; see `config.read_config`."""
        return read_config(
            cls,
            data,
            where=where,
            ignored=IGNORED,
            neutral={name: NEUTRAL[name] for name in _NOT_IMPLEMENTED},
            absent={"cross_attention_dim": 1280},
            null={
                "upcast_attention": False,
                "conditioning_embedding_out_channels": (16, 32, 96, 256),
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json with which diffusers builds the same network."""
        return {"_class_name": "ControlNetModel", **json_values(self)}


_SHARED = tuple(
    field.name
    for field in dataclasses.fields(ControlNetConfig)
    if field.name in {own.name for own in dataclasses.fields(UNetConfig)}
)
