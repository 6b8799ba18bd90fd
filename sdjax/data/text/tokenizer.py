"""CLIP's tokenizer: byte-level BPE that marks the end of words, in a fixed context length.

The steps from text to tokens, and the ids, are those of `transformers.CLIPTokenizer` (transformers
5, `models/clip/tokenization_clip.py`; the same as `CLIPTokenizerFast` of transformers 4). Only the
`tokenizers` library is needed. A vocabulary comes from a folder or is trained on captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from sdjax.data.text.text_tokenizer import TextTokenizer, valid_text
from sdjax.data.text.tokenizer_files import (
    BOS,
    DEFAULT_CONTEXT_LENGTH,
    DEFAULT_SPECIAL,
    END_OF_WORD,
    EOS,
    TokenizerError,
    merge_pairs,
    read_folder,
    token_arguments,
    token_text,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained

# OpenAI CLIP, clip/simple_tokenizer.py
SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


# The arguments of a word that is added to a vocabulary, as `add_tokens` of transformers sets them.
_WORD = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
         "special": False}  # fmt: skip


class Tokenizer(TextTokenizer):
    """Maps captions to tokens [n, context_length]: BOS, text, EOS, then padding. Picklable.

    Where a vocabulary has the added tokens X, X_1, X_2, ..., an X in a text becomes all of them, as
    in the pipelines of diffusers (loaders/textual_inversion.py, `maybe_convert_prompt`).
    """

    title = "CLIP"
    transformers_class = "CLIPTokenizer"
    marks_before, marks_after = 1, 1  # BOS, EOS

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        context_length: int = DEFAULT_CONTEXT_LENGTH,
        special: Mapping[str, str | dict[str, Any]] | None = None,
        added: Mapping[int, dict[str, Any]] | None = None,
    ):
        """Make a tokenizer of a vocabulary and its merges.

        Args:
            special: {"bos_token" and the like: its text, or the arguments of an `AddedToken`}.
            added: {id: the arguments of a token that is taken whole from the text}.

        Raises:
            ValueError: the context length is below 3, or the arguments do not fit together.
        """
        super().__init__(context_length)
        self._vocab, self._merges = dict(vocab), [(left, right) for left, right in merges]
        self._special = {**DEFAULT_SPECIAL, **(special or {})}
        self._added = dict(added or {})
        names = {key: token_text(token) for key, token in self._special.items()}
        self._backend = _backend(self._vocab, self._merges, unk=names["unk_token"])
        _add_tokens(self._backend, self._special, self._added)
        ids = self._backend.get_vocab()
        self.bos_id, self.eos_id = ids[names["bos_token"]], ids[names["eos_token"]]
        self.pad_id = ids[names["pad_token"]]
        self._backend.post_processor = processors.RobertaProcessing(
            (names["eos_token"], self.eos_id), (names["bos_token"], self.bos_id), False, False
        )
        self._groups = _groups(self.added_words, ids, most=self.context_length)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, special and added ones included."""
        return self._backend.get_vocab()

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of special tokens, by the names of fields of a text encoder's config."""
        ids = (self.bos_id, self.eos_id, self.pad_id)
        return dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))

    @property
    def identity(self) -> str:
        """A digest of all that decides which tokens a text becomes."""
        ids = (self.bos_id, self.eos_id, self.pad_id, self.context_length)
        content = [sorted(self._backend.get_vocab().items()), self._merges, ids]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def with_token(self, token: str, count: int = 1) -> Tokenizer:
        """Return a tokenizer with a word more, which becomes `count` tokens, those of the next ids.

        Raises:
            TokenizerError: the vocabulary has the word, or the context has no room for its tokens.
        """
        if not token.strip() or token != token.strip():
            raise TokenizerError(f"the token {token!r} is empty, or has spaces around it")
        room = self.context_length - self.marks_before - self.marks_after
        if not 1 <= count <= room:
            raise TokenizerError(
                f"the token {token!r} has {count} vectors; expected 1 to {room}, for captions have "
                f"{self.context_length} tokens"
            )
        names = [token, *(f"{token}_{i}" for i in range(1, count))]
        # A text with a number after it belongs to the word before the number.
        stem, _, number = token.rpartition("_")
        follows = number.isdecimal() and stem in self.added_words
        ends = [f"{token}_{count}", *([stem] if follows else [])]
        words = {
            form.lower(): form
            for name in self.vocabulary
            for form in (name, name.removesuffix(END_OF_WORD))
        }
        if there := [words[name.lower()] for name in (*names, *ends) if name.lower() in words]:
            raise TokenizerError(
                f"the token {token!r}: the tokenizer has {there[0]!r} in its vocabulary already; "
                "choose another word, such as '<my-cat>'"
            )
        new = {self.largest_id + 1 + i: {"content": name, **_WORD} for i, name in enumerate(names)}
        return Tokenizer(
            self._vocab, self._merges, context_length=self.context_length,
            special=self._special, added={**self._added, **new},
        )  # fmt: skip

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # encode_batch starts threads, which takes longer than one caption.
        if len(texts) == 1:
            rows = [self._backend.encode(texts[0]).ids]
        else:
            rows = [encoding.ids for encoding in self._backend.encode_batch(list(texts))]
        if not self._groups:
            return rows
        return [[i for first in row for i in self._groups.get(first, (first,))] for row in rows]

    @property
    def added_words(self) -> tuple[str, ...]:
        """The added tokens that are not in the vocabulary of the files."""
        return tuple(t["content"] for t in self._added.values() if t["content"] not in self._vocab)

    def length_of_word(self, first: int) -> int:
        """Return how many tokens a word of added ones has, by its first; 1 for all others."""
        return len(self._groups.get(first, (first,)))

    def _cut(self, ids: Sequence[int]) -> int:
        """Return how many tokens stay: those of one added word stay together, or none does."""
        at, most = 0, super()._cut(ids)
        while at < most and at + (length := self.length_of_word(ids[at])) <= most:
            at += length
        return at

    @classmethod
    def load(
        cls,
        folder: paths.PathLike,
        context_length: int | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """Read a `CLIPTokenizer` folder.

        It has vocab.json and merges.txt (transformers 4, the hub), or tokenizer.json (transformers
        5). `context_length` and `pad_token` default to the folder's own. Raises TokenizerError.
        """
        folder = paths.to_path(folder)
        again = "copy the folder again"
        with explained(folder, "a CLIP tokenizer", error=TokenizerError, remedy=again):
            return cls(**read_folder(folder, context_length, pad_token))

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        vocab_size: int,
        context_length: int = DEFAULT_CONTEXT_LENGTH,
    ) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens in CLIP's layout.

        It has 256 bytes, 256 bytes that end a word, merges by rank, BOS and EOS. The same captions
        give the same vocabulary. Raises ValueError where `vocab_size` is too small for the bytes.
        """
        alphabet = _byte_alphabet()
        alphabet += [byte + END_OF_WORD for byte in alphabet]
        smallest = len(alphabet) + 2
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size = {vocab_size}: the bytes, BOS and EOS alone take {smallest}"
            )
        backend = _backend({}, [], unk=None)
        # As special tokens, the alphabet has fixed ids; the trainer breaks ties by id.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=alphabet,
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        )
        backend.train_from_iterator((valid_text(text) for text in captions), trainer)
        model = json.loads(backend.to_str())["model"]
        vocab = dict(model["vocab"])
        vocab.update({BOS: len(vocab), EOS: len(vocab) + 1})
        return cls(vocab, merge_pairs(model["merges"]), context_length=context_length)

    def save(self, folder: paths.PathLike) -> None:
        """Write a folder for `load` and for transformers' `CLIPTokenizer`. Raises WriteError."""
        folder = paths.to_path(folder)
        paths.make_folder(folder)
        vocab = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        _write_json(folder / "vocab.json", vocab, indent=None)
        merges = "".join(f"{left} {right}\n" for left, right in self._merges)
        paths.write_text(folder / "merges.txt", "#version: 0.2\n" + merges)
        _write_json(folder / "special_tokens_map.json", _as_special_map(self._special))
        new = {
            token["content"]: index
            for index, token in sorted(self._added.items())
            if token["content"] not in self._vocab
        }
        if new:
            _write_json(folder / "added_tokens.json", new)
        tokens = {
            str(index): json.loads(_token_json(token))
            for index, token in sorted(self._backend.get_added_tokens_decoder().items())
        }
        config = {
            "tokenizer_class": self.transformers_class,
            "model_max_length": self.context_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            "added_tokens_decoder": tokens,
            **{key: token_text(token) for key, token in self._special.items()},
        }
        _write_json(folder / "tokenizer_config.json", config)


