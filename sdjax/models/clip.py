"""CLIP's text encoder: OpenAI's CLIP-L as in SD1, OpenCLIP-H as in SD2, OpenCLIP-bigG in SDXL.

A causal pre-norm transformer over the tokens. Padding is not masked: the checkpoints expect that.
Attribute names are those of transformers 5 (models/clip/modeling_clip.py, `CLIPTextModel`
and `CLIPTextModelWithProjection`), fields those of its `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from sdjax.models.clip_layers import ACTIVATIONS, BOUNDS, Transformer, dense
from sdjax.models.config import check, check_bounds, json_values, read_config
from sdjax.models.layers import (
    Array,
    Dtype,
    LayerNorm,
    check_remat,
    fold_key,
    normal_init,
    rematerialised,
)
from sdjax.models.placement import activation
from sdjax.models.products import Embed

# Standard deviation of new token embeddings; positions take half, as in CLIP. CLIP's own value is
# 0.02, but the layers add values of about 1. The state of a word would then depend less on the word
# than on the caption before it (docs/notes/first_pictures.md).
TOKEN_STD = 0.5

# Defaults of transformers' CLIPTextConfig that differ from SD1.5's encoder.
_ABSENT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
# Initialisation of new weights, dropout that CLIP does not have, and settings of software.
_IGNORED = frozenset(
    "initializer_range initializer_factor dropout transformers_version torch_dtype "
    "dtype use_cache return_dict torchscript tie_word_embeddings output_attentions "
    "output_hidden_states _attn_implementation_autoset _commit_hash".split()
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "architectures": ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel", None),
    "model_type": ("clip_text_model",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
_TEXT_BOUNDS: dict[str, tuple[float, float]] = {
    **BOUNDS,
    "vocab_size": (1, 2_097_152),
    "max_position_embeddings": (1, 65_536),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (-1, 2_097_152)),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The shape of a CLIP text encoder; the defaults are SD1.5's.

    hidden_act: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP; the exact one).
    num_hidden_layers: SD2 takes the last but one of OpenCLIP-H's 24 layers: 23 here.
    eos_token_id: the token whose state `pooled` returns. 2 means the highest id of the caption, the
      convention of checkpoints with a wrong id in their config; where a tokenizer has added tokens,
      whose ids are higher, `bind` puts its EOS in this place.
    projection_dim: width of the pooled caption, for a `CLIPTextModelWithProjection`; None for a
      `CLIPTextModel`, whose files have this field although they lack the projection.
    bos_token_id, pad_token_id: for readers of the written file; the network does not use them.

    Raises ValueError that names a field, its value and the expected values.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1
    projection_dim: int | None = None
    causal: ClassVar[bool] = True
    # Fields that change nothing of what is encoded, outside of training.
    inert: ClassVar[frozenset[str]] = frozenset(
        {"attention_dropout", "bos_token_id", "pad_token_id"}
    )

    def __post_init__(self) -> None:
        check_bounds(self, _TEXT_BOUNDS)
        check(
            self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a divisor of hidden_size = {self.hidden_size}",
        )
        check(
            self.hidden_act in ACTIVATIONS, "hidden_act", self.hidden_act, " or ".join(ACTIVATIONS)
        )
        check(
            0 <= self.attention_dropout < 1, "attention_dropout", self.attention_dropout, "[0, 1)"
        )

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "config.json"
    ) -> tuple[CLIPTextConfig, list[str]]:
        """Read a transformers `config.json`; return the config and the names of ignored fields.

        Raises:
            ConfigError: some fields are unknown or not supported; the message lists them.
        """
        values, absent = dict(data), dict(_ABSENT)
        if has_projection(data):
            absent["projection_dim"] = 512
        else:
            values.pop("projection_dim", None)
        config, ignored = read_config(
            cls,
            values,
            where=where,
            ignored=_IGNORED,
            neutral=_NEUTRAL,
            absent=absent,
            null={"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1},
        )
        return config, sorted({*ignored, *(data.keys() - values.keys())})

    def to_json(self) -> dict[str, Any]:
        """The config.json for transformers 4 and 5, which load the class of `architectures`."""
        return {
            "architectures": [self.architecture],
            "model_type": "clip_text_model",
            **json_values(self),
            "projection_dim": self.projection_dim or self.hidden_size,
        }

    @property
    def architecture(self) -> str:
        """The class of transformers that has this network."""
        return "CLIPTextModelWithProjection" if self.projection_dim else "CLIPTextModel"


def has_projection(data: Mapping[str, Any]) -> bool:
    """Whether a text encoder's config.json is that of a `CLIPTextModelWithProjection`."""
    classes = data.get("architectures")
    return isinstance(classes, list | tuple) and "CLIPTextModelWithProjection" in classes


