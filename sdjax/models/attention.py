"""The function `attention`, and the transformer blocks of the networks.

Attribute names are those of diffusers (models/attention.py, models/transformers/transformer_2d.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models import capture, placement
from sdjax.models.kernels import choice, flash, short_keys
from sdjax.models.kernels.dense import dense_attention
from sdjax.models.layers import Array, GroupNorm, LayerNorm, gelu, linear, pointwise, rematerialised
from sdjax.models.placement import activation

_KERNELS = {
    "splash": flash.flash_attention,
    "short": short_keys.short_attention,
    "cudnn": choice.cudnn_attention,
}


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    upcast: bool = False,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Scaled dot-product attention, with the softmax in float32 whatever the dtype of the inputs.

    `choice.choose` selects the kernel. Outside `placement.placed` plain products compute it.

    Args:
        q: [B, L, heads, D].
        k, v: [B, M, heads, D].
        causal: position i attends to positions <= i.
        upcast: compute in float32 throughout, for models whose logits overflow their dtype
            (`upcast_attention` of Stable Diffusion 2).
        bias: float32, added to the logits [B, heads, L, M], to which it broadcasts.
        scale: of the products of queries and keys, by default D^-1/2. Of a bias or another scale
            there is no kernel: plain products compute them.

    Returns:
        [B, L, heads, D] in the dtype of `q`.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if bias is not None or scale is not None:
        return dense_attention(q, k, v, causal=causal, bias=bias, scale=scale).astype(dtype)
    chosen = choice.choose(placement.attention(), placement.kernels(), q, k, causal=causal)
    if chosen != "dense":
        return placement.per_device(_KERNELS[chosen], q, k, v).astype(dtype)
    return dense_attention(q, k, v, causal=causal).astype(dtype)


class Attended(NamedTuple):
    """The context of blocks of a network, with what IP-Adapters show to their cross-attention.

    text: [B, M, D].
    images: for each block, in order, the (keys, values) of each IP-Adapter, [B, T, C].
    """

    text: Array
    images: tuple[tuple[tuple[Array, Array], ...], ...]


def part_of(context: Array | Attended, start: int, count: int) -> Array | Attended:
    """Return the context of `count` blocks among those that it is for."""
    if not isinstance(context, Attended):
        return context
    return Attended(context.text, context.images[start : start + count])


def _logits(q: Array, k: Array) -> Array:
    """The argument of the softmax, [B, heads, L, M] float32.

    q: [B, L, heads, D]; k: [B, M, heads, D].
    """
    logits = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32)
    return logits * q.shape[-1] ** -0.5


def _largest_logit(q: Array, k: Array) -> Array:
    """The largest logit, float32 scalar, computed head by head: all logits at once may not fit."""
    q, k = (jnp.moveaxis(x, 2, 0)[..., None, :] for x in (q, k))  # [heads, B, L, 1, D]
    return jax.lax.map(lambda head: _logits(*head).max(), (q, k)).max()


def offer(module: nnx.Module, q: Array, k: Array, *, upcast: bool = False) -> None:
    """Offer an attention layer's probabilities and its largest logit to `capture`.

    Args:
        q: [B, L, heads, D]; k: [B, M, heads, D].
        upcast: see `attention`.
    """
    if upcast:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    capture.offer(module, capture.PROBABILITIES, lambda: jax.nn.softmax(_logits(q, k)))
    capture.offer(module, capture.LOGITS, lambda: _largest_logit(q, k))


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves, or to a context of another width.

    Args:
        channels: width of the tokens; the heads divide it.
        heads: number of heads.
        context_channels: width of the context, None for self-attention.
        qkv_bias: whether the three input projections have biases.
        upcast: see `attention`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context_channels: int | None = None,
        qkv_bias: bool = False,
        upcast: bool = False,
        **kw: Any,
    ):
        context_channels = context_channels or channels
        self.to_q = linear(channels, channels, bias=qkv_bias, **kw)
        self.to_k = linear(context_channels, channels, bias=qkv_bias, **kw)
        self.to_v = linear(context_channels, channels, bias=qkv_bias, **kw)
        self.to_out = nnx.List([linear(channels, channels, **kw)])
        self.heads, self.upcast = heads, upcast

    def __call__(self, x: Array, context: Array | Attended | None = None) -> Array:
        """Map x [B, L, C], context [B, M, D] or None to [B, L, C].

        What IP-Adapters show has a softmax of its own (attention_processor.py,
        `IPAdapterAttnProcessor`), and their weights are in the values.
        """
        images: tuple[tuple[Array, Array], ...] = ()
        if isinstance(context, Attended):
            context, (images,) = context
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = map(self._split, (q, k, v))
        offer(self, q, k, upcast=self.upcast)
        out = attention(q, k, v, upcast=self.upcast)
        for pair in images:
            keys, values = (self._split(y.astype(q.dtype)) for y in pair)
            out = out + dense_attention(q, keys, values, causal=False).astype(out.dtype)
        return self.to_out[0](out.reshape(x.shape))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)  # [B, L, heads, D]


class GEGLU(nnx.Module):
    """The product hidden * gelu(gate) of the halves of one projection (LDM attention.py)."""

    def __init__(self, channels: int, features: int, **kw: Any):
        self.proj = linear(channels, 2 * features, **kw)

    def __call__(self, x: Array) -> Array:
        hidden, gate = self.proj.parts(x, 2)
        return hidden * gelu(gate)


class NoParameters(nnx.Module):
    """A placeholder in a list, where diffusers has a layer without weights (dropout)."""


class FeedForward(nnx.Module):
    """Two dense layers with a GEGLU of width 4 C between: [..., C] to [..., C]."""

    def __init__(self, channels: int, **kw: Any):
        widen, narrow = GEGLU(channels, 4 * channels, **kw), linear(4 * channels, channels, **kw)
        self.net = nnx.List([widen, NoParameters(), narrow])

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after a norm and added to its input."""

    def __init__(
        self, channels: int, heads: int, context_channels: int, *, upcast: bool = False, **kw: Any
    ):
        self.norm1 = LayerNorm(channels, **kw)
        self.attn1 = Attention(channels, heads, upcast=upcast, **kw)
        self.norm2 = LayerNorm(channels, **kw)
        self.attn2 = Attention(
            channels, heads, context_channels=context_channels, upcast=upcast, **kw
        )
        self.norm3 = LayerNorm(channels, **kw)
        self.ff = FeedForward(channels, **kw)

    def __call__(self, x: Array, context: Array | Attended) -> Array:
        """Map x [B, L, C], context [B, M, D] to [B, L, C]."""
        x = activation(x + self.attn1(self.norm1(x)))
        x = activation(x + self.attn2(self.norm2(x), context))
        return capture.output(self, activation(x + self.ff(self.norm3(x))))


