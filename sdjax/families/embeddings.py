"""Words that a model has learnt: rows after the token tables of its text encoders.

A word is a token of `sdjax.data.text.tokenizer.Tokenizer.with_token`: one id for each row. All text
encoders have rows for it, of their own widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.errors import UserError
from sdjax.families.family import Change, Family, Model
from sdjax.models.longer_table import ROWS, LongerEmbed

_TABLE = "embeddings.token_embedding"


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its rows.

    rows: {text encoder: float32 [n, width]}, with one n for all.
    """

    token: str
    rows: Mapping[str, np.ndarray]

    @property
    def count(self) -> int:
        """How many rows, and so tokens, the word has in each encoder."""
        return len(next(iter(self.rows.values())))


@dataclasses.dataclass(frozen=True)
class NewRows:
    """A `Change` that lengthens the token table of a text encoder by `count` rows."""

    encoder: str
    count: int

    def __call__(self, name: str, network: Any, rngs: Any) -> None:
        """Lengthen the table of the network if it is the encoder."""
        if name == self.encoder:
            table = network.embeddings.token_embedding
            network.embeddings.token_embedding = LongerEmbed(table, self.count, rngs=rngs)


def rows_path(encoder: str) -> str:
    """Return the path of the new rows of a text encoder."""
    return f"{encoder}.{_TABLE}.{ROWS}"


def table_path(encoder: str) -> str:
    """Return the path of the token table of a text encoder."""
    return f"{encoder}.{_TABLE}.embedding"


def is_rows(path: str) -> bool:
    """Whether a path is that of new rows."""
    return path.endswith(f".{_TABLE}.{ROWS}")


def check_family(family: Family) -> None:
    """Check that all text encoders of a family are CLIP's.

    Raises:
        UserError: some are not.
    """
    if any(part.tokenizer_kind != "clip" for part in family.encoders.values()):
        raise UserError(
            f"embeddings are of SD1, SD2 and SDXL, whose text encoders are CLIP's; the family "
            f"{family.name!r} has others, which know nothing of a new word"
        )


def new_rows(family: Family, count: int) -> tuple[Change, ...]:
    """Return the changes that lengthen every token table of a family by `count` rows."""
    return tuple(NewRows(name, count) for name in family.encoders)


def count_of(model: Model) -> int:
    """Return by how many rows the changes of a model lengthen its token tables."""
    return max((c.count for c in model.changes if isinstance(c, NewRows)), default=0)


def with_tokens(
    tokenizers: Mapping[str, TextTokenizer], words: Mapping[str, int]
) -> dict[str, TextTokenizer]:
    """Return tokenizers with words more, {word: how many tokens it has}.

    Raises:
        TokenizerError: a word is in a vocabulary already, or has too many tokens.
    """
    from sdjax.data.text.tokenizer import Tokenizer  # whose library is not where shapes are enough

    longer = dict(tokenizers)
    for word, count in words.items():
        for field, tokenizer in longer.items():
            if isinstance(tokenizer, Tokenizer):
                longer[field] = tokenizer.with_token(word, count)
    return longer


def check_ids(model: Model) -> None:
    """Check that the next ids of tokens are those of rows after the token tables.

    Tokenizers may have the tokens of new rows already.

    Raises:
        UserError: a table has more rows than its tokenizer has tokens.
    """
    from sdjax.data.text.tokenizer import Tokenizer

    for name, config in model.text_encoders.items():
        tokenizer = model.tokenizers.get(model.family.parts[name].tokens)
        tokens = config.vocab_size
        if isinstance(tokenizer, Tokenizer):
            tokens = tokenizer.largest_id + 1 - count_of(model)
        if tokens != config.vocab_size:
            raise UserError(
                f"the token table of {name} has {config.vocab_size:,} rows, and its tokenizer "
                f"{tokens:,} tokens; a new word takes the next row and the next token, so expected "
                "as many"
            )


def with_embeddings(model: Model, embeddings: Sequence[Embedding]) -> Model:
    """Return a model whose tokenizers and token tables have words more.

    Raises:
        UserError: a word is in the vocabulary, or the text encoders are not CLIP's.
    """
    check_family(model.family)
    check_ids(model)
    tokenizers: Mapping[str, TextTokenizer] = model.tokenizers
    for embedding in embeddings:  # in turn: two of one word are an error
        tokenizers = with_tokens(tokenizers, {embedding.token: embedding.count})
    rows = {
        name: np.concatenate([embedding.rows[name] for embedding in embeddings])
        for name in model.text_encoders
    }
    return _lengthened(dataclasses.replace(model, tokenizers=tokenizers), rows)


def in_tables(model: Model) -> Model:
    """Return a model whose new rows are the last ones of its token tables, without such changes.

    It may have no parameters.
    """
    if not (count := count_of(model)):
        return model
    paths = [rows_path(name) for name in model.text_encoders]
    rows = {
        name: model.params.get(rows_path(name), np.zeros((count, config.hidden_size), np.float32))
        for name, config in model.text_encoders.items()
    }
    return _lengthened(
        dataclasses.replace(
            model,
            params={path: value for path, value in model.params.items() if path not in paths},
            changes=tuple(c for c in model.changes if not isinstance(c, NewRows)),
        ),
        rows,
    )


def tables_with(params: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run trained, with its rows in the token tables of a model read from it.

    Args:
        params: of the model, as `in_tables` gives it.
    """
    found = {path: value for path, value in trained.items() if not is_rows(path)}
    for path in trained.keys() - found.keys():
        table = table_path(path.split(".")[0])
        found[table] = np.concatenate([params[table][: -len(trained[path])], trained[path]])
    return found


def _lengthened(model: Model, rows: Mapping[str, np.ndarray]) -> Model:
    """The model with more rows in the token tables of {text encoder: rows}."""
    params, networks = dict(model.params), dict(model.networks)
    for name, own in rows.items():
        part, path = model.family.parts[name], table_path(name)
        if path in params:
            params[path] = np.concatenate([params[path], own])
        # Other programs pool at the highest id too, where a config does not say the real EOS.
        config = part.fitted(networks[name], model.tokenizers.get(part.tokens))
        networks[name] = dataclasses.replace(config, vocab_size=config.vocab_size + len(own))
    return dataclasses.replace(model, networks=networks, params=params)
