"""CLIP's image tower: a vision transformer that projects its class token to the space of the texts.

Attribute names are those of transformers 5 (models/clip/modeling_clip.py, `CLIPVisionModel` and
`CLIPVisionModelWithProjection`), fields those of the `vision_config` in its `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from sdjax.models.clip import CLIPTextConfig
from sdjax.models.clip_layers import ACTIVATIONS, BOUNDS, Transformer
from sdjax.models.config import ConfigError, check, check_bounds, read_config
from sdjax.models.layers import Array, LayerNorm, check_remat, normal_init, rematerialised
from sdjax.models.products import Conv, Embed, Linear
from sdjax.system.untrusted import brief

# Fields that transformers 4 writes into every config, for generation and labels among others
# (configuration_utils.py, PretrainedConfig). CLIP reads none of them.
_SOFTWARE = frozenset(
    "bad_words_ids begin_suppress_tokens decoder_start_token_id "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id "
    "gradient_checkpointing id2label label2id length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_scores prefix problem_type remove_invalid_values "
    "repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings "
    "tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p "
    "use_bfloat16 use_cache dtype "
    "bos_token_id eos_token_id pad_token_id".split()
)
_IGNORED = frozenset({"initializer_range", "initializer_factor", "dropout"}) | _SOFTWARE
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "architectures": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel", None),
    "model_type": ("clip_vision_model",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The shape of a CLIP image tower; the defaults are transformers', for OpenAI's ViT-B/32.

    image_size: side of the square pictures; patch_size: of the patches they are cut into.
    projection_dim: length of a picture's features.

    Raises ValueError that names a field, its value and the expected values.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bounds(self, {**BOUNDS, "image_size": (1, 4096), "patch_size": (1, 4096)})
        width, heads = self.hidden_size, self.num_attention_heads
        check(width % heads == 0, "num_attention_heads", heads, f"a divisor of {width}")
        check(self.patch_size <= self.image_size, "patch_size", self.patch_size, "<= image_size")
        check(self.num_channels == 3, "num_channels", self.num_channels, "3")
        acts = " or ".join(ACTIVATIONS)
        check(self.hidden_act in ACTIVATIONS, "hidden_act", self.hidden_act, acts)
        dropout = self.attention_dropout
        check(0 <= dropout < 1, "attention_dropout", dropout, "a rate in [0, 1)")

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "image_encoder/config.json"
    ) -> tuple[CLIPVisionConfig, list[str]]:
        """(config, ignored fields) of a tower's own config.json; see `config.read_config`."""
        return read_config(cls, data, where=where, ignored=_IGNORED, neutral=_NEUTRAL)


def read_clip_config(
    data: Mapping[str, Any], where: str = "config.json"
) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """Both towers' configs from a `CLIPModel`'s config.json, as transformers 4 or 5 writes it.

    Raises:
        ConfigError: it is another model's, or has unknown fields, which the message lists.
    """
    kind = data.get("model_type")
    if kind != "clip":
        raise ConfigError(
            f"{where}: model_type is {brief(kind)}; expected 'clip', a CLIPModel with both towers, "
            "as openai/clip-vit-large-patch14 is on huggingface.co"
        )
    parts: dict[str, dict[str, Any]] = {}
    for name in ("text_config", "vision_config"):
        # Files from before 2023 have "..._dict", which replaces the other group, defaults included
        # (CLIPConfig.__post_init__).
        chosen = data.get(f"{name}_dict")
        chosen = (data.get(name) or {}) if chosen is None else chosen
        if not isinstance(chosen, Mapping):
            raise ConfigError(f"{where}: {name} = {brief(chosen)}: expected a group of fields")
        # The width of both projections is a field of the whole model.
        parts[name] = {**chosen, "projection_dim": data.get("projection_dim", 512)}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = {k: v for k, v in parts["text_config"].items() if k in ids or k not in _SOFTWARE}
    text |= {"architectures": ["CLIPTextModelWithProjection"]}
    vision, _ = read_config(
        CLIPVisionConfig,
        parts["vision_config"],
        where=f"{where}: vision_config",
        ignored=_IGNORED,
        neutral=_NEUTRAL,
    )
    return CLIPTextConfig.from_json(text, where=f"{where}: text_config")[0], vision


class CLIPVision(nnx.Module):
    """Pictures [B, S, S, 3] to features [B, projection_dim], as `CLIPVisionModelWithProjection`."""

    def __init__(self, config: CLIPVisionConfig, *, remat: str = "none", **kw: Any):
        check_remat(remat)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.remat = remat
        self.embeddings = PatchEmbeddings(config, **kw)
        self.pre_layrnorm = LayerNorm(width, eps=eps, **kw)  # spelt like this in every checkpoint
        self.encoder = Transformer(config, **kw)
        self.post_layernorm = LayerNorm(width, eps=eps, **kw)
        self.visual_projection = Linear(
            width, config.projection_dim, bias=False, kernel_init=normal_init(width**-0.5), **kw
        )

    def __call__(self, pixels: Array) -> Array:
        """The features of pictures, float32 [B, projection_dim].

        Args:
            pixels: [B, image_size, image_size, 3], normalised.
        """
        x = self._run(pixels, len(self.encoder.layers))
        return self.visual_projection(self.post_layernorm(x[:, 0])).astype(jnp.float32)

    def patches(self, pixels: Array) -> Array:
        """The output of the last layer but one, for the class token and the patches, [B, 1 + N, D].

        transformers' `hidden_states[-2]`; arguments as above.
        """
        return self._run(pixels, len(self.encoder.layers) - 1)

    def _run(self, pixels: Array, layers: int) -> Array:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers[:layers]:
            x = rematerialised(layer, self.remat, level="block")(x)
        return x


class PatchEmbeddings(nnx.Module):
    """A class token, then the patches row by row: [B, S, S, 3] to [B, 1 + patches, D]."""

    def __init__(self, config: CLIPVisionConfig, **kw: Any):
        width, patch = config.hidden_size, config.patch_size
        init = normal_init(width**-0.5)
        self.patches = config.image_size // patch
        self.size = config.image_size
        self.class_embedding = nnx.Param(init(kw["rngs"].params(), (width,)))
        self.patch_embedding = Conv(
            3,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding=((0, 0), (0, 0)),
            bias=False,
            kernel_init=init,
            **kw,
        )
        self.position_embedding = Embed(1 + self.patches**2, width, embedding_init=init, **kw)

    def __call__(self, pixels: Array) -> Array:
        if pixels.shape[1:] != (self.size, self.size, 3):
            raise ValueError(f"pixels {pixels.shape}: expected [B, {self.size}, {self.size}, 3]")
        x = self.patch_embedding(pixels)  # [B, S/P, S/P, D]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))[None]