class Transformer2D(nnx.Module):
    """Transformer blocks over the positions of a feature map, between two projections.

    Args:
        channels: width of the map.
        heads: number of attention heads.
        context_channels: width of the text context.
        depth: number of transformer blocks.
        groups: groups of the input norm.
        use_linear_projection: dense projections (SD2, SDXL) instead of 1x1 convolutions (SD1). Both
            are the same function, with differently shaped weights.
        upcast: see `attention`.
        remat: see `layers.rematerialised`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int,
        *,
        depth: int,
        groups: int,
        use_linear_projection: bool,
        upcast: bool,
        remat: str,
        **kw: Any,
    ):
        # 1e-6 here, 1e-5 in the residual blocks around it (LDM attention.py, Normalize).
        self.norm = GroupNorm(channels, groups, eps=1e-6, **kw)
        project: Any = linear if use_linear_projection else pointwise
        self.proj_in = project(channels, channels, **kw)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(channels, heads, context_channels, upcast=upcast, **kw)
            for _ in range(depth)
        )
        self.proj_out = project(channels, channels, zero=True, **kw)
        self.remat = remat

    def __call__(self, x: Array, context: Array | Attended) -> Array:
        """Map x [B, H, W, C], context [B, M, D] to [B, H, W, C]."""
        residual, (b, h, w, c) = x, x.shape
        x = activation(self.proj_in(self.norm(x)).reshape(b, h * w, c))  # [B, H*W, C]
        for i, block in enumerate(self.transformer_blocks):
            x = rematerialised(block, self.remat, level="block")(x, part_of(context, i, 1))
        return capture.output(self, activation(residual + self.proj_out(x.reshape(b, h, w, c))))
