"""The layers of diffusion transformers with two streams, image and text: SD3's and FLUX's.

Attribute names are those of diffusers (models/attention.py `JointTransformerBlock`,
models/normalization.py, models/embeddings.py). Every block is conditioned on one vector of each
example, the SiLU of `TimeTextEmbedding`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models import capture
from sdjax.models.attention import NoParameters, attention, offer
from sdjax.models.layers import (
    Array,
    Dtype,
    RMSNorm,
    TimestepEmbedding,
    gelu_tanh,
    linear,
    normalised,
    silu,
    timestep_embedding,
)
from sdjax.models.placement import activation
from sdjax.models.products import Linear

EPS = 1e-6  # of every norm (diffusers transformer_sd3.py, transformer_flux.py)
WAVES = 256  # width of a sinusoidal embedding (CombinedTimestepTextProjEmbeddings)

Rotate = Callable[[Array], Array]


class TimeTextEmbedding(nnx.Module):
    """The conditioning vector: embeddings of time, pooled caption and perhaps guidance, added.

    Args:
        width: of the result.
        pooled_width: of the pooled caption.
        guidance: whether the guidance scale is embedded as well (FLUX dev).
    """

    def __init__(self, width: int, pooled_width: int, *, guidance: bool = False, **kw: Any):
        self.timestep_embedder = TimestepEmbedding(WAVES, width, **kw)
        self.guidance_embedder = TimestepEmbedding(WAVES, width, **kw) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled_width, width, **kw)
        self.dtype: Dtype = kw["dtype"]

    def __call__(self, timesteps: Array, pooled: Array, guidance: Array | None = None) -> Array:
        """Return the conditioning vector before its SiLU, [B, C].

        Args:
            timesteps: [B], 1000 times the noise level.
            pooled: [B, pooled_width].
            guidance: [B], 1000 times the guidance scale; None for networks that do not embed it.
        """
        out = self.timestep_embedder(self._waves(timesteps))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("guidance is None, and this network embeds it: expected [B]")
            out = out + self.guidance_embedder(self._waves(guidance))
        return activation(out + self.text_embedder(activation(pooled.astype(self.dtype))))

    def _waves(self, numbers: Array) -> Array:
        """The sinusoids of numbers [B], computed in float32, [B, WAVES]."""
        return activation(timestep_embedding(numbers, WAVES).astype(self.dtype))


class AdaLayerNorm(nnx.Module):
    """The modulations of a layer: `count` vectors from the conditioning, starting at zero.

    Zero gates make a new block the identity (adaLN-Zero, arXiv:2212.09748, section 3.2).
    """

    def __init__(self, width: int, count: int, **kw: Any):
        self.linear = linear(width, count * width, zero=True, **kw)
        self.count = count

    def __call__(self, conditioning: Array) -> list[Array]:
        """Map the SiLU of the conditioning [B, C] to `count` arrays [B, 1, C]."""
        out = activation(self.linear(conditioning))[:, None]  # [B, 1, count * C]
        return jnp.split(out, self.count, axis=-1)


def modulated(x: Array, shift: Array, scale: Array, dtype: Dtype) -> Array:
    """Return LN(x) (1 + scale) + shift, computed in float32, in `dtype`.

    x: [B, L, C]; shift, scale: [B, 1, C].
    """
    scale, shift = scale.astype(jnp.float32), shift.astype(jnp.float32)
    return (normalised(x, EPS) * (1.0 + scale) + shift).astype(dtype)


class AdaLayerNormContinuous(nnx.Module):
    """A modulated norm without a gate. Its chunks are scale, shift: the order of diffusers.

    Files of the original code have them the other way round.
    """

    def __init__(self, width: int, **kw: Any):
        self.linear = linear(width, 2 * width, zero=True, **kw)
        self.dtype: Dtype = kw["dtype"]

    def __call__(self, x: Array, conditioning: Array) -> Array:
        """Map x [B, L, C] and the SiLU of the conditioning [B, C] to [B, L, C]."""
        out = activation(self.linear(conditioning))[:, None]  # [B, 1, 2 C]
        scale, shift = jnp.split(out, 2, axis=-1)
        return modulated(x, shift, scale, self.dtype)


class FeedForward(nnx.Module):
    """Two dense layers with a tanh-GELU of width 4 C between: [..., C] to [..., C]."""

    def __init__(self, width: int, **kw: Any):
        self.net = nnx.List(
            [GELU(width, 4 * width, **kw), NoParameters(), linear(4 * width, width, **kw)]
        )

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class GELU(nnx.Module):
    """A dense layer and a tanh-GELU."""

    def __init__(self, width: int, features: int, **kw: Any):
        self.proj = linear(width, features, **kw)

    def __call__(self, x: Array) -> Array:
        return gelu_tanh(self.proj(x))


class JointAttention(nnx.Module):
    """Attention over the tokens of image and text together, each with projections of its own.

    Args:
        width: of the tokens; the heads divide it.
        heads: number of heads.
        qk_norm: whether queries and keys of each head pass an RMSNorm.
        text: "none": there are image tokens alone. "joint": both are queries, keys and values.
            "read": text gives keys and values alone. Its projection of queries then is in files,
            and nothing uses it: its gradient is zero.
        text_first: whether text stands before the image (FLUX) or behind it (SD3).
        out: whether output projections follow.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        text: str = "none",
        text_first: bool = False,
        out: bool = True,
        **kw: Any,
    ):
        def norm() -> RMSNorm | None:
            return RMSNorm(width // heads, eps=EPS, **kw) if qk_norm else None

        self.to_q, self.to_k, self.to_v = (linear(width, width, **kw) for _ in range(3))
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nnx.List([linear(width, width, **kw)]) if out else None
        if text != "none":
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                linear(width, width, **kw) for _ in range(3)
            )
            self.norm_added_q, self.norm_added_k = norm(), norm()
        self.to_add_out = linear(width, width, **kw) if text == "joint" and out else None
        self.heads, self.text, self.text_first = heads, text, text_first

    def __call__(
        self, x: Array, context: Array | None = None, rotate: Rotate | None = None
    ) -> tuple[Array, Array | None]:
        """Attend.

        Args:
            x: image tokens [B, N, C].
            context: text tokens [B, L, C]; None exactly for text = "none".
            rotate: turns queries and keys [B, L, heads, D] of all tokens, by their positions. Not
                for text = "read".

        Returns:
            [B, N, C], and [B, L, C] for text = "joint", else None.
        """
        q, k, v = (self._heads(*pair, x) for pair in self._image())
        if context is not None:
            pairs = self._text()
            text_q = self._heads(*pairs[0], context) if self.text == "joint" else None
            text_k, text_v = (self._heads(*pair, context) for pair in pairs[1:])
            k, v = self._joined(k, text_k), self._joined(v, text_v)
            q = q if text_q is None else self._joined(q, text_q)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        offer(self, q, k)
        out = attention(q, k, v)
        out = out.reshape(*out.shape[:2], -1)  # [B, N (+ L), C]
        if self.text != "joint" or context is None:
            return self._projected(out), None
        length = context.shape[1]
        if self.text_first:
            text, image = out[:, :length], out[:, length:]
        else:
            image, text = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self._projected(image), text if self.to_add_out is None else self.to_add_out(text)

    def _image(self) -> list[tuple[Linear, RMSNorm | None]]:
        return [(self.to_q, self.norm_q), (self.to_k, self.norm_k), (self.to_v, None)]

    def _text(self) -> list[tuple[Linear, RMSNorm | None]]:
        return [
            (self.add_q_proj, self.norm_added_q),
            (self.add_k_proj, self.norm_added_k),
            (self.add_v_proj, None),
        ]

    def _heads(self, project: Linear, norm: RMSNorm | None, x: Array) -> Array:
        """Map [B, L, C] to [B, L, heads, D]."""
        y = project(x).reshape(*x.shape[:2], self.heads, -1)
        return y if norm is None else norm(y)

    def _joined(self, image: Array, text: Array) -> Array:
        return jnp.concatenate([text, image] if self.text_first else [image, text], axis=1)

    def _projected(self, x: Array) -> Array:
        return x if self.to_out is None else self.to_out[0](x)


