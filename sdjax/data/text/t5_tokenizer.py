"""T5's tokenizer: a Unigram vocabulary of SentencePiece, EOS at the end, no mark at the beginning.

The steps from text to tokens, and the ids, are those of `transformers.T5Tokenizer` (transformers
5, `models/t5/tokenization_t5.py`; the same as `T5TokenizerFast` of transformers 4). Only the
`tokenizers` library is needed. A vocabulary comes from a folder or is trained on captions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sdjax.data.text.sentencepiece_file import Pieces, read_pieces
from sdjax.data.text.text_tokenizer import TextTokenizer, valid_text
from sdjax.data.text.tokenizer_files import (
    MOST_ADDED,
    MOST_TOKENS,
    TokenizerError,
    own_length,
    read_json,
    token_arguments,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "▁"
DEFAULT_LENGTH = 512  # model_max_length of every T5
_EXTRA_IDS = 100  # sentinels of T5's own training, which are no pieces of its spiece.model
_ALPHABET = [SPACE, *(chr(code) for code in range(ord("!"), ord("~") + 1))]


class T5Tokenizer(TextTokenizer):
    """Maps captions to tokens [n, context_length]: text, EOS, then padding. Picklable."""

    title = "T5"
    transformers_class = "T5TokenizerFast"
    marks_before, marks_after = 0, 1  # EOS

    def __init__(
        self,
        pieces: Pieces,
        *,
        context_length: int = DEFAULT_LENGTH,
        added: Sequence[Mapping[str, Any]] = (),
        spiece: bytes | None = None,
    ):
        """Make a tokenizer of a vocabulary.

        Args:
            added: the arguments of tokens that are taken whole from the text.
            spiece: the spiece.model it came from, which is written back.

        Raises:
            ValueError: there is no room for a token, or the vocabulary lacks a special one.
        """
        super().__init__(context_length)
        self._spiece = spiece
        ids = {piece: index for index, (piece, _) in enumerate(pieces.scores)}
        if missing := [token for token in (PAD, EOS, UNK) if token not in ids]:
            raise ValueError(f"the vocabulary has no {' and no '.join(missing)}")
        self._extra_ids = sum(piece.startswith("<extra_id_") for piece in ids)
        self._backend = _backend(pieces, ids[UNK])
        special = [PAD, EOS, UNK, *(f"<extra_id_{i}>" for i in range(self._extra_ids))]
        flags: dict[str, dict[str, Any]] = {
            token: {"content": token} for token in special if token in ids
        }
        flags |= {token["content"]: dict(token) for token in added if token["content"] in ids}
        for arguments in flags.values():
            self._backend.add_tokens([AddedToken(**{**arguments, "special": True})])
        self.pad_id, self.eos_id = ids[PAD], ids[EOS]

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, special ones included."""
        return self._backend.get_vocab()

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of special tokens, by the names of fields of a text encoder's config."""
        return {"eos_token_id": self.eos_id, "pad_token_id": self.pad_id}

    @property
    def identity(self) -> str:
        """A digest of all that decides which tokens a text becomes."""
        content = f"{self.context_length} {self._backend.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            if len(texts) == 1:  # encode_batch starts threads, which takes longer
                return [self._backend.encode(texts[0]).ids]
            return [encoding.ids for encoding in self._backend.encode_batch(list(texts))]
        except BaseException as error:
            # The library looks a letter up without a check that the table is whole.
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                "the T5 tokenizer's table that normalises letters is damaged; copy its folder again"
            ) from error

    @classmethod
    def load(
        cls,
        folder: paths.PathLike,
        context_length: int | None = None,
        pad_token: str | None = None,
    ) -> T5Tokenizer:
        """Read a folder with tokenizer.json, or with spiece.model alone.

        `context_length` defaults to the folder's own. Raises TokenizerError.
        """
        folder = paths.to_path(folder)
        again = "copy the folder again"
        with explained(folder, "a T5 tokenizer", error=TokenizerError, remedy=again):
            if pad_token not in (None, PAD):
                raise TokenizerError(f"{folder}: pad_token is {brief(pad_token)}; expected {PAD}")
            return cls(**_read_folder(folder, context_length))

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int = DEFAULT_LENGTH
    ) -> T5Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens: special ones, letters, pieces.

        The same captions give the same vocabulary. Raises ValueError where `vocab_size` is too
        small for the letters of ASCII.
        """
        smallest = len(_ALPHABET) + 3  # PAD, EOS, UNK
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size = {vocab_size}: special tokens and letters alone take {smallest}"
            )
        words = Counter(word for text in captions for word in valid_text(text).split())
        return cls(Pieces(_learnt(words, vocab_size), b""), context_length=context_length)

    def save(self, folder: paths.PathLike) -> None:
        """Write a folder for `load` and for transformers' `T5TokenizerFast`. Raises WriteError."""
        folder = paths.to_path(folder)
        paths.make_folder(folder)
        paths.write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True) + "\n")
        special = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
        extra = [f"<extra_id_{i}>" for i in range(self._extra_ids)]
        config = {
            "tokenizer_class": "T5Tokenizer",
            "model_max_length": self.context_length,
            "extra_ids": self._extra_ids,
            "additional_special_tokens": extra,
            **special,
        }
        for name, content in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", special | {"additional_special_tokens": extra}),
        ):
            paths.write_text(folder / name, json.dumps(content, indent=2) + "\n")
        if self._spiece is not None:
            with paths.writing(folder / "spiece.model") as local:
                local.write_bytes(self._spiece)


