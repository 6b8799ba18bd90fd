"""Prompts with weights and of any length, as the web UI of AUTOMATIC1111 reads them.

(word) weighs a word 1.1 times, ((word)) 1.21, (word:1.3) 1.3 and [word] 1 / 1.1; a backslash makes
a bracket a character. BREAK begins the next chunk. A prompt is split into chunks of as many tokens
as the text encoder reads, less BOS and EOS, and what the encoder makes of them goes one after
another. Weights multiply what the encoder makes of a token, and the mean of the chunk is restored
(the UI's emphasis "Original").
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.families.conditioning import Conditioner, make_conditioner
from sdjax.families.family import Model
from sdjax.sampling.request import SamplingRequest

ROUND, SQUARE = 1.1, 1 / 1.1
# A chunk that ends within a phrase ends at its last comma, if at most so many tokens follow that.
COMMA_REACH = 20
_LEXEMES = re.compile(
    r"\\(?P<escaped>[()\[\]\\])?|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a prompt with one weight; a text of None begins the next chunk."""

    text: str | None
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens without marks, and their weights."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def parse_weights(prompt: str) -> list[Piece]:
    """Return the pieces of a prompt; neighbours of one weight are one piece.

    A bracket that is not closed weighs everything after it; one that was not opened is text.

    Raises:
        UserError: a weight is no number.
    """
    found: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        found[start:] = [
            piece
            if piece.text is None
            else dataclasses.replace(piece, weight=piece.weight * factor)
            for piece in found[start:]
        ]

    for match in _LEXEMES.finditer(prompt):
        kinds, text = match.groupdict(), match.group()
        if text.startswith("\\"):
            found.append(Piece(kinds["escaped"] or ""))
        elif kinds["open"]:
            opened[text].append(len(found))
        elif kinds["weight"] and opened["("]:
            weigh(opened["("].pop(), _number(kinds["weight"], prompt))
        elif text == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND)
        elif text == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE)
        else:
            first, *more = _BREAK.split(text)
            found.append(Piece(first))
            for part in more:
                found += [Piece(None), Piece(part)]
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[kind]:
            weigh(start, factor)
    return _joined(found)


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"the weight {text!r} in the prompt {prompt!r} is no number; write it as (word:1.3)"
        ) from None


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with neighbours of one weight in one; an empty prompt has one piece."""
    kept: list[Piece] = []
    for piece in pieces:
        last = kept[-1] if kept else None
        if last and None not in (piece.text, last.text) and piece.weight == last.weight:
            kept[-1] = Piece(f"{last.text}{piece.text}", piece.weight)
        else:
            kept.append(piece)
    return kept or [Piece("")]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text of any length, without marks."""
    length = int(tokenizer.encode_with_lengths([text])[1][0])
    longer = tokenizer.of_length(max(length, 3))
    return longer.encode([text])[0, 1 : length - 1].tolist()