class JointBlock(nnx.Module):
    """Joint attention and a feed-forward layer of each stream, modulated and gated.

    Args:
        width, heads, qk_norm, text_first: see `JointAttention`.
        dual: whether the image tokens attend to themselves besides (SD3.5-medium).
        last: whether text is only read and ends here (`context_pre_only`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        dual: bool = False,
        last: bool = False,
        text_first: bool = False,
        **kw: Any,
    ):
        self.norm1 = AdaLayerNorm(width, 9 if dual else 6, **kw)
        self.norm1_context: Any = (
            AdaLayerNormContinuous(width, **kw) if last else AdaLayerNorm(width, 6, **kw)
        )
        text = "read" if last else "joint"
        self.attn = JointAttention(
            width, heads, qk_norm=qk_norm, text=text, text_first=text_first, **kw
        )
        self.attn2 = JointAttention(width, heads, qk_norm=qk_norm, **kw) if dual else None
        self.ff = FeedForward(width, **kw)
        self.ff_context = None if last else FeedForward(width, **kw)
        self.last, self.dtype = last, kw["dtype"]

    def __call__(
        self, x: Array, context: Array, conditioning: Array, rotate: Rotate | None = None
    ) -> tuple[Array, Array]:
        """Map image tokens [B, N, C] and text tokens [B, L, C] to the same.

        Args:
            conditioning: the SiLU of the conditioning vector, [B, C].
            rotate: see `JointAttention`.
        """
        shift, scale, gate, *own = self.norm1(conditioning)
        text_gate: Any = None
        if self.last:
            text_in = self.norm1_context(context, conditioning)
        else:
            text_shift, text_scale, text_gate, *text_own = self.norm1_context(conditioning)
            text_in = modulated(context, text_shift, text_scale, self.dtype)
        out, text_out = self.attn(modulated(x, shift, scale, self.dtype), text_in, rotate)
        y = activation(x + gate * out)
        if self.attn2 is not None:
            # The second attention reads the block's input, as the first.
            shift2, scale2, gate2 = own[3:]
            out, _ = self.attn2(modulated(x, shift2, scale2, self.dtype))
            y = activation(y + gate2 * out)
        y = self._fed(self.ff, y, own[:3])
        if self.last:
            return capture.output(self, y), context
        context = activation(context + text_gate * text_out)
        context = self._fed(self.ff_context, context, text_own)
        return capture.output(self, y, context), context

    def _fed(self, ff: Any, x: Array, modulations: list[Array]) -> Array:
        """The residual around a feed-forward layer, of [B, L, C]."""
        shift, scale, gate = modulations
        return activation(x + gate * ff(modulated(x, shift, scale, self.dtype)))


def conditioned(vector: Array) -> Array:
    """Return the SiLU of the conditioning vector [B, C], the input of every modulation."""
    return activation(silu(vector))
