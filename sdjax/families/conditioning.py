"""What the UNet is told besides the noisy latents: the text, and for SDXL the picture's sizes.

One function makes it, for the loss, for drawing and for encoding ahead, so that a caption that was
dropped in training and the "no caption" of guidance are the same by construction.

SD1 and SD2 take the normed last state of one text encoder. SDXL takes the last but one states of
two, side by side, the projected end of the caption from the second ("pooled"), and six numbers, the
time ids (Podell et al. 2023, sections 2.2; diffusers pipeline_stable_diffusion_xl.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.losses import drop_captions
from sdjax.errors import UserError
from sdjax.families.model import ModelConfig
from sdjax.models import weights
from sdjax.models.clip import CLIPText
from sdjax.models.params import component, prefixed

# The field of a batch that each text encoder reads.
TOKENS = {"text_encoder": "tokens", "text_encoder_2": "tokens_2"}

Context = jax.Array | dict[str, jax.Array]


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    context_length: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens int32 [len(texts), context_length]."""


class BlankTokenizer:
    """Stands in for a tokenizer where only shapes matter: no vocabulary has to be read or made."""

    def __init__(self, context_length: int):
        self.context_length = context_length

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Zeros int32 [len(texts), context_length]."""
        return np.zeros((len(texts), self.context_length), np.int32)


def blank_tokenizers(model: ModelConfig) -> dict[str, Encoder]:
    """{field: tokenizer} for shapes alone."""
    return {
        TOKENS[name]: BlankTokenizer(encoder.max_position_embeddings)
        for name, encoder in model.text_encoders.items()
    }


def encode_text(tokenizers: Mapping[str, Encoder], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """{field: tokens int32 [len(texts), L]}."""
    return {field: tokenizer.encode(texts) for field, tokenizer in tokenizers.items()}


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """Text encoders, bound to their configuration.

    graphs: of the encoders, by name.
    params: their parameters, abstract.
    null: {field: tokens [L]} of the empty caption.
    time_ids: how many the UNet takes: 0 (SD1, SD2), 5 (refiner) or 6 (SDXL).
    zero_empty: an empty caption is zeros, and not what the encoders make of "".
    scores: aesthetic scores that a refiner is told, of what is wanted and of what is not.
    """

    graphs: Mapping[str, Any]
    params: Mapping[str, jax.ShapeDtypeStruct]
    null: Mapping[str, np.ndarray]
    time_ids: int
    zero_empty: bool
    scores: tuple[float, float]

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        batch: Mapping[str, jax.Array],
        *,
        target: tuple[int, int],
        negative: bool = False,
        key: jax.Array | None = None,
    ) -> Context:
        """The context of `UNet.__call__`.

        Args:
            params: `{path: array}` with those of the text encoders.
            batch: tokens int32 [B, L] of each encoder, or what `embed` made of them; for SDXL also
                "size" int32 [B, 4] (original height and width, top and left of the crop), or by
                default an original of the target's size, whole.
            target: height and width of the picture, in pixels.
            negative: what guidance leads away from; a refiner is told of a bad picture.
            key: of dropout in the encoders.
        """
        if "context" in batch:
            text: Context = {name: batch[name] for name in ("context", "pooled") if name in batch}
            text = text if self.time_ids else batch["context"]
        else:
            text = self.embed(params, batch, key=key)
        if not isinstance(text, dict):
            return text
        count = len(text["pooled"])
        size = batch.get("size", jnp.asarray([[*target, 0, 0]] * count))
        last = target if self.time_ids == 6 else (self.scores[negative],)
        rows = jnp.broadcast_to(jnp.asarray(last, jnp.float32), (count, len(last)))
        ids = jnp.concatenate([jnp.asarray(size, jnp.float32), rows], axis=1)
        return {**text, "time_ids": ids}

    def embed(
        self,
        params: Mapping[str, jax.Array],
        tokens: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> Context:
        """The part of the context that comes from the text alone: [B, L, D] float32, for SDXL
        {"context": [B, L, D], "pooled": [B, P]}."""
        fields = {name: jnp.asarray(tokens[TOKENS[name]]) for name in self.graphs}
        if not self.time_ids:
            ((name, graph),) = self.graphs.items()
            return weights.merge(graph, component(params, name))(fields[name], key=key)
        states, pooled = [], None
        for i, (name, graph) in enumerate(self.graphs.items()):
            encoder = weights.merge(graph, component(params, name))
            own = key if key is None or i == 0 else jax.random.fold_in(key, 2**16 + i)
            state, projected = encoder.penultimate(fields[name], key=own)
            states.append(state)
            pooled = projected if projected is not None else pooled
        assert pooled is not None
        text = {"context": jnp.concatenate(states, axis=-1), "pooled": pooled}
        if self.zero_empty:
            empty = self.empty(tokens)
            text = {
                name: jnp.where(empty.reshape(-1, *[1] * (value.ndim - 1)), 0.0, value)
                for name, value in text.items()
            }
        return text

    def embedding(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `embed` makes of one caption: "context" [L, D], for SDXL also "pooled" [P]."""
        tokens = {
            f: jax.ShapeDtypeStruct((1, *null.shape), jnp.int32) for f, null in self.null.items()
        }
        made = jax.eval_shape(self.embed, self.params, tokens)
        made = made if isinstance(made, dict) else {"context": made}
        return {f: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32) for f, x in made.items()}

    def drop(
        self, params: Mapping[str, jax.Array], batch: Mapping[str, jax.Array], keys: jax.Array,
        rate: float,
    ) -> dict[str, jax.Array]:  # fmt: skip
        """Captions of a batch with those that training drops replaced by the empty one.

        The same draw for every field: a caption is dropped from all encoders or none. At a rate of
        0 nothing is replaced, and stored embeddings train without a run of the text encoders.
        """
        if rate == 0.0:
            return {}
        null = {field: jnp.asarray(tokens) for field, tokens in self.null.items()}
        if "context" not in batch:
            return {f: drop_captions(keys, batch[f], tokens, rate) for f, tokens in null.items()}
        empty = self.embed(params, {field: tokens[None] for field, tokens in null.items()})
        if not isinstance(empty, dict):
            empty = {"context": empty}
        return {f: drop_captions(keys, batch[f], made[0], rate) for f, made in empty.items()}

    def empty(self, tokens: Mapping[str, jax.Array]) -> jax.Array:
        """Which captions are "", bool [B]."""
        rows = [jnp.all(tokens[field] == null, axis=-1) for field, null in self.null.items()]
        return jnp.all(jnp.stack(rows), axis=0)


