"""The resampler of IP-Adapter Plus: learned queries that attend to the patches of a picture.

Attribute names are those of its files (ip_adapter/resampler.py of the authors).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models.attention import NoParameters
from sdjax.models.ip_adapter.config import HEAD, IPAdapterConfig
from sdjax.models.kernels.dense import dense_attention
from sdjax.models.layers import Array, LayerNorm, gelu, linear, normal_init
from sdjax.models.placement import activation


class PerceiverAttention(nnx.Module):
    """Attention of the queries to the patches and to themselves."""

    def __init__(self, width: int, **kw: Any):
        self.norm1, self.norm2 = LayerNorm(width, **kw), LayerNorm(width, **kw)
        self.to_q = linear(width, width, bias=False, **kw)
        self.to_kv = linear(width, 2 * width, bias=False, **kw)
        self.to_out = linear(width, width, bias=False, **kw)

    def __call__(self, x: Array, latents: Array) -> Array:
        """Map patches [B, N, C] and queries [B, T, C] to [B, T, C]."""
        x, latents = self.norm1(x), self.norm2(latents)
        both = jnp.concatenate([x, latents], axis=1)  # [B, N + T, C]
        q, k, v = self.to_q(latents), *jnp.split(self.to_kv(both), 2, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], -1, HEAD) for y in (q, k, v))  # [B, ., heads, HEAD]
        out = dense_attention(q, k, v, causal=False).astype(q.dtype)
        return self.to_out(out.reshape(latents.shape))


class Resampler(nnx.Module):
    """The features of patches [B, N, E] to tokens [B, T, D]."""

    def __init__(self, config: IPAdapterConfig, **kw: Any):
        width = config.resampler_width
        shape = (1, config.tokens, width)
        self.latents = nnx.Param(normal_init(width**-0.5)(kw["rngs"].params(), shape))
        self.proj_in = linear(config.embedding_dim, width, **kw)
        self.proj_out = linear(width, config.cross_attention_dim, **kw)
        self.norm_out = LayerNorm(config.cross_attention_dim, **kw)
        self.layers: Any = nnx.List(
            nnx.List([PerceiverAttention(width, **kw), feed_forward(width, **kw)])
            for _ in range(config.resampler_layers)
        )

    def __call__(self, patches: Array) -> Array:
        x = self.proj_in(patches)
        latents = self.latents[...].astype(x.dtype)
        latents = jnp.broadcast_to(latents, (len(x), *latents.shape[1:]))
        for layer in self.layers:
            attention, feed = layer
            norm, widen, _, narrow = feed
            latents = activation(latents + attention(x, latents))
            latents = activation(latents + narrow(gelu(widen(norm(latents)))))
        return activation(self.norm_out(self.proj_out(latents)))


def feed_forward(width: int, **kw: Any) -> nnx.List:
    """Return norm, dense layer, the place of a GELU, dense layer."""
    widen = linear(width, 4 * width, bias=False, **kw)
    narrow = linear(4 * width, width, bias=False, **kw)
    return nnx.List([LayerNorm(width, **kw), widen, NoParameters(), narrow])
