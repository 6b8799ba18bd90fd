"""The denoising UNet of Stable Diffusion 1, 2 and XL (diffusers `UNet2DConditionModel`).

The config has the field names of diffusers, the modules its attribute names. The network sees
latents, timesteps and a text context; it knows of no noise schedule.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from sdjax.models.attention import Attended
from sdjax.models.blocks import with_added
from sdjax.models.layers import (
    Array,
    Dtype,
    GroupNorm,
    TimestepEmbedding,
    check_remat,
    conv,
    fold_key,
    rematerialised,
    silu,
    timestep_embedding,
)
from sdjax.models.placement import activation
from sdjax.models.unet_config import UNetConfig
from sdjax.models.unet_stages import DownStage, MidStage, UpStage

__all__ = ["Descent", "Residuals", "UNet", "UNetConfig"]


class Residuals(NamedTuple):
    """The additions of another network to maps of a UNet, [B, h, w, C].

    Height and width may be 1, for the same addition everywhere.

    down: one for each map that the way up reads, the first being that of `conv_in`.
    mid: for the output of the middle.
    """

    down: tuple[Array, ...]
    mid: Array


class Descent(nnx.Module):
    """The way down of a UNet and its middle, which a ControlNet has as well.

    Args: see `UNet`; kw has `dtype`, `param_dtype` and `rngs`.
    """

    def __init__(self, config: UNetConfig, *, remat: str, **kw: Any):
        check_remat(remat)
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], **kw)
        self.time_embedding = TimestepEmbedding(
            widths[0], 4 * widths[0], condition=config.time_cond_proj_dim, **kw
        )
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = TimestepEmbedding(added, 4 * widths[0], **kw) if added else None
        self.down_blocks = nnx.List(
            DownStage(config, i, remat=remat, **kw) for i in range(len(widths))
        )
        self.mid_block = MidStage(config, remat=remat, **kw)
        self.config, self.dtype, self.remat = config, kw["dtype"], remat

    def embed(self, timesteps: Array, added: Mapping[str, Array] | None = None) -> Array:
        """Conditioning of every residual block, [B, 4 C].

        Args:
            timesteps: [B].
            added: of "text_time", "pooled" [B, P] and "numbers" [B, N]; of `time_cond_proj_dim`,
                "guidance" [B], the scale.
        """
        waves = self._waves(timesteps, self.config.block_out_channels[0])
        temb = self.time_embedding(activation(waves.astype(self.dtype)), self._guidance(added))
        if self.add_embedding is not None:
            if added is None:
                raise ValueError(
                    "this UNet's addition_embed_type is 'text_time': expected a context of "
                    "{'context', 'pooled', 'numbers'}, got an array"
                )
            ids = added["numbers"]
            waves = self._waves(ids.reshape(-1), self.config.addition_time_embed_dim or 0)
            waves = waves.reshape(ids.shape[0], -1)  # [B, N addition_time_embed_dim]
            both = jnp.concatenate([added["pooled"].astype(jnp.float32), waves], axis=-1)
            temb = temb + self.add_embedding(activation(both.astype(self.dtype)))
        return activation(temb)

    def _guidance(self, added: Mapping[str, Array] | None) -> Array | None:
        """The sinusoids of the guidance scale less 1, as of LatentConsistencyModelPipeline."""
        width = self.config.time_cond_proj_dim
        if width is None:
            return None
        if added is None or "guidance" not in added:
            raise ValueError(
                "this UNet has time_cond_proj_dim: expected a context of {'context', 'guidance'}"
            )
        scale = 1000.0 * (added["guidance"].astype(jnp.float32) - 1.0)
        waves = timestep_embedding(scale, width, flip_sin_to_cos=False, freq_shift=1)
        return activation(waves.astype(self.dtype))

    def _waves(self, numbers: Array, channels: int) -> Array:
        config = self.config
        return timestep_embedding(
            numbers,
            channels,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )

    def descend(
        self,
        x: Array,
        temb: Array,
        contexts: Sequence[Array | Attended],
        key: Array | None,
        maps: Sequence[Array] = (),
    ) -> tuple[Array, list[Array]]:
        """Return the output of the middle and the maps that the way up reads.

        Args:
            x: the output of `conv_in`, [B, H, W, C].
            temb: see `embed`.
            contexts: of each level and of the middle, text features [B, L, D].
            maps: see `UNet.__call__`.
        """
        skips = [x]
        levels = len(self.down_blocks)
        if len(maps) > levels + 1:
            raise ValueError(f"{len(maps)} maps for a UNet of {levels} levels and a middle")
        added = [*maps, *[None] * (levels + 1 - len(maps))]
        for i, down in enumerate(self.down_blocks):
            run = rematerialised(down, self.remat, level="stage")
            x, new = run(x, temb, contexts[i], fold_key(key, i), added[i])
            skips += new
        run = rematerialised(self.mid_block, self.remat, level="stage")
        return with_added(run(x, temb, contexts[-1], fold_key(key, levels)), added[-1]), skips

    def middle(self, xt: Array, timesteps: Array, context: Array | Mapping[str, Array]) -> Array:
        """Return the output of the middle, [B, h, w, C]; see `UNet.__call__` for the arguments."""
        temb, context = self.conditioning(timesteps, context)
        x = activation(self.conv_in(xt.astype(self.dtype)))
        return self.descend(x, temb, [context] * (len(self.down_blocks) + 1), None)[0]

    def conditioning(
        self, timesteps: Array, context: Array | Mapping[str, Array]
    ) -> tuple[Array, Array]:
        """Return the embedding of `embed` and the text features; see `UNet.__call__`."""
        added = context if isinstance(context, Mapping) else None
        temb = self.embed(timesteps, added)
        context = context["context"] if isinstance(context, Mapping) else context
        return temb, activation(context.astype(self.dtype))


class UNet(Descent):
    """Predicts what the objective asks for from noisy latents, timesteps and a text context.

    Starts as LDM does (openaimodel.py): the last convolution of each residual block, of each
    transformer and of the network at zero.

    Args:
        config: the shape.
        dtype: of matrix products, convolutions and activations.
        param_dtype: of the parameters.
        remat: see `layers.rematerialised`.
        rngs: draws the parameters; not kept.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, remat=remat, **kw)
        widths = config.block_out_channels
        levels = reversed(range(len(widths)))
        self.up_blocks = nnx.List(UpStage(config, i, remat=remat, **kw) for i in levels)
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, eps=config.norm_eps, **kw)
        self.conv_out = conv(widths[0], config.out_channels, zero=True, **kw)

    def __call__(
        self,
        xt: Array,
        timesteps: Array,
        context: Array | Mapping[str, Array],
        *,
        key: Array | None = None,
        residuals: Residuals | None = None,
        maps: Sequence[Array] = (),
        images: Sequence[Any] = (),
    ) -> Array:
        """Runs the network.

        Args:
            xt: noisy latents [B, H, W, in_channels], any H and W.
            timesteps: [B], in steps (0 to 999 for Stable Diffusion), fractions allowed.
            context: text features [B, L, cross_attention_dim]; for "text_time" (SDXL) a mapping of
                "context", these features, "pooled" [B, P] and "numbers" [B, N]; for
                `time_cond_proj_dim` one with "guidance" [B], the scale.
            key: dropout key, None for no dropout. Fold the training step into it.
            residuals: what a ControlNet adds.
            maps: what a T2I-Adapter adds, to the output of each level of the way down and then to
                that of the middle, as many as it has.
            images: what IP-Adapters show to each cross-attention, on the way down, then up, then
                in the middle: a tuple of (keys, values) [B, T, C] of each adapter.

        Returns:
            [B, H, W, out_channels] in float32.
        """
        temb, context = self.conditioning(timesteps, context)
        x = activation(self.conv_in(xt.astype(self.dtype)))
        levels = len(self.down_blocks)
        *contexts, middle = self._shared(context, tuple(images))
        x, skips = self.descend(x, temb, [*contexts[:levels], middle], key, maps)
        if residuals is not None:
            skips = [
                skip + more.astype(self.dtype)
                for skip, more in zip(skips, residuals.down, strict=True)
            ]
            x = x + residuals.mid.astype(self.dtype)
        for i, up in enumerate(self.up_blocks):
            used = tuple(skips.pop() for _ in up.resnets)
            # The size of the next level, which is not the double where that one is odd.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            run = rematerialised(functools.partial(up, size=size), self.remat, level="stage")
            x = run(x, used, temb, contexts[levels + i], fold_key(key, levels + 1 + i))
        return activation(self.conv_out(silu(self.conv_norm_out(x))).astype(jnp.float32))

    def _shared(self, text: Array, images: tuple[Any, ...]) -> list[Array | Attended]:
        """The context of each stage on the way down, then up, then of the middle."""
        stages = (*self.down_blocks, *self.up_blocks, self.mid_block)
        if not images:
            return [text for _ in stages]
        counts = [stage.crossings for stage in stages]
        if sum(counts) != len(images):
            raise ValueError(f"{len(images)} images for {sum(counts)} layers of cross-attention")
        ends = itertools.accumulate(counts)
        return [Attended(text, images[end - n : end]) for n, end in zip(counts, ends, strict=True)]
