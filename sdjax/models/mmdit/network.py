"""The denoiser of Stable Diffusion 3 and 3.5 (diffusers `SD3Transformer2DModel`).

Image and text tokens pass through blocks of joint attention (Esser et al. 2024, arXiv:2403.03206,
figure 2). The config has the field names of diffusers, the modules its attribute names. Equal
blocks are stacked and run by `lax.scan`: SD3.5-medium has three runs, 0-12, 13-22 and 23.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models import capture
from sdjax.models.dit_layers import (
    AdaLayerNormContinuous,
    JointBlock,
    TimeTextEmbedding,
    conditioned,
)
from sdjax.models.layers import Array, Dtype, check_remat, conv, linear
from sdjax.models.mmdit.config import MMDiTConfig
from sdjax.models.placement import activation
from sdjax.models.stacking import Blocks

__all__ = ["MMDiT", "MMDiTConfig"]


def position_codes(size: int, width: int, base: int) -> np.ndarray:
    """Return the sine-cosine code of each of `size` positions along an axis, [size, width].

    Positions count in patches of a picture with `base` of them (diffusers embeddings.py,
    get_2d_sincos_pos_embed).
    """
    positions = np.arange(size, dtype=np.float32) / np.float32(size / base)  # as the reference
    frequencies = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    phases = np.outer(positions, frequencies)
    return np.concatenate([np.sin(phases), np.cos(phases)], axis=1)


class PatchEmbed(nnx.Module):
    """Patches as tokens, plus the middle of a stored table of positions.

    The table is in the files, and its values differ between recipes, so it is read and written like
    a parameter. It is none: no gradient reaches it, and no method trains it (`params.is_buffer`).
    """

    def __init__(self, config: MMDiTConfig, **kw: Any):
        size, patch, width = config.pos_embed_max_size, config.patch_size, config.width
        self.proj = conv(
            config.in_channels, width, patch, stride=patch, padding=((0, 0), (0, 0)), **kw
        )
        exact = position_codes(size, width // 2, config.sample_size // patch)
        codes = jnp.asarray(exact, kw["param_dtype"])  # [M, C / 2]
        shape = (size, size, width // 2)
        # The first half is the column's code, the second the row's.
        halves = jnp.broadcast_to(codes[None], shape), jnp.broadcast_to(codes[:, None], shape)
        table = jnp.concatenate(halves, axis=-1).reshape(1, size * size, width)
        self.pos_embed = nnx.Variable(table)
        self.size, self.patch = size, patch
        self.dtype: Dtype = kw["dtype"]

    def __call__(self, xt: Array) -> Array:
        """Map latents [B, H, W, in_channels] to tokens [B, N, C], row by row."""
        x = self.proj(xt.astype(self.dtype))
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c).astype(jnp.float32) + self.positions(h, w)
        return activation(x.astype(self.dtype))

    def positions(self, h: int, w: int) -> Array:
        """Return the codes of h x w patches, the middle of the table, [N, C] float32."""
        table = self.pos_embed[...].reshape(self.size, self.size, -1)  # [M, M, C]
        top, left = (self.size - h) // 2, (self.size - w) // 2
        middle = table[top : top + h, left : left + w].reshape(h * w, -1)  # [N, C]
        return jax.lax.stop_gradient(middle.astype(jnp.float32))


class MMDiT(nnx.Module):
    """Predicts the velocity, noise - x0, from noisy latents, timesteps and text.

    New networks start as DiT does (arXiv:2212.09748, section 3.2): the modulations and the last
    layer at zero, so that every block is the identity.

    Args:
        config: the shape.
        dtype: of matrix products, convolutions and activations.
        param_dtype: of the parameters.
        remat: see `layers.rematerialised`; one block is the largest unit.
        rngs: draws the parameters; not kept.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        width = config.width
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        kw: dict[str, Any] = {**shared, "rngs": rngs}
        self.pos_embed = PatchEmbed(config, **kw)
        self.time_text_embed = TimeTextEmbedding(width, config.pooled_projection_dim, **kw)
        self.context_embedder = linear(config.joint_attention_dim, width, **kw)

        def maker(dual: bool, last: bool) -> Any:
            qk_norm = config.qk_norm is not None
            heads = config.num_attention_heads
            return lambda rngs: JointBlock(
                width, heads, qk_norm=qk_norm, dual=dual, last=last, rngs=rngs, **shared
            )

        runs = [(maker(dual, last), count) for dual, last, count in config.runs()]
        self.transformer_blocks = Blocks(*runs, rngs=rngs)
        self.norm_out = AdaLayerNormContinuous(width, **kw)
        self.proj_out = linear(width, config.patch_size**2 * config.out_channels, zero=True, **kw)
        self.config, self.dtype, self.remat = config, dtype, remat

    def __call__(
        self,
        xt: Array,
        timesteps: Array,
        context: Mapping[str, Array],
        *,
        skip_layers: Collection[int] = (),
        key: Array | None = None,
    ) -> Array:
        """Run the network.

        Args:
            xt: noisy latents [B, H, W, in_channels]; H and W are multiples of patch_size, at most
                pos_embed_max_size patches.
            timesteps: [B], 1000 times the noise level, fractions allowed.
            context: "context", text features [B, L, joint_attention_dim], and "pooled"
                [B, pooled_projection_dim].
            skip_layers: blocks that are left out, for skip-layer guidance.
            key: not used: the network has no dropout.

        Returns:
            [B, H, W, out_channels] in float32.

        Raises:
            ValueError: the latents do not fit the patches or the position table, or a block to skip
                does not exist.
        """
        self._check(xt, skip_layers)
        text = activation(self.context_embedder(activation(context["context"].astype(self.dtype))))
        vector = conditioned(self.time_text_embed(timesteps, context["pooled"]))
        x = self._blocks(self.pos_embed(xt), text, vector, skip_layers)
        x = self.proj_out(self.norm_out(x, vector))
        return activation(self._unpatchified(x, xt.shape[1:3]).astype(jnp.float32))

    def _blocks(self, x: Array, text: Array, vector: Array, skip_layers: Collection[int]) -> Array:
        def step(block: JointBlock, carry: Any, skipped: Array | None) -> tuple[Any, None]:
            run = lambda carry: block(carry[0], carry[1], vector)  # noqa: E731
            if skipped is None:
                return run(carry), None
            # A branch, not a selection: what is left out is not computed either.
            with capture.paused():
                return jax.lax.cond(skipped, lambda carry: carry, run, carry), None

        carry, first = (x, text), 0
        for i, (_, _, count) in enumerate(self.config.runs()):
            skipped = [block in skip_layers for block in range(first, first + count)]
            first += count
            if all(skipped):
                continue
            each = jnp.asarray(skipped) if any(skipped) else None
            carry, _ = self.transformer_blocks.scan(step, carry, each, run=i, remat=self.remat)
        return carry[0]

    def _unpatchified(self, x: Array, size: tuple[int, ...]) -> Array:
        """Map tokens [B, N, patch * patch * channels] to [B, H, W, channels]."""
        (height, width), p = size, self.config.patch_size
        x = x.reshape(-1, height // p, width // p, p, p, self.config.out_channels)
        return x.swapaxes(2, 3).reshape(x.shape[0], height, width, -1)

    def _check(self, xt: Array, skip_layers: Collection[int]) -> None:
        patch, most = self.config.patch_size, self.config.pos_embed_max_size
        for side in xt.shape[1:3]:
            if side % patch or not 0 < side <= most * patch:
                raise ValueError(
                    f"latents of {xt.shape[1]} x {xt.shape[2]}: expected sides that are multiples "
                    f"of patch_size = {patch}, up to {most * patch} (pos_embed_max_size = {most} "
                    "patches)"
                )
        absent = sorted(set(skip_layers) - set(range(self.config.num_layers)))
        if absent:
            raise ValueError(
                f"skip_layers has {absent}: expected blocks 0 to {self.config.num_layers - 1}"
            )
