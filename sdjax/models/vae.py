"""The image autoencoder of latent diffusion (diffusers `AutoencoderKL`).

`encode` returns moments, not a sample, so that stored encodings do not freeze the noise. Latents
leave and enter unscaled; `scale_latents` and `unscale_latents` convert to and from the latents of a
diffusion model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models.attention import Attention
from sdjax.models.blocks import Downsample, ResnetBlock, Upsample
from sdjax.models.config import check, check_bounds, json_values, read_config
from sdjax.models.layers import (
    Array,
    Dtype,
    GroupNorm,
    check_remat,
    conv,
    pointwise,
    rematerialised,
    silu,
)
from sdjax.models.placement import activation

_EPS = 1e-6  # every norm of the autoencoder (LDM diffusionmodules/model.py, Normalize)

# Fields of diffusers' AutoencoderKL that are not implemented, with the values that switch them off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# force_upcast tells pipelines which dtype to run in.
_IGNORED = frozenset({"force_upcast"})
# Far beyond any autoencoder: Stable Diffusion's has 4 levels of 2 layers, widths to 512.
_MOST_LEVELS = 10
_BOUNDS: dict[str, tuple[float, float]] = {
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "block_out_channels": (1, 32_768),
    "layers_per_block": (1, 32),
    "latent_channels": (1, 4096),
    "norm_num_groups": (1, 32_768),
    "sample_size": (1, 32_768),
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The shape of an autoencoder, in the words of diffusers; the defaults are Stable Diffusion's.

    Raises:
        ValueError: naming the field, its value and the expected values.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 512  # image size that pipelines assume
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents
    shift_factor: float = 0.0  # mean of the latents
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        expected = f"1 to {_MOST_LEVELS} levels"
        check(1 <= levels <= _MOST_LEVELS, "block_out_channels", self.block_out_channels, expected)
        check_bounds(self, _BOUNDS)
        for field, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            value = getattr(self, field)
            check(value == (kind,) * levels, field, value, f"{levels} times {kind!r}")
        check(
            all(c % self.norm_num_groups == 0 for c in self.block_out_channels),
            "block_out_channels",
            self.block_out_channels,
            f"multiples of norm_num_groups = {self.norm_num_groups}",
        )

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "vae/config.json"
    ) -> tuple[VAEConfig, list[str]]:
        """Read a diffusers config; return the config and the names of ignored fields.

        Raises:
            ConfigError: some fields are unknown or not supported; the message lists them.
        """
        return read_config(
            cls,
            data,
            where=where,
            ignored=_IGNORED,
            neutral=_NEUTRAL,
            absent={
                "down_block_types": ("DownEncoderBlock2D",),
                "up_block_types": ("UpDecoderBlock2D",),
                "block_out_channels": (64,),
                "layers_per_block": 1,
                "sample_size": 32,
            },
            null={"shift_factor": 0.0},
        )

    def to_json(self) -> dict[str, Any]:
        """The config.json from which diffusers builds the same network."""
        return {
            "_class_name": "AutoencoderKL",
            **json_values(self),
            "shift_factor": self.shift_factor or None,
        }


def sample_moments(moments: Array, noise: Array) -> Array:
    """Latents mean + exp(logvar / 2) noise, [..., C], from the moments of `encode`.

    Args:
        moments: [..., 2C], mean then log-variance.
        noise: standard normal [..., C]; zeros give the mean.
    """
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * logvar) * noise


def scale_latents(z: Array, config: VAEConfig) -> Array:
    """Latents as a diffusion model takes them, of about zero mean and unit variance; z's shape."""
    return (z - config.shift_factor) * config.scaling_factor


def unscale_latents(z: Array, config: VAEConfig) -> Array:
    """Latents as `decode` takes them: the inverse of `scale_latents`."""
    return z / config.scaling_factor + config.shift_factor


class MidAttention(Attention):
    """Single-headed attention over positions, added to its input (LDM model.py, AttnBlock)."""

    def __init__(self, channels: int, groups: int, **kw: Any):
        super().__init__(channels, 1, qkv_bias=True, **kw)
        self.group_norm = GroupNorm(channels, groups, eps=_EPS, **kw)

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Map x [B, H, W, C] to the same shape."""
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)  # [B, H*W, C]
        return activation(x + super().__call__(tokens).reshape(b, h, w, c))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the latent resolution."""

    def __init__(self, config: VAEConfig, *, remat: str, **kw: Any):
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nnx.List(resnet(channels, channels, config, **kw) for _ in range(2))
        attended = config.mid_block_add_attention
        self.attentions = nnx.List([MidAttention(channels, groups, **kw)] if attended else [])
        self.remat = remat

    def __call__(self, x: Array) -> Array:
        first, last = self.resnets
        for block in (first, *self.attentions, last):
            x = rematerialised(block, self.remat, level="block")(x)
        return x