def _backend(
    vocab: dict[str, int], merges: list[tuple[str, str]], *, unk: str | None
) -> tokenizers.Tokenizer:
    """The pipeline from text to subwords: normalise, split into words, bytes, merge."""
    pieces: dict[str, Any] = {"unk_token": unk} if unk is not None else {}
    if vocab:
        pieces |= {"vocab": vocab, "merges": merges}
    try:
        model = models.BPE(
            end_of_word_suffix=END_OF_WORD, continuing_subword_prefix="", fuse_unk=False, **pieces
        )
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the vocabulary and its merges do not fit together: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _add_tokens(
    backend: tokenizers.Tokenizer,
    special: Mapping[str, str | dict[str, Any]],
    added: Mapping[int, dict[str, Any]],
) -> None:
    """Add the tokens that are taken whole. The first mention of a token sets its flags."""
    names = {token_text(token) for token in special.values()}
    for index, arguments in sorted(added.items()):
        flags = {**arguments, "special": arguments.get("special", False)}
        if arguments["content"] in names:
            flags["special"] = True
        backend.add_tokens([AddedToken(**flags)])
        got = backend.token_to_id(arguments["content"])
        if got != index:
            raise ValueError(
                f"added token {brief(arguments['content'])} has id {index}, but gets {got} after a "
                f"vocabulary of {backend.get_vocab_size(with_added_tokens=False)}; the tokenizer's "
                "files do not belong together"
            )
    for token in special.values():
        arguments = token_arguments(token)
        backend.add_tokens([AddedToken(**{**arguments, "special": True})])


def _groups(
    names: Sequence[str], ids: Mapping[str, int], *, most: int
) -> dict[int, tuple[int, ...]]:
    """{id of X: up to `most` ids of X, X_1, X_2, ...} of the added tokens that have followers."""
    groups, there = {}, set(names)
    for name in names:
        every = [name]
        while len(every) < most and (following := f"{name}_{len(every)}") in there:
            every.append(following)
        if len(every) > 1:
            groups[ids[name]] = tuple(ids[one] for one in every)
    return groups


def _byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in CLIP's order (GPT-2, `bytes_to_unicode`)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(byte) for byte in own] + [chr(256 + n) for n in range(256 - len(own))]


def _as_special_map(special: Mapping[str, str | dict[str, Any]]) -> dict[str, Any]:
    """The content of special_tokens_map.json, which has no `special` flag: every token in it is."""
    drop = ("__type", "special")
    return {
        key: token if isinstance(token, str) else {k: token[k] for k in token if k not in drop}
        for key, token in special.items()
    }


def _token_json(token: AddedToken) -> str:
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return json.dumps({key: getattr(token, key) for key in keys})


def _write_json(path: paths.Path, content: Any, indent: int | None = 2) -> None:
    paths.write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