class CLIPText(nnx.Module):
    """The text encoder: tokens [B, L] to context [B, L, hidden_size]."""

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        self.config, self.remat = config, remat
        kw = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Transformer(config, **kw)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kw)
        self.text_projection = (
            dense(config, config.hidden_size, config.projection_dim, bias=False, **kw)
            if config.projection_dim
            else None
        )

    def __call__(self, tokens: Array, *, key: Array | None = None) -> Array:
        """The last hidden state after the final norm, float32 [B, L, D].

        Args:
            tokens: [B, L] int32, L up to `max_position_embeddings`.
            key: of dropout in the attention; None for none.
        """
        return self.normed(self.hidden_states(tokens, key=key)[-1])

    def penultimate(self, tokens: Array, *, key: Array | None = None) -> tuple[Array, Array | None]:
        """The two outputs of an encoder that SDXL uses, in float32.

        Returns:
            The last but one hidden state, which no norm follows, [B, L, D]; and the projection of
            the normed last state at each caption's end, [B, projection_dim], or None.
        """
        states = self.hidden_states(tokens, key=key)
        context = states[-2].astype(jnp.float32)
        if self.text_projection is None:
            return context, None
        pooled = self.pooled(self.final_layer_norm(states[-1]), tokens)
        return context, self.text_projection(pooled).astype(jnp.float32)

    def hidden_states(self, tokens: Array, *, key: Array | None = None) -> list[Array]:
        """The embeddings and the output of every layer, each [B, L, D], without the final norm."""
        x = self.embeddings(tokens)
        states = [x]
        for i, layer in enumerate(self.encoder.layers):
            # With "full" too, one layer is recomputed at once: it is the largest unit here.
            level = "stage" if self.remat == "full" else "block"
            x = rematerialised(layer, self.remat, level=level)(x, fold_key(key, i))
            states.append(x)
        return states

    def normed(self, hidden: Array) -> Array:
        """The states `hidden` [B, L, D] after the final norm, in float32."""
        return self.final_layer_norm(hidden).astype(jnp.float32)

    def pooled(self, hidden: Array, tokens: Array) -> Array:
        """The state at the first EOS of each caption, [B, D].

        hidden: [B, L, D]; tokens: [B, L].
        """
        eos = self.config.eos_token_id
        # Old configs have 2, which is not the id of EOS. The highest id of a caption is EOS.
        at = tokens.argmax(-1) if eos == 2 else (tokens == eos).argmax(-1)
        return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]


class Embeddings(nnx.Module):
    """The sum of a vector for each token and one for its position: tokens [B, L] to [B, L, D]."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        width = config.hidden_size
        self.token_embedding = Embed(
            config.vocab_size, width, embedding_init=normal_init(TOKEN_STD), **kw
        )
        self.position_embedding = Embed(
            config.max_position_embeddings,
            width,
            embedding_init=normal_init(TOKEN_STD / 2),
            **kw,
        )
        self.length = config.max_position_embeddings

    def __call__(self, tokens: Array) -> Array:
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(
                f"tokens {tokens.shape}: expected at most max_position_embeddings = {self.length} "
                "in a row"
            )
        x = self.token_embedding(tokens)
        # Broadcast before the cast, so that gradients are summed in the table's dtype.
        rows = self.position_embedding.embedding[...][:length]
        return activation(x + jnp.broadcast_to(rows, x.shape).astype(x.dtype))
