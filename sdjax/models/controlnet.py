"""ControlNet (Zhang et al. 2023) for Stable Diffusion 1, 2 and XL (diffusers `ControlNetModel`).

A copy of a UNet's way down reads a condition picture besides the noisy latents. Convolutions that
start at zero carry its maps to the UNet, which stays as it is: at the start nothing is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models.config import check, check_bounds, json_values, read_config
from sdjax.models.layers import Array, Dtype, conv, pointwise, silu
from sdjax.models.placement import activation
from sdjax.models.unet import Descent, Residuals
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


class ConditionEmbedding(nnx.Module):
    """Convolutions that bring a condition picture to the size of the latents; the last is zero."""

    def __init__(self, config: ControlNetConfig, **kw: Any):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], **kw)
        blocks = []
        for width, wider in zip(widths, widths[1:], strict=False):
            blocks += [conv(width, width, **kw), conv(width, wider, stride=2, **kw)]
        self.blocks = nnx.List(blocks)
        self.conv_out = conv(widths[-1], config.block_out_channels[0], zero=True, **kw)

    def __call__(self, condition: Array) -> Array:
        """Map a picture [B, H, W, 3] to [B, h, w, C], h = H / 8 for Stable Diffusion."""
        x = silu(self.conv_in(condition))
        for block in self.blocks:
            x = silu(block(x))
        return activation(self.conv_out(x))


class ControlNet(Descent):
    """Says what a condition picture adds to the maps of a UNet.

    Args: see `UNet`.
    """

    def __init__(
        self,
        config: ControlNetConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config.unet, remat=remat, **kw)
        widths, layers = config.block_out_channels, config.layers_per_block
        carried = [widths[0]]  # of the maps on the way down, the first being that of conv_in
        for width in widths:
            carried += [width] * (layers + 1)
        carried.pop()  # the last level is not halved
        self.controlnet_cond_embedding = ConditionEmbedding(config, **kw)
        self.controlnet_down_blocks = nnx.List(pointwise(c, c, zero=True, **kw) for c in carried)
        self.controlnet_mid_block = pointwise(widths[-1], widths[-1], zero=True, **kw)
        self.control = config

    def __call__(
        self,
        xt: Array,
        timesteps: Array,
        context: Array | Mapping[str, Array],
        condition: Array,
        *,
        key: Array | None = None,
    ) -> Residuals:
        """Runs the network.

        Args:
            xt, timesteps, context, key: as the UNet gets them.
            condition: the picture, [B, H, W, 3] in [0, 1], of the size that is drawn.
        """
        factor, size = self.control.downscale, (xt.shape[1], xt.shape[2])
        if condition.shape[1:3] != (factor * size[0], factor * size[1]):
            raise ValueError(
                f"the condition has {list(condition.shape)} for latents {list(xt.shape)}; expected "
                f"{factor} times their height and width"
            )
        if self.control.controlnet_conditioning_channel_order == "bgr":
            condition = condition[..., ::-1]
        temb, context = self.conditioning(timesteps, context)
        x = activation(self.conv_in(xt.astype(self.dtype)))
        x = x + self.controlnet_cond_embedding(condition.astype(self.dtype))
        x, skips = self.descend(x, temb, context, key)
        down = [carry(s) for carry, s in zip(self.controlnet_down_blocks, skips, strict=True)]
        made = Residuals(tuple(map(activation, down)), activation(self.controlnet_mid_block(x)))
        return _pooled(made) if self.control.global_pool_conditions else made


def _pooled(residuals: Residuals) -> Residuals:
    """The mean over height and width, [B, 1, 1, C]."""
    down, mid = residuals
    mean = lambda x: jnp.mean(x, axis=(1, 2), keepdims=True)  # noqa: E731
    return Residuals(tuple(map(mean, down)), mean(mid))


def guess_scales(count: int) -> np.ndarray:
    """Return the factors of guess mode, from 0.1 for the first map to 1 for the middle.

    diffusers controlnet.py, "6. scaling".

    Args:
        count: of the maps on the way down and the middle together.
    """
    return np.logspace(-1, 0, count, dtype=np.float32)


def scaled(residuals: Residuals, weight: float | Array, *, guess: bool = False) -> Residuals:
    """Return residuals times a weight.

    Args:
        weight: one for all, or [B, 1, 1, 1].
        guess: weaken those of the finer maps; see `guess_scales`.
    """
    down, mid = residuals
    factors = guess_scales(len(down) + 1) if guess else np.ones(len(down) + 1, np.float32)
    *made, middle = [
        (x * (weight * factor)).astype(x.dtype)
        for x, factor in zip((*down, mid), factors, strict=True)
    ]
    return Residuals(tuple(made), middle)


def total(each: list[Residuals]) -> Residuals:
    """Return the sum of what several ControlNets add; [B, 1, 1, C] is added everywhere."""
    down, mid = each[0]
    for more in each[1:]:
        down = tuple(a + b for a, b in zip(down, more.down, strict=True))
        mid = mid + more.mid
    return Residuals(down, mid)
