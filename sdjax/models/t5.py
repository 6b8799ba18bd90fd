"""The encoder of T5 v1.1, of any size; SD3 and FLUX take the XXL one's last state.

A pre-norm transformer without biases. Positions are a bias of the attention's logits, learned for
buckets of distances, held by the first block and shared by all. Padding is not masked unless the
caller says so: the checkpoints of SD3 and FLUX expect that. Attribute names are those of
transformers 5 (models/t5/modeling_t5.py, `T5EncoderModel`), fields those of its `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models.attention import attention
from sdjax.models.config import check, check_bounds, json_values, read_config
from sdjax.models.layers import Array, Dtype, RMSNorm, check_remat, gelu_tanh, normal_init
from sdjax.models.placement import activation
from sdjax.models.products import Embed, Linear
from sdjax.models.stacking import Blocks

GATED, PLAIN = "gated-gelu", "relu"  # of v1.1, and of the first T5

# Defaults of transformers' T5Config that differ from the XXL encoder of v1.1.
_ABSENT = {
    "d_model": 512,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "feed_forward_proj": PLAIN,
}
# The decoder's, initialisation, dropout (v1.1 was trained without), and settings of software. Only
# the decoder's output depends on tied embeddings.
_IGNORED = frozenset(
    "num_decoder_layers decoder_start_token_id bos_token_id tie_word_embeddings "
    "scale_decoder_outputs is_encoder_decoder dropout_rate classifier_dropout "
    "initializer_factor initializer_range n_positions output_past task_specific_params use_cache "
    "transformers_version torch_dtype dtype return_dict torchscript output_attentions "
    "output_hidden_states".split()
)
_BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2_097_152),
    "d_model": (1, 65_536),
    "d_kv": (1, 65_536),
    "d_ff": (1, 1_048_576),
    "num_layers": (1, 256),
    "num_heads": (1, 65_536),
    "relative_attention_num_buckets": (4, 65_536),
    "relative_attention_max_distance": (2, 1_048_576),
    "layer_norm_epsilon": (1e-30, 1),
    **dict.fromkeys(("pad_token_id", "eos_token_id"), (-1, 2_097_152)),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5 encoder; the defaults are those of T5 v1.1 XXL.

    d_kv: width of a head; heads need not fill d_model.
    feed_forward_proj: "gated-gelu" (v1.1; the tanh approximation) or "relu" (the first T5).
    relative_attention_num_buckets: of distances; half for each direction.
    relative_attention_max_distance: from here on, all distances share the last bucket.
    pad_token_id, eos_token_id: for tokenizers; the network does not use them.

    Raises ValueError that names a field, its value and the expected values.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = GATED
    pad_token_id: int = 0
    eos_token_id: int = 1
    inert: ClassVar[frozenset[str]] = frozenset({"pad_token_id", "eos_token_id"})

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        buckets = self.relative_attention_num_buckets
        check(buckets % 2 == 0, "relative_attention_num_buckets", buckets, "an even number")
        distance = self.relative_attention_max_distance
        expected = f"more than a quarter of relative_attention_num_buckets = {buckets}"
        check(distance > buckets // 4, "relative_attention_max_distance", distance, expected)
        proj = self.feed_forward_proj
        check(proj in (GATED, PLAIN), "feed_forward_proj", proj, f"{GATED} or {PLAIN}")

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "config.json"
    ) -> tuple[T5Config, list[str]]:
        """Read a transformers `config.json`; return the config and the names of ignored fields.

        Raises:
            ConfigError: some fields are unknown or not supported; the message lists them.
        """
        gated = data.get("feed_forward_proj", PLAIN) == GATED
        neutral: dict[str, tuple[Any, ...]] = {
            "architectures": (
                "T5EncoderModel", "T5Model", "T5ForConditionalGeneration", "T5WithLMHeadModel",
                None,
            ),
            "model_type": ("t5",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "chunk_size_feed_forward": (0,),
            "pruned_heads": ({},),
            "quantization_config": (None,),
            # transformers derives both from feed_forward_proj.
            "dense_act_fn": ("gelu_new" if gated else "relu",),
            "is_gated_act": (gated,),
        }  # fmt: skip
        return read_config(
            cls,
            data,
            where=where,
            ignored=_IGNORED,
            neutral=neutral,
            absent=_ABSENT,
            null={"pad_token_id": 0, "eos_token_id": 1},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json for transformers 4 and 5, which load `architecture`."""
        return {
            "architectures": [self.architecture],
            "model_type": "t5",
            **json_values(self),
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
        }

    @property
    def architecture(self) -> str:
        """The class of transformers that has this network."""
        return "T5EncoderModel"


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each key's distance from each query, [L, L] int32.

    The buckets are those of `T5Attention._relative_position_bucket`. They are computed here in
    float32, as there: some distances lie on a boundary, where an accelerator's logarithm could fall
    to either side.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    ratio = np.maximum(size, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return (np.where(size < exact, size, far) + half * (distance > 0)).astype(np.int32)


class T5Encoder(nnx.Module):
    """The encoder: tokens [B, L] to states [B, L, d_model].

    Args:
        config: the shape.
        dtype: of matrix products. The residual stream is float32, whose values grow to 1e5 and
            more.
        param_dtype: of the parameters.
        remat: see `layers.rematerialised`.
        rngs: draws the parameters; not kept.

    Raises:
        ValueError: `dtype` is float16.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        if jnp.dtype(dtype) == jnp.float16:
            raise ValueError(
                "dtype = float16: T5's feed-forward layers exceed the largest float16, 65,504, and "
                "its states become Inf; expected bfloat16 or float32"
            )
        self.config, self.remat = config, remat
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shared = Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=normal_init(1.0),
            **{**kw, "dtype": jnp.float32},
        )
        self.encoder = Stack(config, **kw)

    def __call__(self, tokens: Array, *, mask: Array | None = None) -> Array:
        """Return the last state after the final norm, float32 [B, L, d_model].

        Args:
            tokens: [B, L] int32, of any length.
            mask: [B, L], 0 at tokens that no token attends to; None attends to all, padding
                included, as SD3 and FLUX do.
        """
        return self.encoder(activation(self.shared(tokens)), mask, remat=self.remat)


class Stack(nnx.Module):
    """The blocks and the final norm: [B, L, D] to the same, float32.

    The first block is a run of its own, because it holds the table of positions.
    """

    def __init__(self, config: T5Config, **kw: Any):
        rngs = kw.pop("rngs")
        runs: list[Any] = [(lambda rngs: Block(config, first=True, **kw, rngs=rngs), 1)]
        if config.num_layers > 1:
            more = config.num_layers - 1
            runs.append((lambda rngs: Block(config, first=False, **kw, rngs=rngs), more))
        self.block = Blocks(*runs, rngs=rngs)
        self.final_layer_norm = RMSNorm(
            config.d_model, eps=config.layer_norm_epsilon, **{**kw, "dtype": jnp.float32}
        )
        self.config = config

    def __call__(self, x: Array, mask: Array | None, *, remat: str) -> Array:
        config, length = self.config, x.shape[1]
        buckets = relative_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )

        def first(block: Block, x: Array, _: None) -> tuple[Array, Array]:
            attend: Any = block.layer[0]
            bias = attend.SelfAttention.bias(buckets)
            if mask is not None:
                hidden = jnp.where(mask[:, None, None, :], 0.0, jnp.finfo(jnp.float32).min)
                bias = bias + hidden  # [B, heads, L, L]
            return block(x, bias), bias

        x, biases = self.block.scan(first, x, remat=remat)
        bias = biases[0]
        for run in range(1, len(self.block.runs)):
            x, _ = self.block.scan(
                lambda block, x, _: (block(x, bias), None), x, run=run, remat=remat
            )
        return self.final_layer_norm(x)


class Block(nnx.Module):
    """Self-attention and a feed-forward layer; each normalises its input and is added to it."""

    def __init__(self, config: T5Config, *, first: bool, **kw: Any):
        self.layer = nnx.List(
            [AttentionLayer(config, first=first, **kw), FeedForwardLayer(config, **kw)]
        )

    def __call__(self, x: Array, bias: Array) -> Array:
        for layer in self.layer:
            x = activation(x + layer(x, bias).astype(x.dtype))
        return x


class AttentionLayer(nnx.Module):
    """A norm and self-attention. [B, L, D] to the same."""

    def __init__(self, config: T5Config, *, first: bool, **kw: Any):
        self.SelfAttention = SelfAttention(config, first=first, **kw)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, **kw)

    def __call__(self, x: Array, bias: Array) -> Array:
        return self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nnx.Module):
    """A norm and two dense layers, the first of them gated in v1.1. [B, L, D] to the same."""

    def __init__(self, config: T5Config, **kw: Any):
        gated = config.feed_forward_proj == GATED
        self.DenseReluDense = (GatedDense if gated else PlainDense)(config, **kw)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, **kw)

    def __call__(self, x: Array, bias: Array) -> Array:
        return self.DenseReluDense(self.layer_norm(x))


class SelfAttention(nnx.Module):
    """Multi-head attention with a bias of its logits, which are not divided by sqrt(d_kv).

    Initialisation makes up for the missing division (T5PreTrainedModel._init_weights).
    """

    def __init__(self, config: T5Config, *, first: bool, **kw: Any):
        inner, width = config.num_heads * config.d_kv, config.d_model
        self.q = _dense(width, inner, (width * config.d_kv) ** -0.5, **kw)
        self.k = _dense(width, inner, width**-0.5, **kw)
        self.v = _dense(width, inner, width**-0.5, **kw)
        self.o = _dense(inner, width, inner**-0.5, **kw)
        self.relative_attention_bias = (
            Embed(
                config.relative_attention_num_buckets,
                config.num_heads,
                embedding_init=normal_init(width**-0.5),
                **{**kw, "dtype": jnp.float32},
            )
            if first
            else None
        )
        self.heads = config.num_heads

    def bias(self, buckets: np.ndarray) -> Array:
        """Return the bias of the logits, [1, heads, L, L] float32, from buckets [L, L]."""
        assert self.relative_attention_bias is not None
        return jnp.moveaxis(self.relative_attention_bias(jnp.asarray(buckets)), 2, 0)[None]

    def __call__(self, x: Array, bias: Array) -> Array:
        shape = (*x.shape[:2], self.heads, -1)  # [B, L, heads, d_kv]
        q, k, v = (project(x).reshape(shape) for project in (self.q, self.k, self.v))
        out = attention(q, k, v, bias=bias, scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1))


class GatedDense(nnx.Module):
    """Two dense layers of which the first is gelu_tanh(x wi_0) * (x wi_1)."""

    def __init__(self, config: T5Config, **kw: Any):
        std = config.d_model**-0.5
        self.wi_0 = _dense(config.d_model, config.d_ff, std, **kw)
        self.wi_1 = _dense(config.d_model, config.d_ff, std, **kw)
        self.wo = _dense(config.d_ff, config.d_model, config.d_ff**-0.5, **kw)

    def __call__(self, x: Array) -> Array:
        return self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))


class PlainDense(nnx.Module):
    """Two dense layers with ReLU between."""

    def __init__(self, config: T5Config, **kw: Any):
        self.wi = _dense(config.d_model, config.d_ff, config.d_model**-0.5, **kw)
        self.wo = _dense(config.d_ff, config.d_model, config.d_ff**-0.5, **kw)

    def __call__(self, x: Array) -> Array:
        return self.wo(jax.nn.relu(self.wi(x)))


def _dense(features_in: int, features_out: int, std: float, **kw: Any) -> Linear:
    return Linear(features_in, features_out, bias=False, kernel_init=normal_init(std), **kw)
