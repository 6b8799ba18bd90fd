"""The part that all tokenizers share: captions to rows of tokens of one length, and their cache."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np

from sdjax.data.text.tokenizer_files import TokenizerError
from sdjax.system import paths

KEPT = 16_384  # captions whose tokens are kept, some 10 MB: they come again every epoch


class TextTokenizer(abc.ABC):
    """Maps captions to tokens [n, context_length]: marks, text, EOS, then padding. Picklable.

    title: the model it comes from, for messages.
    transformers_class: reads what `save` writes.
    marks_before, marks_after: how many tokens stand before the text of every caption, and after it.
    """

    title: ClassVar[str]
    transformers_class: ClassVar[str]
    marks_before: ClassVar[int]
    marks_after: ClassVar[int]
    eos_id: int
    pad_id: int

    def __init__(self, context_length: int):
        """Make a tokenizer of rows of `context_length` tokens.

        Raises:
            ValueError: there is no room for a token of the text.
        """
        if context_length <= self.marks_before + self.marks_after:
            raise ValueError(
                f"context_length = {context_length}: it must hold a token besides the "
                f"{self.marks_before + self.marks_after} of every caption"
            )
        self.context_length = int(context_length)
        self.truncated = 0  # captions cut so far, counted in this process
        self._kept: dict[str, tuple[np.ndarray, int]] = {}

    @property
    @abc.abstractmethod
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, special and added ones included."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """A digest of all that decides which tokens a text becomes."""

    @property
    @abc.abstractmethod
    def special_ids(self) -> dict[str, int]:
        """The ids of special tokens, by the names of fields of a text encoder's config."""

    @abc.abstractmethod
    def save(self, folder: paths.PathLike) -> None:
        """Write a folder for `load` and for `transformers_class`. Raises WriteError."""

    @abc.abstractmethod
    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts, with marks, of any length."""

    def _cut(self, ids: Sequence[int]) -> int:
        """Return how many of too many tokens stay, besides an EOS."""
        return self.context_length - 1

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special and added ones included."""
        return len(self.vocabulary)

    @property
    def largest_id(self) -> int:
        """The largest token id; larger than `vocab_size` - 1 where ids are left out."""
        return max(self.vocabulary.values())

    def check_vocabulary(self, vocab_size: int, where: object) -> None:
        """Raise TokenizerError, naming `where`, if a token has an id from `vocab_size` on."""
        if self.largest_id >= vocab_size:
            raise TokenizerError(
                f"{where}: the tokenizer's ids go up to {self.largest_id:,}, and the text encoder "
                f"has {vocab_size:,} tokens: they do not belong together"
            )

    def of_length(self, context_length: int) -> Self:
        """Return the same tokenizer for rows of another length."""
        other = copy.copy(self)
        TextTokenizer.__init__(other, context_length)
        return other

    @property
    def null_tokens(self) -> np.ndarray:
        """The tokens of the empty caption, int32 [context_length]: guidance's "no caption"."""
        return self.encode([""])[0]

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """The tokens of captions, int32 [n, context_length].

        A caption that is too long keeps its EOS, and is counted in `truncated`.
        """
        return self.encode_with_lengths(captions)[0]

    def encode_with_lengths(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of captions, int32 [n, context_length], and their uncut lengths, int32 [n].

        The lengths include marks. A caption is cut if its length is above the context length.
        """
        if isinstance(captions, str):
            raise TypeError(
                "captions: expected a list of strings, got one string; wrap it in a list"
            )
        if len(captions) == 1:
            row, length = self._cached(captions[0])
            tokens, lengths = row[None].copy(), np.array([length], np.int32)
        else:
            tokens, lengths = self._encode(captions)
        self.truncated += int((lengths > self.context_length).sum())
        return tokens, lengths

    def _cached(self, caption: str) -> tuple[np.ndarray, int]:
        """The tokens [context_length] of one caption and their number, kept from earlier calls."""
        found = self._kept.get(caption)
        if found is None:
            tokens, lengths = self._encode([caption])
            found = tokens[0], int(lengths[0])
            if len(self._kept) >= KEPT:  # with so many captions, few come again soon
                self._kept.clear()
            self._kept[caption] = found
        return found

    def _encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The result of `encode_with_lengths`, computed."""
        rows = self._ids([valid_text(text) for text in captions])
        tokens = np.full((len(rows), self.context_length), self.pad_id, np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for row, ids in enumerate(rows):
            lengths[row] = len(ids)
            if len(ids) > self.context_length:
                ids = [*ids[: self._cut(ids)], self.eos_id]
            tokens[row, : len(ids)] = ids
        return tokens, lengths


def valid_text(text: str) -> str:
    """The text with pairs of surrogates joined and single ones replaced: they have no bytes."""
    if not isinstance(text, str):
        raise TypeError(f"caption {text!r}: expected a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