def _learnt(words: Counter[str], vocab_size: int) -> tuple[tuple[str, float], ...]:
    """Pieces that BPE learns of words, with the logarithm of how frequent each is.

    The Unigram trainer of the library gives another vocabulary each time.
    """
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    more = sorted(set(letters) - set(_ALPHABET), key=lambda letter: (-letters[letter], letter))
    room = (vocab_size - len(_ALPHABET) - 3) // 2
    backend = tokenizers.Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = _pre_tokenizer()
    # As special tokens, letters have fixed ids; the trainer breaks ties by id.
    fixed = [PAD, EOS, UNK, *_ALPHABET, *more[:room]]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    texts = (word for word in sorted(words) for _ in range(words[word]))
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    plain = tokenizers.Tokenizer(
        models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], unk_token=UNK)
    )
    plain.pre_tokenizer = _pre_tokenizer()
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for piece in plain.encode(word).tokens:
            counts[piece] += count
    total = math.log(sum(counts.values()) + len(model["vocab"]))
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    score = {piece: math.log(counts[piece] + 1) - total for piece in pieces}
    return tuple((piece, 0.0 if piece in (PAD, EOS, UNK) else score[piece]) for piece in pieces)


def _pre_tokenizer() -> Any:
    """Words at white space, each with the mark of a space before it."""
    space = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])


def _backend(pieces: Pieces, unk_id: int) -> tokenizers.Tokenizer:
    """The pipeline from text to tokens: normalise, split into words, the likeliest pieces, EOS."""
    try:
        model = models.Unigram(list(pieces.scores), unk_id=unk_id, byte_fallback=False)
        normalizer = normalizers.Precompiled(pieces.charsmap) if pieces.charsmap else None
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the vocabulary or its table of letters is damaged: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    eos_id = [piece for piece, _ in pieces.scores].index(EOS)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", EOS], pair=["$A", EOS, "$B", EOS], special_tokens=[(EOS, eos_id)]
    )
    return backend


def _read_folder(folder: paths.Path, context_length: int | None) -> dict[str, Any]:
    """The arguments of `T5Tokenizer` in a folder; tokenizer.json wins, as in transformers."""
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file, default={})
    length = own_length(config, config_file, context_length, DEFAULT_LENGTH)
    single, model = folder / "tokenizer.json", folder / "spiece.model"
    spiece = model.read_bytes() if model.is_file() else None
    if single.is_file():
        pieces, added = _read_single(single)
        return {"pieces": pieces, "added": added, "context_length": length, "spiece": spiece}
    if spiece is None:
        raise TokenizerError(
            f"{folder}: no tokenizer.json and no spiece.model; expected the folder of a T5 "
            "tokenizer, as tokenizer_2/ of FLUX or tokenizer_3/ of Stable Diffusion 3"
        )
    pieces = read_pieces(spiece, model)
    extra = config.get("extra_ids", _EXTRA_IDS)
    if not isinstance(extra, int) or isinstance(extra, bool) or not 0 <= extra <= MOST_ADDED:
        raise TokenizerError(f"{config_file}: extra_ids is {brief(extra)}; expected 0 or more")
    sentinels = tuple((f"<extra_id_{i}>", 0.0) for i in reversed(range(extra)))
    pieces = Pieces(pieces.scores + sentinels, pieces.charsmap)
    return {"pieces": pieces, "context_length": length, "spiece": spiece}


def _read_single(file: paths.Path) -> tuple[Pieces, list[dict[str, Any]]]:
    """(vocabulary, tokens that are taken whole) of a tokenizer.json."""
    content = read_json(file)
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else model
    if not isinstance(model, dict) or kind != "Unigram":
        raise TokenizerError(
            f"{file}: expected T5's Unigram model, found {brief(kind)}; is it CLIP's tokenizer?"
        )
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or len(vocab) > MOST_TOKENS:
        raise TokenizerError(f"{file}: vocab is {brief(vocab)}; expected up to {MOST_TOKENS:,}")
    scores = tuple((str(piece), float(score)) for piece, score in vocab)
    added = [token_arguments(token) for token in content.get("added_tokens", [])]
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    tables = [step["precompiled_charsmap"] for step in steps if "precompiled_charsmap" in step]
    return Pieces(scores, base64.b64decode(tables[0]) if tables else b""), added
