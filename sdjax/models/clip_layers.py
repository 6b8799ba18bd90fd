"""The transformer layers of CLIP's text encoder and of its vision tower.

Names and initialisation are those of transformers' modeling_clip.py and OpenAI's clip/model.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models.attention import attention
from sdjax.models.layers import Array, LayerNorm, dropout, gelu, normal_init, quick_gelu
from sdjax.models.placement import activation
from sdjax.models.products import Linear

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
# Far beyond any CLIP: the largest has 32 layers and a width of 1,280.
BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 65_536),
    "projection_dim": (1, 65_536),
    "layer_norm_eps": (1e-30, 1),
}


class TransformerConfig(Protocol):
    """The fields of a config that the layers read."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def attention_dropout(self) -> float: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def causal(self) -> bool:
        """Whether a token attends to itself and earlier tokens only."""


class Transformer(nnx.Module):
    """The layers, in a list named as in transformers."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        self.layers = nnx.List([Layer(config, **kw) for _ in range(config.num_hidden_layers)])


class Layer(nnx.Module):
    """Attention and MLP; each normalises its input and is added to it. [B, L, D] to the same."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.self_attn = SelfAttention(config, **kw)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.mlp = MLP(config, **kw)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        x = activation(x + self.self_attn(self.layer_norm1(x), key))
        return activation(x + self.mlp(self.layer_norm2(x)))


class SelfAttention(nnx.Module):
    """Multi-head attention, causal if the config is. [B, L, D] to the same."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        self.q_proj, self.k_proj, self.v_proj = (
            dense(config, config.hidden_size, config.hidden_size, **kw) for _ in range(3)
        )
        self.out_proj = dense(config, config.hidden_size, config.hidden_size, residual=True, **kw)
        self.heads, self.rate = config.num_attention_heads, config.attention_dropout
        self.causal = config.causal

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        shape = (*x.shape[:2], self.heads, -1)  # [B, L, heads, D / heads]
        q, k, v = (project(x).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if key is None or self.rate == 0:
            out = attention(q, k, v, causal=self.causal)
        else:
            out = _attention_with_dropout(q, k, v, self.rate, key, causal=self.causal)
        return self.out_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    """Two dense layers with the config's activation between them. [B, L, D] to the same."""

    def __init__(self, config: TransformerConfig, **kw: Any):
        self.fc1 = dense(
            config, config.hidden_size, config.intermediate_size,
            std=(2 * config.hidden_size) ** -0.5, **kw,
        )  # fmt: skip
        self.fc2 = dense(config, config.intermediate_size, config.hidden_size, residual=True, **kw)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


def dense(
    config: TransformerConfig,
    features_in: int,
    features_out: int,
    *,
    std: float | None = None,
    residual: bool = False,
    **kw: Any,
) -> Linear:
    """A dense layer with the initialisation of OpenAI CLIP (clip/model.py, initialize_parameters).

    Its standard deviation is width^-1/2. For layers that add to the residual stream (two a block)
    it is divided by the square root of their number.
    """
    std = config.hidden_size**-0.5 if std is None else std
    if residual:
        std *= (2 * config.num_hidden_layers) ** -0.5
    return Linear(features_in, features_out, kernel_init=normal_init(std), **kw)


def _attention_with_dropout(
    q: Array, k: Array, v: Array, rate: float, key: Array, *, causal: bool
) -> Array:
    """Attention with dropout of its weights, which kernels do not have: [B, L, heads, D]."""
    logits = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32)
    logits *= q.shape[-1] ** -0.5
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    weights = dropout(jax.nn.softmax(logits), rate, key).astype(v.dtype)  # [B, heads, L, L]
    return jnp.einsum("bhlm,bmhd->blhd", weights, v).astype(q.dtype)
