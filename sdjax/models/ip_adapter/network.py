"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721) for Stable Diffusion 1, 2 and XL.

A picture's features become some tokens, and each cross-attention of a UNet reads them by keys and
values of their own beside those of the text. They depend on neither noise nor timestep: one run
serves all steps of drawing. Attribute names are those of its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models import capture
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.ip_adapter.resampler import Resampler
from sdjax.models.layers import Array, Dtype, LayerNorm, linear
from sdjax.models.placement import activation

Shown = tuple[tuple[Array, Array], ...]  # (keys, values) [B, T, C] of each cross-attention


class ImageProjection(nnx.Module):
    """Features of pictures [B, E] to tokens [B, T, D]."""

    def __init__(self, config: IPAdapterConfig, **kw: Any):
        width = config.cross_attention_dim
        self.proj = linear(config.embedding_dim, config.tokens * width, **kw)
        self.norm = LayerNorm(width, **kw)

    def __call__(self, embedding: Array) -> Array:
        width = self.norm.scale.shape[0]
        return activation(self.norm(self.proj(embedding).reshape(len(embedding), -1, width)))


class ImageAttention(nnx.Module):
    """The keys and values of one cross-attention."""

    def __init__(self, width_in: int, width: int, **kw: Any):
        self.to_k_ip = linear(width_in, width, bias=False, **kw)
        self.to_v_ip = linear(width_in, width, bias=False, **kw)

    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        keys, values = self.to_k_ip(tokens), self.to_v_ip(tokens)
        return capture.output(self, keys, values), values


class IPAdapter(nnx.Module):
    """Says what the cross-attention of a UNet sees of a picture.

    Args: see `UNet`; remat is without effect, as nothing of it is large.
    """

    def __init__(
        self,
        config: IPAdapterConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.image_proj: ImageProjection | Resampler = (
            Resampler(config, **kw) if config.resampler_layers else ImageProjection(config, **kw)
        )
        self.ip_adapter = nnx.List(
            ImageAttention(config.cross_attention_dim, width, **kw) for width in config.widths
        )
        self.config, self.dtype = config, dtype

    def __call__(self, embedding: Array) -> Shown:
        """Return keys and values for each cross-attention, in the order of `config.widths`.

        Args:
            embedding: the projected features of a CLIP image tower, [B, embedding_dim]; zeros stand
                for no picture. With a resampler those of its patches, [B, N, embedding_dim]; those
                of a picture of zeros stand for none.
        """
        tokens = self.image_proj(embedding.astype(self.dtype))
        return tuple(layer(tokens) for layer in self.ip_adapter)


def weighed(shown: Shown, weight: Array | float) -> Shown:
    """Return what is shown with a weight: a number, or [B, 1, 1]."""
    return tuple((keys, (values * weight).astype(values.dtype)) for keys, values in shown)


def together(each: Sequence[Shown]) -> tuple[Shown, ...]:
    """Return what several IP-Adapters show, for each cross-attention; see `UNet.__call__`."""
    return tuple(zip(*each, strict=True))
