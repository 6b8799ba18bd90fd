"""The blocks of FLUX.1 (diffusers transformer_flux.py), with attention over text and picture.

The text precedes the picture wherever both are one sequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models.attention import attention
from sdjax.models.dit_layers import FeedForward, Modulation, RMSNorm, modulate
from sdjax.models.flux_config import FluxConfig
from sdjax.models.layers import Array, linear
from sdjax.models.placement import activation
from sdjax.models.rope import Rotation, rotate


class DoubleAttention(nnx.Module):
    """Joint attention whose projections have weights of their own for text and picture."""

    def __init__(self, config: FluxConfig, **kw: Any):
        width, head = config.width, config.attention_head_dim
        self.to_q, self.to_k, self.to_v = (linear(width, width, **kw) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            linear(width, width, **kw) for _ in range(3)
        )
        self.norm_q, self.norm_k = RMSNorm(head, **kw), RMSNorm(head, **kw)
        self.norm_added_q, self.norm_added_k = RMSNorm(head, **kw), RMSNorm(head, **kw)
        self.to_out = nnx.List([linear(width, width, **kw)])
        self.to_add_out = linear(width, width, **kw)
        self.heads = config.num_attention_heads

    def __call__(self, text: Array, x: Array, rotation: Rotation) -> tuple[Array, Array]:
        """Map text [B, L, C] and picture [B, N, C] to the same; rotation of all L + N tokens."""
        length, heads = text.shape[1], self.heads
        q, k, v = (
            jnp.concatenate([_heads(ours, heads), _heads(theirs, heads)], axis=1)
            for ours, theirs in (
                (self.add_q_proj(text), self.to_q(x)),
                (self.add_k_proj(text), self.to_k(x)),
                (self.add_v_proj(text), self.to_v(x)),
            )
        )
        q = jnp.concatenate([self.norm_added_q(q[:, :length]), self.norm_q(q[:, length:])], axis=1)
        k = jnp.concatenate([self.norm_added_k(k[:, :length]), self.norm_k(k[:, length:])], axis=1)
        out = attention(rotate(q, rotation), rotate(k, rotation), v)
        out = out.reshape(*out.shape[:2], -1)  # [B, L + N, C]
        return self.to_add_out(out[:, :length]), self.to_out[0](out[:, length:])


class DoubleBlock(nnx.Module):
    """Joint attention, then a feed-forward for each of text and picture; all gated."""

    def __init__(self, config: FluxConfig, **kw: Any):
        width = config.width
        self.norm1, self.norm1_context = Modulation(width, 6, **kw), Modulation(width, 6, **kw)
        self.attn = DoubleAttention(config, **kw)
        self.ff, self.ff_context = FeedForward(width, **kw), FeedForward(width, **kw)

    def __call__(
        self, text: Array, x: Array, temb: Array, rotation: Rotation
    ) -> tuple[Array, Array]:
        """Map text [B, L, C] and picture [B, N, C] to the same; temb [B, C]."""
        shift, scale, gate, *mlp = self.norm1(temb)
        text_shift, text_scale, text_gate, *text_mlp = self.norm1_context(temb)
        read = modulate(text, text_shift, text_scale), modulate(x, shift, scale)
        text_out, out = self.attn(*read, rotation)
        text = activation(text + text_gate[:, None] * text_out)
        x = activation(x + gate[:, None] * out)
        return _fed(self.ff_context, text, *text_mlp), _fed(self.ff, x, *mlp)


class SingleAttention(nnx.Module):
    """Attention among all tokens, without an output projection."""

    def __init__(self, config: FluxConfig, **kw: Any):
        width, head = config.width, config.attention_head_dim
        self.to_q, self.to_k, self.to_v = (linear(width, width, **kw) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head, **kw), RMSNorm(head, **kw)
        self.heads = config.num_attention_heads

    def __call__(self, x: Array, rotation: Rotation) -> Array:
        """Map x [B, L, C] to the same."""
        q, k, v = (_heads(y, self.heads) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        out = attention(rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation), v)
        return out.reshape(x.shape)


class SingleBlock(nnx.Module):
    """Attention and an MLP side by side, of the same input, and one gated projection of both."""

    def __init__(self, config: FluxConfig, **kw: Any):
        width, hidden = config.width, 4 * config.width
        self.norm = Modulation(width, 3, **kw)
        self.attn = SingleAttention(config, **kw)
        self.proj_mlp = linear(width, hidden, **kw)
        self.proj_out = linear(width + hidden, width, **kw)

    def __call__(self, x: Array, temb: Array, rotation: Rotation) -> Array:
        """Map x [B, L, C] to the same; temb [B, C]."""
        shift, scale, gate = self.norm(temb)
        read = modulate(x, shift, scale)
        hidden = jax.nn.gelu(self.proj_mlp(read), approximate=True)
        out = self.proj_out(jnp.concatenate([self.attn(read, rotation), hidden], axis=-1))
        return activation(x + gate[:, None] * out)


def _heads(x: Array, heads: int) -> Array:
    """[B, L, C] -> [B, L, heads, C / heads]."""
    return x.reshape(*x.shape[:2], heads, -1)


def _fed(ff: FeedForward, x: Array, shift: Array, scale: Array, gate: Array) -> Array:
    return activation(x + gate[:, None] * ff(modulate(x, shift, scale)))
