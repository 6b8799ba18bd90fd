"""The config of the UNet: its shape in the field names of diffusers `UNet2DConditionModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.models.config import check, check_bounds, json_values, read_config

# By whether their residual blocks are followed by transformers.
DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")

# Fields of diffusers' UNet2DConditionModel that are not implemented, each with the values under
# which it does nothing (unet_2d_condition.py).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Heads of an added embedding of a kind ("text") that this network does not have.
IGNORED = frozenset({"addition_embed_type_num_heads"})
# Far beyond any network there is: the largest has 4 levels, widths to 2,048, 70 transformers.
_MOST_LEVELS, _MOST_BLOCKS = 10, 500
_BOUNDS: dict[str, tuple[float, float]] = {
    "sample_size": (1, 4096),
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "freq_shift": (-1000, 1000),
    "block_out_channels": (4, 32_768),
    "layers_per_block": (1, 32),
    "norm_num_groups": (1, 32_768),
    "norm_eps": (1e-30, 1),
    "cross_attention_dim": (1, 65_536),
    "transformer_layers_per_block": (1, 128),
    "attention_head_dim": (1, 32_768),
    "addition_time_embed_dim": (1, 65_536),
    "projection_class_embeddings_input_dim": (1, 1_048_576),
    "time_cond_proj_dim": (2, 65_536),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet, in the words of diffusers; the defaults are Stable Diffusion 1.5.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """

    sample_size: int | tuple[int, ...] = 64  # latent size that pipelines draw by default
    in_channels: int = 4  # 9 for inpainting: latents, mask, masked latents
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    # The number of heads, in spite of its name (diffusers issue 2011).
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    # "text_time" adds an embedding of the pooled caption, and of numbers about the picture (its
    # sizes and its crop, for instance), to that of the timestep.
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # width of the sinusoids of each number
    projection_class_embeddings_input_dim: int | None = (
        None  # of the pooled caption and all numbers
    )
    # Width of the sinusoids of the guidance scale, of UNets that have learned how guided pictures
    # look (latent consistency models: 256).
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        expected = f"1 to {_MOST_LEVELS} levels"
        check(1 <= levels <= _MOST_LEVELS, "block_out_channels", self.block_out_channels, expected)
        check_bounds(self, _BOUNDS)
        for field, allowed in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            value = getattr(self, field)
            expected = f"{levels} of {allowed}, one for each of block_out_channels"
            check(len(value) == levels and set(value) <= set(allowed), field, value, expected)
        check(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "a rate in [0, 1)")
        channels = self.block_out_channels
        check(
            all(c % self.norm_num_groups == 0 for c in channels),
            "block_out_channels",
            channels,
            f"multiples of norm_num_groups = {self.norm_num_groups}",
        )
        check(
            channels[0] % 2 == 0,
            "block_out_channels",
            channels,
            "an even first width",
        )
        for field in ("attention_head_dim", "transformer_layers_per_block"):
            value = getattr(self, field)
            per_level = value if isinstance(value, tuple) else (value,) * levels
            check(len(per_level) == levels, field, value, f"one number or {levels}")
        blocks = self._blocks()
        check(
            blocks <= _MOST_BLOCKS,
            "layers_per_block",
            self.layers_per_block,
            f"with transformer_layers_per_block at most {_MOST_BLOCKS} blocks in all, not {blocks}",
        )
        check(
            all(c % self.heads(i) == 0 for i, c in enumerate(channels) if self._attends(i)),
            "attention_head_dim",
            self.attention_head_dim,
            f"numbers of heads that divide block_out_channels = {channels}",
        )
        self._check_addition()
        width = self.time_cond_proj_dim
        check(
            width is None or width % 2 == 0, "time_cond_proj_dim", width, "an even number, or None"
        )

    def _check_addition(self) -> None:
        kind, sinusoids = self.addition_embed_type, self.addition_time_embed_dim
        width = self.projection_class_embeddings_input_dim
        check(kind in (None, "text_time"), "addition_embed_type", kind, "None or 'text_time'")
        fields = {
            "addition_time_embed_dim": sinusoids,
            "projection_class_embeddings_input_dim": width,
        }
        for field, value in fields.items():
            if kind is None:
                check(value is None, field, value, "None without addition_embed_type 'text_time'")
            else:
                check(value is not None, field, value, "a number")
        if sinusoids and width:
            check(sinusoids % 2 == 0, "addition_time_embed_dim", sinusoids, "an even number")
            expected = f"more than addition_time_embed_dim = {sinusoids}"
            check(width > sinusoids, "projection_class_embeddings_input_dim", width, expected)

    @property
    def takes_numbers(self) -> bool:
        """Whether it wants a pooled caption and numbers about the picture besides the context."""
        return self.addition_embed_type == "text_time"

    def heads(self, level: int) -> int:
        """Attention heads at `level`, 0 being the finest."""
        value = self.attention_head_dim
        return value if isinstance(value, int) else value[level]

    def depth(self, level: int) -> int:
        """Transformer blocks in each attention module at `level`."""
        value = self.transformer_layers_per_block
        return value if isinstance(value, int) else value[level]

    def _blocks(self) -> int:
        """Residual blocks and transformers, down and up; the middle aside."""
        depths = [self.depth(i) * self._attends(i) for i in range(len(self.block_out_channels))]
        return (2 * self.layers_per_block + 1) * sum(1 + depth for depth in depths)

    def _attends(self, level: int) -> bool:
        last = len(self.block_out_channels) - 1
        up = self.up_block_types[last - level]
        return level == last or self.down_block_types[level] == DOWN_TYPES[0] or up == UP_TYPES[0]

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "unet/config.json"
    ) -> tuple[UNetConfig, list[str]]:
        """(config, ignored fields) of a diffusers config; see `config.read_config`."""
        return read_config(
            cls,
            data,
            where=where,
            ignored=IGNORED,
            neutral=NEUTRAL,
            absent={"cross_attention_dim": 1280},
            null={"sample_size": 64, "upcast_attention": False},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json with which diffusers builds the same network."""
        return {"_class_name": "UNet2DConditionModel", **json_values(self)}
