"""Textual inversion: new words are learnt, and nothing else moves (Gal et al. 2022, 2208.01618).

Each word has rows of its own after the frozen token tables of the text encoders. The loss is that
of the denoiser; its gradient goes through the frozen networks to these rows.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.config import DataConfig
from sdjax.data.templates import TEMPLATES
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.errors import UserError
from sdjax.families.embeddings import (
    Embedding,
    check_family,
    check_ids,
    in_tables,
    is_rows,
    new_rows,
    rows_path,
    table_path,
    with_tokens,
)
from sdjax.families.family import Change, Family, Model
from sdjax.methods import denoise
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Kind,
    LossFn,
    Method,
    MethodConfig,
    Setup,
)
from sdjax.methods.parts import Part, joined
from sdjax.models.params import Params
from sdjax.system import paths

CAPTIONS = "captions"  # the value of `templates` that leaves captions as they are


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig(MethodConfig):
    """Training of new words alone."""

    name: str = "embedding"
    tokens: tuple[str, ...] = ()  # the words to learn, as ("<cat>",)
    vectors: int = 1  # rows of each; a prompt has as many tokens for the word
    # For each word, words of the vocabulary whose rows it begins as: one token for all of its
    # vectors, or as many tokens as vectors. () begins at random, as spread as the table.
    initializer: tuple[str, ...] = ()
    # Captions: "object" and "style" are lists of texts around the word; "captions" are those of the
    # data, which have the words in them.
    templates: str = "object"
    # After each step the rows are multiplied by (std of the table / std of the rows) to this power;
    # 0.1 in diffusers' scripts of pivotal tuning.
    std_power: float = 0.0

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise ValueError(f"vectors is {self.vectors}; expected 1 or more")
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens is {self.tokens!r}; expected words that differ")
        if self.initializer and len(self.initializer) != len(self.tokens):
            raise ValueError(
                f"initializer is {self.initializer!r} with tokens {self.tokens!r}; expected a text "
                "for each, of the kind of thing that it stands for, such as ('toy',), or () to "
                "begin at random"
            )
        if not 0 <= self.std_power <= 1:
            raise ValueError(f"std_power is {self.std_power}; expected a number in [0, 1]")
        if self.templates not in (*TEMPLATES, CAPTIONS):
            raise ValueError(
                f"templates is {self.templates!r}; expected {', '.join(TEMPLATES)} or {CAPTIONS}"
            )
        if self.templates != CAPTIONS and len(self.tokens) > 1:
            raise ValueError(
                f"templates is {self.templates!r}, of one word, with tokens {self.tokens!r}: write "
                f"them into the captions of the data, with templates {CAPTIONS!r}"
            )


def changes(config: EmbeddingConfig, family: Family) -> tuple[Change, ...]:
    """Return the changes that lengthen the token tables; see `Kind.changes`."""
    return new_rows(family, len(config.tokens) * config.vectors)


def tokenizers_with(
    config: EmbeddingConfig, tokenizers: Mapping[str, TextTokenizer]
) -> Mapping[str, TextTokenizer]:
    """Return tokenizers that have the words; see `Kind.tokenizers`."""
    return with_tokens(tokenizers, dict.fromkeys(config.tokens, config.vectors))


def data_with(config: EmbeddingConfig, data: DataConfig) -> DataConfig:
    """Return the data with texts around the word, if the recipe has no other texts.

    These take the place of captions, see `Kind.data`. Raises UserError if none of the recipe's own
    has a word.
    """
    own = data.captions.texts
    if own and not any(word in text for text in own for word in (*config.tokens, "{}")):
        raise UserError(
            f"data.captions.texts is {own!r}, and no text has one of method.tokens = "
            f"{config.tokens!r}: nothing would be learnt"
        )
    if config.templates == CAPTIONS or own or data.text_embeddings:
        return data
    texts = tuple(
        t.replace("{}", word) for word in config.tokens for t in TEMPLATES[config.templates]
    )
    return dataclasses.replace(data, captions=dataclasses.replace(data.captions, texts=texts))


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: there is no word, or the model or the data do not suit the method.
    """
    part = words(setup)
    return joined(denoise.make(setup), (part,))


