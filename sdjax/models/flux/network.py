"""The transformer of FLUX.1 (diffusers `FluxTransformer2DModel`).

One module is that of dev, schnell, Fill, Canny, Depth and Kontext: their inputs differ.
The config has the field names of diffusers, the modules its attribute names. Blocks are stacked:
`transformer_blocks.0-18.attn.to_q.kernel` [19, 3072, 3072]. The network sees latents, timesteps
and text features; it knows of no noise schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models import capture
from sdjax.models.dit_layers import (
    AdaLayerNorm,
    AdaLayerNormContinuous,
    JointAttention,
    JointBlock,
    Rotate,
    TimeTextEmbedding,
    conditioned,
    modulated,
)
from sdjax.models.flux import rope
from sdjax.models.flux.config import PATCH, FluxConfig
from sdjax.models.layers import Array, Dtype, check_remat, gelu_tanh, linear
from sdjax.models.placement import activation
from sdjax.models.stacking import Blocks

__all__ = ["Flux", "FluxConfig", "mask_channels", "pack", "unpack"]


def pack(x: Array, *, what: str = "latents") -> Array:
    """Return latents [B, H, W, C] as tokens [B, H/2 * W/2, 4 C], in rows.

    A token's channels are those of its four latents in the order (channel, row, column).
    Latents that are side by side in C are side by side in the tokens too.

    Raises:
        ValueError: H or W is odd.
    """
    b, h, w, c = x.shape
    if h % PATCH or w % PATCH:
        raise ValueError(
            f"{what} of {h} x {w}: expected even sides, for a token is {PATCH} x {PATCH} latents; "
            f"choose a picture whose sides are multiples of {PATCH * 8} pixels"
        )
    x = x.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)  # [B, H/2, row, W/2, column, C]
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, PATCH**2 * c)  # [B, H/2 * W/2, 4 C]


def unpack(x: Array, height: int, width: int) -> Array:
    """Return tokens [B, height/2 * width/2, 4 C] as latents [B, height, width, C]."""
    x = x.reshape(x.shape[0], height // PATCH, width // PATCH, -1, PATCH, PATCH)
    # [B, H/2, W/2, C, row, column] -> [B, H/2, row, W/2, column, C]
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(x.shape[0], height, width, -1)


def mask_channels(mask: Array, side: int) -> Array:
    """Return a mask [B, side H, side W, 1] as FLUX.1-Fill reads it, [B, H, W, side^2].

    A latent's channels are the pixels under it, side x side and in rows (pipeline_flux_fill.py,
    where the side is 8 for FLUX.1's VAE).
    """
    b, h, w, _ = mask.shape
    x = mask.reshape(b, h // side, side, w // side, side)
    return x.transpose(0, 1, 3, 2, 4).reshape(b, h // side, w // side, side**2)


class SingleBlock(nnx.Module):
    """Attention and an MLP side by side, of one input, then one gated projection of both."""

    def __init__(self, width: int, heads: int, **kw: Any):
        self.norm = AdaLayerNorm(width, 3, **kw)
        self.attn = JointAttention(width, heads, qk_norm=True, out=False, **kw)
        self.proj_mlp = linear(width, 4 * width, **kw)
        self.proj_out = linear(5 * width, width, **kw)
        self.dtype = kw["dtype"]

    def __call__(self, x: Array, conditioning: Array, rotate: Rotate) -> Array:
        """Map the tokens of text and picture [B, L, C] to the same.

        Args:
            conditioning: the SiLU of the conditioning vector, [B, C].
            rotate: turns queries and keys [B, L, heads, D] by their positions.
        """
        shift, scale, gate = self.norm(conditioning)
        read = modulated(x, shift, scale, self.dtype)
        attended, _ = self.attn(read, rotate=rotate)
        # Not of both in one array: each is split over devices by its own heads or channels.
        out = self.proj_out.joined(attended, gelu_tanh(self.proj_mlp(read)))
        return capture.output(self, activation(x + gate * out))


class Flux(nnx.Module):
    """Predicts the velocity noise - x0 from noisy latents, timesteps and a text context.

    New networks start as DiT does (arXiv:2212.09748): every modulation and the output at zero.

    Args:
        config: the shape.
        dtype: of matrix products and activations. Float16 overflows with FLUX.1's weights.
        param_dtype: of the parameters.
        remat: see `layers.rematerialised`; one block is the largest unit.
        rngs: draws the parameters; not kept.
    """

    def __init__(
        self,
        config: FluxConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, heads = config.width, config.num_attention_heads
        self.x_embedder = linear(config.in_channels, width, **kw)
        self.context_embedder = linear(config.joint_attention_dim, width, **kw)
        self.time_text_embed = TimeTextEmbedding(
            width, config.pooled_projection_dim, guidance=config.guidance_embeds, **kw
        )

        def double(rngs: Any) -> nnx.Module:
            return JointBlock(width, heads, qk_norm=True, text_first=True, **kw | {"rngs": rngs})

        def single(rngs: Any) -> nnx.Module:
            return SingleBlock(width, heads, **kw | {"rngs": rngs})

        self.transformer_blocks = Blocks((double, config.num_layers), rngs=rngs)
        self.single_transformer_blocks = Blocks((single, config.num_single_layers), rngs=rngs)
        self.norm_out = AdaLayerNormContinuous(width, **kw)
        self.proj_out = linear(width, config.outputs, zero=True, **kw)
        self.config, self.dtype, self.remat = config, dtype, remat

    def __call__(
        self,
        xt: Array,
        timesteps: Array,
        context: Mapping[str, Array],
        *,
        key: Array | None = None,
    ) -> Array:
        """Run the network.

        Args:
            xt: noisy latents [B, H, W, C] with C = `config.latent_channels`, H and W even.
            timesteps: [B], 1000 times the noise level: 0 is the picture, 1000 pure noise.
            context: "context" [B, L, joint_attention_dim], the text features; "pooled"
                [B, pooled_projection_dim], the pooled caption;
                "guidance" [B], the guidance scale, for `guidance_embeds`;
                "channels" [B, H, W, `config.added_channels`], latents that Fill and Control read
                beside the noisy ones: Fill's masked picture and then `mask_channels`, or Control's
                picture;
                "reference" [B, h, w, C], the latents of a picture to edit (Kontext), or absent.
            key: of dropout, which this network does not have.

        Returns:
            [B, H, W, C] in float32.

        Raises:
            ValueError: naming what of the context is missing, superfluous or mis-shaped.
        """
        self._check(xt, context)
        (_, height, width, _), dims = xt.shape, self.config.axes_dims_rope
        guidance = context.get("guidance")
        if guidance is not None:
            guidance = 1000.0 * guidance.astype(jnp.float32)
        conditioning = conditioned(self.time_text_embed(timesteps, context["pooled"], guidance))
        text = activation(self.context_embedder(context["context"]))
        if self.config.added_channels:
            xt = jnp.concatenate([xt, context["channels"].astype(xt.dtype)], axis=-1)
        tokens = [pack(xt)]
        turns = [
            rope.origin(text.shape[1], dims),
            rope.grid(0, height // PATCH, width // PATCH, dims),
        ]
        if "reference" in context:
            latents = context["reference"].astype(xt.dtype)
            tokens.append(pack(latents, what="the reference's latents"))
            turns.append(rope.grid(1, latents.shape[1] // PATCH, latents.shape[2] // PATCH, dims))
        x = activation(self.x_embedder(jnp.concatenate(tokens, axis=1)))
        x = self._blocks(x, text, conditioning, rope.joined(*turns))
        x = self.norm_out(x[:, : tokens[0].shape[1]], conditioning)
        return activation(unpack(self.proj_out(x), height, width).astype(jnp.float32))

    def _blocks(self, x: Array, text: Array, conditioning: Array, rotation: rope.Rotation) -> Array:
        """Map picture [B, N, C] and text [B, L, C] to the picture's last states."""
        rotate = functools.partial(rope.rotate, rotation=rotation)

        def double(block: Any, carry: Any, _: None) -> tuple[Any, None]:
            return block(*carry, conditioning, rotate), None

        def single(block: Any, both: Array, _: None) -> tuple[Array, None]:
            return block(both, conditioning, rotate), None

        (x, text), _ = self.transformer_blocks.scan(double, (x, text), remat=self.remat)
        both = jnp.concatenate([text, x], axis=1)
        both, _ = self.single_transformer_blocks.scan(single, both, remat=self.remat)
        return both[:, text.shape[1] :]

    def _check(self, xt: Array, context: Mapping[str, Array]) -> None:
        config = self.config
        channels, added = config.latent_channels, config.added_channels
        if xt.shape[-1] != channels:
            raise ValueError(
                f"latents {xt.shape}: expected {channels} channels, a quarter of out_channels"
            )
        needed = {"context", "pooled"}
        needed |= {"guidance"} if config.guidance_embeds else set()
        needed |= {"channels"} if added else set()
        if needed - context.keys() or context.keys() - needed - {"reference"}:
            raise ValueError(
                f"a context of {sorted(context)}: with guidance_embeds = {config.guidance_embeds}, "
                f"in_channels = {config.in_channels} and out_channels = {config.outputs} this "
                f"network takes {sorted(needed)}, and a reference for FLUX.1-Kontext"
            )
        wanted = {"channels": (*xt.shape[:3], added)} if added else {}
        if "reference" in context:
            wanted["reference"] = (xt.shape[0], *context["reference"].shape[1:3], channels)
            if added:
                raise ValueError("a reference and channels: expected one of them")
        for name, shape in wanted.items():
            if context[name].shape != shape:
                raise ValueError(f"{name} {context[name].shape}: expected {shape}")