def make_conditioner(
    model: ModelConfig, tokenizers: Mapping[str, Encoder], *, remat: str = "none"
) -> Conditioner:
    """The conditioner of these networks.

    Raises:
        UserError: text encoders and UNet do not belong together.
    """
    encoders = model.text_encoders
    dtype = jnp.dtype(model.dtype)
    null = {field: tokens[0] for field, tokens in encode_text(tokenizers, [""]).items()}
    graphs: dict[str, Any] = {}
    params: dict[str, jax.ShapeDtypeStruct] = {}
    for name, encoder in encoders.items():
        graphs[name], own = weights.abstract(CLIPText, encoder, dtype=dtype, remat=remat)
        params |= prefixed(own, name)
    return Conditioner(
        graphs=graphs,
        params=params,
        null={TOKENS[name]: null[TOKENS[name]] for name in encoders},
        time_ids=check_text(model),
        zero_empty=model.zero_empty_prompt,
        scores=(model.aesthetic_score, model.negative_aesthetic_score),
    )


def check_text(model: ModelConfig) -> int:
    """The number of time ids, after a look that the text encoders fit the UNet.

    Raises:
        UserError: naming the fields that do not.
    """
    encoders, unet = model.text_encoders, model.unet
    if not encoders:
        raise UserError(
            "model.text_encoder and model.text_encoder_2 are both None: text-to-image training "
            "and drawing take one at least"
        )
    names = " + ".join(f"model.{name}.hidden_size" for name in encoders)
    width = sum(encoder.hidden_size for encoder in encoders.values())
    if not unet.is_xl:
        if model.zero_empty_prompt or list(encoders) != ["text_encoder"]:
            raise UserError(
                "model.text_encoder_2 and model.zero_empty_prompt are SDXL's, but "
                f"model.unet.addition_embed_type is {unet.addition_embed_type!r}; expected "
                "'text_time', or one text_encoder and zero_empty_prompt False"
            )
    else:
        pooled = model.text_encoder_2.projection_dim if model.text_encoder_2 else None
        if pooled is None:
            raise UserError(
                "model.unet.addition_embed_type is 'text_time', which takes a pooled caption: "
                "expected a model.text_encoder_2 with a projection_dim"
            )
        if len({encoder.max_position_embeddings for encoder in encoders.values()}) > 1:
            raise UserError(
                "max_position_embeddings of model.text_encoder and model.text_encoder_2 differ; "
                "expected equal ones, for their states go side by side"
            )
    if unet.cross_attention_dim != width:
        raise UserError(
            f"model.unet.cross_attention_dim is {unet.cross_attention_dim}, but {names} is {width}"
        )
    if not unet.is_xl:
        return 0
    assert pooled is not None
    try:
        return unet.time_ids(pooled)
    except ValueError as error:
        raise UserError(f"model.unet.{error}") from error
