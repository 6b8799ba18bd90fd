"""The levels of a UNet: residual blocks and transformers, on the way down, in the middle, up."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models.attention import Attended, Transformer2D, part_of
from sdjax.models.blocks import Downsample, ResnetBlock, Upsample, with_added
from sdjax.models.layers import Array, fold_key, rematerialised
from sdjax.models.unet_config import DOWN_TYPES, UP_TYPES, UNetConfig


class Stage(nnx.Module):
    """One level of the network on its way down, in the middle or up.

    Args:
        widths_in: input channels of each residual block.
        level: of the config's per-level fields, 0 being the finest.
        attentions: number of transformers; 0 for plain levels.
        remat: see `layers.rematerialised`.
    """

    def __init__(
        self,
        config: UNetConfig,
        widths_in: tuple[int, ...],
        *,
        level: int,
        attentions: int,
        remat: str,
        **kw: Any,
    ):
        width = config.block_out_channels[level]
        groups = config.norm_num_groups
        self.resnets = nnx.List(
            ResnetBlock(
                width_in,
                width,
                time_channels=4 * config.block_out_channels[0],
                groups=groups,
                eps=config.norm_eps,
                dropout=config.dropout,
                zero=True,
                **kw,
            )
            for width_in in widths_in
        )
        self.attentions = nnx.List(
            Transformer2D(
                width,
                config.heads(level),
                config.cross_attention_dim,
                depth=config.depth(level),
                groups=groups,
                use_linear_projection=config.use_linear_projection,
                upcast=config.upcast_attention,
                remat=remat,
                **kw,
            )
            for _ in range(attentions)
        )
        self.remat = remat

    @property
    def crossings(self) -> int:
        """The number of transformer blocks, each with a cross-attention."""
        return sum(len(one.transformer_blocks) for one in self.attentions)

    def attention(self, i: int, x: Array, context: Array | Attended) -> Array:
        """Transformer `i`."""
        depth = len(self.attentions[i].transformer_blocks)
        return self.attentions[i](x, part_of(context, i * depth, depth))

    def resnet(self, i: int, x: Array, temb: Array, key: Array | None) -> Array:
        """Residual block `i`, with a dropout key of its own."""
        block = rematerialised(self.resnets[i], self.remat, level="block")
        return block(x, temb, fold_key(key, i))


class DownStage(Stage):
    """Residual blocks and transformers, then half the resolution (except at the last level)."""

    def __init__(self, config: UNetConfig, level: int, *, remat: str, **kw: Any):
        widths, layers = config.block_out_channels, config.layers_per_block
        width = widths[level]
        super().__init__(
            config,
            (widths[max(level - 1, 0)],) + (width,) * (layers - 1),
            level=level,
            attentions=layers if config.down_block_types[level] == DOWN_TYPES[0] else 0,
            remat=remat,
            **kw,
        )
        final = level == len(widths) - 1
        self.downsamplers = None if final else nnx.List([Downsample(width, symmetric=True, **kw)])

    def __call__(
        self, x: Array, temb: Array, context: Array, key: Array | None, added: Array | None = None
    ) -> tuple[Array, tuple[Array, ...]]:
        """x [B, H, W, C] -> (output, the maps that the way up will need).

        Args:
            added: of a T2I-Adapter, to what comes out of the last transformer; of a plain level to
                its output (unet_2d_blocks.py, `additional_residuals`, and unet_2d_condition.py,
                whose `+=` changes the map of the way up as well).
        """
        skips = []
        last = len(self.resnets) - 1
        for i in range(len(self.resnets)):
            x = self.resnet(i, x, temb, key)
            if self.attentions:
                x = self.attention(i, x, context)
                x = x if i < last else with_added(x, added)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        if not self.attentions:
            skips[-1] = x = with_added(x, added)
        return x, tuple(skips)


class MidStage(Stage):
    """Residual block, transformer, residual block, at the coarsest resolution."""

    def __init__(self, config: UNetConfig, *, remat: str, **kw: Any):
        widths = (config.block_out_channels[-1],) * 2
        level = len(config.block_out_channels) - 1
        super().__init__(config, widths, level=level, attentions=1, remat=remat, **kw)

    def __call__(self, x: Array, temb: Array, context: Array, key: Array | None) -> Array:
        x = self.resnet(0, x, temb, key)
        for i in range(len(self.attentions)):
            x = self.resnet(i + 1, self.attention(i, x, context), temb, key)
        return x


class UpStage(Stage):
    """Residual blocks over the input and a skip each, then the double resolution."""

    def __init__(self, config: UNetConfig, level: int, *, remat: str, **kw: Any):
        widths, layers = config.block_out_channels, config.layers_per_block
        width, last = widths[level], len(widths) - 1
        carried = (widths[min(level + 1, last)],) + (width,) * layers
        # The maps of this level on the way down, last first, and the one that entered it.
        skips = (width,) * layers + (widths[max(level - 1, 0)],)
        super().__init__(
            config,
            tuple(c + s for c, s in zip(carried, skips, strict=True)),
            level=level,
            attentions=layers + 1 if config.up_block_types[last - level] == UP_TYPES[0] else 0,
            remat=remat,
            **kw,
        )
        self.upsamplers = None if level == 0 else nnx.List([Upsample(width, **kw)])

    def __call__(
        self,
        x: Array,
        skips: tuple[Array, ...],
        temb: Array,
        context: Array,
        key: Array | None,
        *,
        size: tuple[int, int] | None,
    ) -> Array:
        """x [B, h, w, C], skips in the order of use -> [B, *size, C']; `size` None keeps (h, w)."""
        for i, skip in enumerate(skips):
            x = self.resnet(i, jnp.concatenate([x, skip], axis=-1), temb, key)
            if self.attentions:
                x = self.attention(i, x, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)