class VAEStage(nnx.Module):
    """Residual blocks, then a change of resolution or none.

    Args:
        channels_in, channels_out: widths.
        layers: number of residual blocks.
        resample: "down", "up" or "".
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: VAEConfig,
        *,
        layers: int,
        resample: str,
        remat: str,
        **kw: Any,
    ):
        widths = (channels_in,) + (channels_out,) * (layers - 1)
        self.resnets = nnx.List(resnet(width, channels_out, config, **kw) for width in widths)
        down, up = resample == "down", resample == "up"
        self.downsamplers = nnx.List(
            [Downsample(channels_out, symmetric=False, **kw)] if down else []
        )
        self.upsamplers = nnx.List([Upsample(channels_out, **kw)] if up else [])
        self.remat = remat

    def __call__(self, x: Array) -> Array:
        """Map x [B, H, W, C] to [B, H', W', C']."""
        for block in self.resnets:
            x = rematerialised(block, self.remat, level="block")(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


def resnet(channels_in: int, channels_out: int, config: VAEConfig, **kw: Any) -> ResnetBlock:
    """A residual block without time embedding, initialised as in LDM: nothing starts at zero."""
    groups = config.norm_num_groups
    return ResnetBlock(channels_in, channels_out, time_channels=None, groups=groups, eps=_EPS, **kw)


class Encoder(nnx.Module):
    """The layers from images to moments, before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, remat: str, **kw: Any):
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], **kw)
        self.down_blocks = nnx.List(
            VAEStage(
                widths[max(i - 1, 0)],
                width,
                config,
                layers=config.layers_per_block,
                resample="down" if i < len(widths) - 1 else "",
                remat=remat,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, remat=remat, **kw)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, eps=_EPS, **kw)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, **kw)
        self.remat = remat

    def __call__(self, x: Array) -> Array:
        """Map x [B, H, W, in_channels] to [B, h, w, 2 latent_channels]."""
        x = activation(self.conv_in(x))
        for stage in (*self.down_blocks, self.mid_block):
            x = rematerialised(stage, self.remat, level="stage")(x)
        return activation(self.conv_out(silu(self.conv_norm_out(x))))


class Decoder(nnx.Module):
    """The layers from latents, after `post_quant_conv`, to images. `conv_out` is the last."""

    def __init__(self, config: VAEConfig, *, remat: str, **kw: Any):
        widths = config.block_out_channels
        self.conv_in = conv(config.latent_channels, widths[-1], **kw)
        self.mid_block = MidBlock(config, remat=remat, **kw)
        self.up_blocks = nnx.List(
            VAEStage(
                widths[min(i + 1, len(widths) - 1)],
                widths[i],
                config,
                layers=config.layers_per_block + 1,
                resample="up" if i > 0 else "",
                remat=remat,
                **kw,
            )
            for i in reversed(range(len(widths)))
        )
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, eps=_EPS, **kw)
        self.conv_out = conv(widths[0], config.out_channels, **kw)
        self.remat = remat

    def features(self, x: Array) -> Array:
        """Map x [B, h, w, latent_channels] to what `conv_out` takes, [B, H, W, C]."""
        x = activation(self.conv_in(x))
        for stage in (self.mid_block, *self.up_blocks):
            x = rematerialised(stage, self.remat, level="stage")(x)
        return silu(self.conv_norm_out(x))


class VAE(nnx.Module):
    """The autoencoder: images to the moments of latents, and latents to images.

    Args:
        config: the shape.
        dtype: of matrix products, convolutions and activations. float16 overflows with SDXL's
            weights; bfloat16 and float32 do not.
        param_dtype: of the parameters.
        remat: see `layers.rematerialised`.
        rngs: draws the parameters; not kept.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        c = config.latent_channels
        self.encoder = Encoder(config, remat=remat, **kw)
        self.decoder = Decoder(config, remat=remat, **kw)
        self.quant_conv = pointwise(2 * c, 2 * c, **kw) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(c, c, **kw) if config.use_post_quant_conv else None
        self.config, self.dtype = config, dtype

    def encode(self, images: Array) -> Array:
        """Encode images [B, H, W, 3] in [-1, 1] to moments [B, h, w, 2C] in float32.

        The moments are mean, then log-variance clamped to [-30, 20] (LDM
        DiagonalGaussianDistribution).
        """
        x = self.encoder(images.astype(self.dtype))
        x = x if self.quant_conv is None else self.quant_conv(x)
        mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1)

    def decode(self, latents: Array) -> Array:
        """Decode unscaled latents [B, h, w, C] to images [B, H, W, 3] in float32, about [-1, 1]."""
        return self.painted(self.features(latents))

    def features(self, latents: Array) -> Array:
        """Return what the last convolution makes images of, [B, H, W, block_out_channels[0]]."""
        x = latents.astype(self.dtype)
        x = x if self.post_quant_conv is None else self.post_quant_conv(x)
        return self.decoder.features(x)

    def painted(self, features: Array) -> Array:
        """Return the images of `features`; see `decode`."""
        return activation(self.decoder.conv_out(features)).astype(jnp.float32)
