"""The denoiser's context, besides the noisy latents, for every family.

One object makes it, for the loss, for drawing and for encoding ahead, so that a caption that was
dropped in training and the "no caption" of guidance are the same by construction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.losses import drop_captions, fold_keys
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Context, Features, Model, Networks
from sdjax.models.params import component, prefixed

# The first of the streams of randomness of each encoder's own dropout, folded into example keys.
ENCODER_DROPOUT = 2**16
MOST_TOKENS = 4096  # of a caption; the pipelines of diffusers take 512
# In place of text encoders, parameters may have what these make of the empty caption under this.
EMPTY = "empty_caption"


class Tokenize(Protocol):
    """The part of a tokenizer that conditioning needs."""

    context_length: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return tokens int32 [len(texts), context_length]."""


class BlankTokenizer:
    """Stands in for a tokenizer where only shapes matter: no vocabulary has to be read or made."""

    def __init__(self, context_length: int):
        self.context_length = context_length

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return zeros int32 [len(texts), context_length]."""
        return np.zeros((len(texts), self.context_length), np.int32)


def blank_tokenizers(model: Model) -> dict[str, Tokenize]:
    """Return {field: tokenizer} for shapes alone."""
    return {
        model.family.parts[name].tokens: BlankTokenizer(model.text_length(name))
        for name in model.text_encoders
    }


def encode_text(tokenizers: Mapping[str, Tokenize], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return {field: tokens int32 [len(texts), L]}."""
    return {field: tokenizer.encode(texts) for field, tokenizer in tokenizers.items()}


def with_text_length(model: Model, length: int, name: str) -> Model:
    """Return a model that reads as many tokens of the encoders whose configs do not say it.

    Args:
        name: where the model is, for messages.

    Raises:
        UserError: it has no such encoders, or the length is out of its range.
    """
    family = model.family
    settings = {part.length_setting for part in family.parts.values()} - {""}
    if not settings:
        raise UserError(
            f"--max_sequence_length is for SD3 and FLUX.1; {name} is a model of {family.title}, "
            "whose text encoders say how many tokens they read"
        )
    if not 2 <= length <= MOST_TOKENS:
        raise UserError(f"--max_sequence_length is {length}; expected 2 to {MOST_TOKENS}")
    lengths = dict.fromkeys(settings, length)
    model = dataclasses.replace(model, settings={**model.settings, **lengths})
    tokenizers = {
        part.tokens: model.tokenizers[part.tokens].of_length(length)
        for part in family.encoders.values()
        if part.length_setting and part.tokens in model.tokenizers
    }
    return dataclasses.replace(model, tokenizers={**model.tokenizers, **tokenizers})


@dataclasses.dataclass(frozen=True, eq=False)
class Conditioner:
    """The text encoders of a model, and the empty caption.

    null: {field: tokens [L]} of the empty caption.
    """

    networks: Networks
    null: Mapping[str, np.ndarray]

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        batch: Mapping[str, jax.Array],
        *,
        target: tuple[int, int],
        negative: bool = False,
        key: jax.Array | None = None,
    ) -> Context:
        """Return the context of the denoiser.

        Args:
            params: `{path: array}` with those of the text encoders.
            batch: tokens int32 [B, L] of each encoder, or what `embed` made of them; and the
                family's numbers, which may be missing.
            target: height and width of the picture, in pixels.
            negative: whether guidance leads away from it.
            key: of dropout in the encoders.
        """
        family = self.networks.family
        if "context" in batch:
            features = {name: batch[name] for name in family.features if name in batch}
        else:
            features = self.embed(params, batch, key=key)
        return family.context(self.networks, features, batch, target=target, negative=negative)

    def embed(
        self,
        params: Mapping[str, jax.Array],
        tokens: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> Features:
        """Return the part of the context that comes from the text alone: "context" [B, L, D]
        float32 and what else the family takes, as "pooled" [B, P]."""
        given = {field: jnp.asarray(tokens[field]) for field in self.null}
        family = self.networks.family
        return family.embed(self.networks, params, given, empty=lambda: self.empty(given), key=key)

    def embedding(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what `embed` makes of one caption: "context" [L, D], ..."""
        tokens = {
            f: jax.ShapeDtypeStruct((1, *null.shape), jnp.int32) for f, null in self.null.items()
        }
        made = jax.eval_shape(self.embed, self.networks.abstract, tokens)
        return {f: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32) for f, x in made.items()}

    def nothing(self, params: Mapping[str, jax.Array]) -> Features:
        """Return what `embed` makes of the empty caption, [1, ...] each; see `EMPTY`."""
        if stored := component(params, EMPTY):
            return {name: value[None] for name, value in stored.items()}
        null = {field: jnp.asarray(tokens)[None] for field, tokens in self.null.items()}
        return self.embed(params, null)

    def stored(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the paths and shapes of the empty caption's features, see `EMPTY`."""
        return prefixed(self.embedding(), EMPTY)

    def drop(
        self,
        params: Mapping[str, jax.Array],
        batch: Mapping[str, jax.Array],
        keys: jax.Array,
        rate: float,
        *,
        encoder_rate: float = 0.0,
    ) -> dict[str, jax.Array]:
        """Return captions of a batch with those that training drops replaced by the empty one.

        At rates of 0 nothing is replaced, and stored embeddings train without a run of the text
        encoders.

        Args:
            keys: [B], of the examples.
            rate: of captions that are dropped from all encoders at once.
            encoder_rate: of captions that are dropped from an encoder, each drawn apart. Stored
                embeddings have no encoders left to tell apart: they take 0.
        """
        if rate == 0.0 and encoder_rate == 0.0:
            return {}
        if "context" not in batch:
            null = {field: jnp.asarray(tokens) for field, tokens in self.null.items()}
            kept = dict(batch)
            for i, (field, tokens) in enumerate(null.items() if encoder_rate else ()):
                own = fold_keys(keys, ENCODER_DROPOUT + i)
                kept[field] = drop_captions(own, kept[field], tokens, encoder_rate)
            return {f: drop_captions(keys, kept[f], tokens, rate) for f, tokens in null.items()}
        return {
            name: drop_captions(keys, batch[name], made[0], rate)
            for name, made in self.nothing(params).items()
        }

    def empty(self, tokens: Mapping[str, jax.Array]) -> jax.Array:
        """Return which captions are "", bool [B]."""
        rows = [jnp.all(tokens[field] == null, axis=-1) for field, null in self.null.items()]
        return jnp.all(jnp.stack(rows), axis=0)


def make_conditioner(
    model: Model,
    tokenizers: Mapping[str, Tokenize],
    *,
    dtype: str = "float32",
    remat: str = "none",
) -> Conditioner:
    """Return the conditioner of a model.

    Raises:
        UserError: text encoders and denoiser do not belong together.
    """
    model.family.check(model)
    made = {field: tokens[0] for field, tokens in encode_text(tokenizers, [""]).items()}
    fields = [model.family.parts[name].tokens for name in model.text_encoders]
    networks = bind(model, tuple(model.text_encoders), dtype=dtype, remat=remat)
    return Conditioner(networks, {field: made[field] for field in fields})
