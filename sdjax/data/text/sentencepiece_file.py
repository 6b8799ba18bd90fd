"""Reading the Unigram vocabulary of a `spiece.model`, a protocol buffer of SentencePiece.

Fields are those of sentencepiece_model.proto of google/sentencepiece; wire types those of
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from sdjax.data.text.tokenizer_files import MOST_TOKENS, TokenizerError
from sdjax.system import paths

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_PIECE, _SCORE = 1, 2  # of SentencePiece
_MODEL_TYPE, _UNIGRAM = 3, 1  # of TrainerSpec
_CHARSMAP = 2  # of NormalizerSpec
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A Unigram vocabulary.

    scores: (piece, logarithm of its probability), by id.
    charsmap: the table that normalises letters, as `normalizers.Precompiled` takes it; or b"".
    """

    scores: tuple[tuple[str, float], ...]
    charsmap: bytes


def read_pieces(data: bytes, file: paths.Path) -> Pieces:
    """Return the vocabulary of a spiece.model.

    Raises:
        TokenizerError: it is damaged, or of another kind than T5's.
    """
    scores: list[tuple[str, float]] = []
    charsmap, kind = b"", _UNIGRAM
    try:
        for number, value in _fields(data):
            if number == _PIECES and isinstance(value, bytes):
                own = dict(_fields(value))
                score = own.get(_SCORE, bytes(4))
                scores.append((own[_PIECE].decode(), struct.unpack("<f", score)[0]))  # type: ignore
            elif number == _TRAINER and isinstance(value, bytes):
                kind = dict(_fields(value)).get(_MODEL_TYPE, kind)  # type: ignore[assignment]
            elif number == _NORMALIZER and isinstance(value, bytes):
                charsmap = dict(_fields(value)).get(_CHARSMAP, charsmap)  # type: ignore[assignment]
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise TokenizerError(
            f"{file}: no whole SentencePiece model ({error}); copy it again"
        ) from error
    if kind != _UNIGRAM or not isinstance(charsmap, bytes):
        raise TokenizerError(f"{file}: a SentencePiece model of type {kind}; expected Unigram")
    if not 0 < len(scores) <= MOST_TOKENS:
        raise TokenizerError(f"{file}: {len(scores):,} pieces; expected 1 to {MOST_TOKENS:,}")
    return Pieces(tuple(scores), charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where the next field begins) of a number of 7 bits a byte."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + shift // 7 + 1
    raise ValueError("a number of more than ten bytes")