def words(setup: Setup) -> Part:
    """Return the rows of new words as a part of a method.

    Raises:
        UserError: see `make`.
    """
    config, model = setup.config, setup.model
    check_family(model.family)
    if not config.tokens:
        raise UserError("method.tokens is empty; expected the words to learn, such as ('<cat>',)")
    if setup.data.text_embeddings:
        raise UserError(
            f"data.text_embeddings is True, and method {config.name!r} trains what stands before "
            "these in the text encoders; set it to False (data encoded ahead still save the VAE)"
        )
    check_ids(model)
    sizes = {
        model.family.parts[name].tokens: network.vocab_size
        for name, network in model.text_encoders.items()
    }

    def start(loaded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _first_rows(config, model, loaded)

    def export(
        model: Model, trained: Mapping[str, np.ndarray], folder: paths.Path
    ) -> dict[str, paths.Path | str]:
        from sdjax.formats.embeddings import FOLDER, write_embeddings

        target = folder / FOLDER
        write_embeddings(target, model.family, learnt(config, model, trained))
        return {"embedding": target}

    return Part(
        trains=is_rows,
        start=start,
        export=export,
        loss=functools.partial(_counted, sizes=sizes),
        project=functools.partial(_as_spread, config.std_power) if config.std_power else None,
    )


def _as_spread(power: float, trained: Params, frozen: Params) -> Params:
    """Bring the spread of new rows nearer to that of their table; see `EmbeddingConfig.std_power`.

    Source: diffusers, examples/advanced_diffusion_training, `retract_embeddings`.
    """
    found = dict(trained)
    for path in filter(is_rows, trained):
        table = frozen[table_path(path.partition(".")[0])].astype(jnp.float32)
        own = jnp.std(trained[path], ddof=1)
        ratio = jnp.std(table, ddof=1) / jnp.where(own > 0, own, 1)
        found[path] = trained[path] * jnp.where(own > 0, ratio, 1) ** power
    return found


def _counted(loss: LossFn, sizes: Mapping[str, int]) -> LossFn:
    """The loss, which also logs the share of examples whose captions have a new word."""

    def counted(
        trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        per_example, aux = loss(trained, frozen, averages, batch, draw)
        found = [jnp.any(batch[field] >= size, axis=-1) for field, size in sizes.items()]
        return per_example, {**aux, "with_token": found[0].astype(jnp.float32)}

    return counted


def _first_rows(
    config: EmbeddingConfig, model: Model, loaded: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The rows to begin with, those of the initializers; see `Method.start`.

    Raises:
        UserError: an initializer has neither one token nor as many as there are vectors.
    """
    from sdjax.data.text.tokenizer import Tokenizer

    found = {}
    for name in model.text_encoders:
        table = loaded.get(table_path(name))
        if table is None:
            raise UserError(
                f"the {name} has no weights: new words are learnt for a trained model, set "
                "config.init_from"
            )
        if not config.initializer:
            found[rows_path(name)] = _random_rows(config, name, table)
            continue
        tokenizer = model.tokenizers[model.family.parts[name].tokens]
        assert isinstance(tokenizer, Tokenizer)
        rows = []
        for word, text in zip(config.tokens, config.initializer, strict=True):
            ids, lengths = tokenizer.of_length(model.text_length(name)).encode_with_lengths([text])
            own = ids[0, tokenizer.marks_before : lengths[0] - tokenizer.marks_after]
            if len(own) not in (1, config.vectors) or own.max() >= len(table):
                raise UserError(
                    f"method.initializer {text!r} of {word!r} has {len(own)} tokens in {name}; "
                    f"expected 1, or one for each of method.vectors = {config.vectors}; of words "
                    "that the tokenizer has"
                )
            rows.append(np.broadcast_to(table[own], (config.vectors, table.shape[1])))
        found[rows_path(name)] = np.concatenate(rows).astype(np.float32)
    return found


def _random_rows(config: EmbeddingConfig, encoder: str, table: np.ndarray) -> np.ndarray:
    """Rows of N(0, std of the table), which depend on the words and the encoder alone."""
    shape, spread = (config.vectors, table.shape[1]), np.std(table, ddof=1, dtype=np.float64)
    drawn = [
        np.random.default_rng(zlib.crc32(f"{encoder} {word}".encode())).normal(0, spread, shape)
        for word in config.tokens
    ]
    return np.concatenate(drawn).astype(np.float32)


def learnt(
    config: EmbeddingConfig, model: Model, trained: Mapping[str, np.ndarray]
) -> list[Embedding]:
    """Return the words of a run with their rows.

    Args:
        trained: {path: rows} of the text encoders.
    """
    count = config.vectors
    return [
        Embedding(
            word,
            {name: trained[rows_path(name)][i * count :][:count] for name in model.text_encoders},
        )
        for i, word in enumerate(config.tokens)
    ]


EMBEDDING = Kind(
    config=EmbeddingConfig,
    make=make,
    networks=tuple,
    draws=True,
    changes=changes,
    folded=in_tables,
    tokenizers=tokenizers_with,
    data=data_with,
)