def split_chunks(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[Chunk]:
    """Return the chunks of a prompt, at least one."""
    size = tokenizer.context_length - 2
    comma = _plain(tokenizer, ",")[-1]
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    last_comma = -1  # where the last comma of this chunk is

    def close(end: int) -> None:
        chunks.append(Chunk(tuple(tokens[:end]), tuple(weights[:end])))
        del tokens[:end], weights[:end]

    for piece in pieces:
        if piece.text is None:
            close(len(tokens))
            last_comma = -1
            continue
        for token in _plain(tokenizer, piece.text):
            if token == comma:
                last_comma = len(tokens)
            elif len(tokens) == size and last_comma >= 0 and size - last_comma <= COMMA_REACH:
                close(last_comma + 1)
                last_comma = -1
            if len(tokens) + tokenizer.length_of_word(token) > size:  # a learnt word stays whole
                close(len(tokens))
                last_comma = -1
            tokens.append(token)
            weights.append(piece.weight)
    if tokens or not chunks:
        close(len(tokens))
    return chunks


def chunk_rows(
    chunks: Sequence[Chunk], tokenizer: Tokenizer, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32 [count, L] and weights float32 [count, L]; missing chunks are empty."""
    tokens = np.full((count, tokenizer.context_length), tokenizer.pad_id, np.int32)
    weights = np.ones(tokens.shape, np.float32)
    for i in range(count):
        chunk = chunks[i] if i < len(chunks) else Chunk((), ())
        marked = [tokenizer.bos_id, *chunk.tokens, tokenizer.eos_id]
        tokens[i, : len(marked)] = marked
        weights[i, 1 : len(marked) - 1] = chunk.weights
    return tokens, weights


class PromptEmbedder:
    """Makes of prompts what the denoiser reads; compiled once for each number of chunks.

    Raises:
        UserError: a text encoder of the family is not CLIP's.
    """

    def __init__(self, model: Model, *, dtype: str = "float32"):
        check_syntax(model)
        self._tokenizers = {f: t for f, t in model.tokenizers.items() if isinstance(t, Tokenizer)}
        conditioner = make_conditioner(model, model.tokenizers, dtype=dtype)
        null = {field: jnp.asarray(row)[None] for field, row in conditioner.null.items()}
        self._encode = jax.jit(lambda *given: _weighted(conditioner, *given))
        self._empty = jax.jit(
            lambda params, count: _repeated(conditioner.embed(params, null), count),
            static_argnums=1,
        )

    def chunks(self, prompts: Sequence[str]) -> int:
        """Return how many chunks the longest of the prompts has. UserError: a weight is none."""
        return max(len(chunks) for rows in self._split(prompts).values() for chunks in rows)

    def embed(
        self, params: Mapping[str, jax.Array], prompts: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Return "context" [N, chunks * L, D], and SDXL's "pooled" [N, P], of the first chunk.

        All have as many chunks as the longest.

        Raises:
            UserError: a weight is no number.
        """
        split = self._split(prompts)
        count = max(len(chunks) for rows in split.values() for chunks in rows)
        tokens, weights = {}, {}
        for field, rows in split.items():
            made = [chunk_rows(chunks, self._tokenizers[field], count) for chunks in rows]
            tokens[field], weights[field] = (np.stack(arrays) for arrays in zip(*made, strict=True))
        parts = [
            self._encode(
                params, {f: x[i] for f, x in tokens.items()}, {f: x[i] for f, x in weights.items()}
            )
            if prompt
            else self._empty(params, count)
            for i, prompt in enumerate(prompts)
        ]
        return {
            name: np.stack([np.asarray(p[name], np.float32) for p in parts]) for name in parts[0]
        }

    def _split(self, prompts: Sequence[str]) -> dict[str, list[list[Chunk]]]:
        """The chunks of prompts, for each tokenizer."""
        pieces = [parse_weights(prompt) for prompt in prompts]
        return {f: [split_chunks(p, t) for p in pieces] for f, t in self._tokenizers.items()}


def embed_prompts(
    model: Model,
    params: Mapping[str, jax.Array],
    prompts: Sequence[str],
    *,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Return what `PromptEmbedder` makes of prompts. UserError: as there."""
    return PromptEmbedder(model, dtype=dtype).embed(params, prompts)


def _repeated(features: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """The features [1, ...] of the empty caption, by the rule of its family, for `count` chunks."""
    context = jnp.tile(features["context"][0], (count, 1))  # [count * L, D]
    return {name: x[0] for name, x in features.items()} | {"context": context}


def _weighted(
    conditioner: Conditioner,
    params: Mapping[str, jax.Array],
    tokens: Mapping[str, jax.Array],
    weights: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Features of one prompt, whose chunks are the rows [chunks, L]."""
    networks = conditioner.networks
    # Chunks that fill up are empty captions too, but part of a prompt that is not.
    rows = len(next(iter(tokens.values())))
    given = {field: jnp.asarray(x) for field, x in tokens.items()}
    none = lambda: jnp.zeros(rows, bool)  # noqa: E731
    features = networks.family.embed(networks, params, given, empty=none, key=None)
    states, start = [], 0
    for name, config in networks.configs.items():
        state = features["context"][..., start : start + config.hidden_size]  # [chunks, L, D]
        start += config.hidden_size
        weighted = state * weights[networks.family.parts[name].tokens][..., None]
        mean = lambda x: x.mean((1, 2), keepdims=True)  # noqa: E731
        states.append(weighted * (mean(state) / mean(weighted)))
    context = jnp.concatenate(states, axis=-1)
    found = {"context": context.reshape(-1, context.shape[-1])}  # [chunks * L, D]
    return found | ({"pooled": features["pooled"][0]} if "pooled" in features else {})


def check_syntax(model: Model) -> None:
    """Check that prompts of a model may have weights.

    Raises:
        UserError: a text encoder of its family is not CLIP's.
    """
    if any(part.tokenizer_kind != "clip" for part in model.family.encoders.values()):
        raise UserError(
            f"--prompt_syntax=a1111 is for SD1, SD2 and SDXL, whose text encoders are CLIP's; the "
            f"family {model.family.name!r} has others, leave it out"
        )


def with_weights(request: SamplingRequest, negative: str) -> SamplingRequest:
    """Return a request whose prompts, and the negative one, are read with weights.

    Raises:
        UserError: as `embed_prompts`.
    """
    made = embed_prompts(
        request.model, request.params, [*request.texts, negative], dtype=request.dtype
    )
    numbers = {f: x for f, x in request.prompts.items() if f in request.model.family.numbers}
    return dataclasses.replace(
        request,
        prompts={**numbers, **{field: rows[:-1] for field, rows in made.items()}},
        negative={field: rows[-1] for field, rows in made.items()},
    )
