"""The files of a CLIP tokenizer's folder; errors name the file, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdjax.errors import UserError
from sdjax.system import paths, text_files
from sdjax.system.untrusted import brief

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
DEFAULT_CONTEXT_LENGTH = 77  # OpenAI CLIP, clip/model.py
# The defaults of transformers for special tokens, in the order it adds them.
DEFAULT_SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
MOST_TOKENS, MOST_ADDED = 2_097_152, 10_000  # CLIP has 49,408 tokens, and 2 added ones


class TokenizerError(UserError):
    """A tokenizer folder that cannot be read; the message names the file and the reason."""


def read_folder(
    folder: paths.Path, context_length: int | None, pad_token: str | None
) -> dict[str, Any]:
    """The arguments of `Tokenizer` in a folder. Raises TokenizerError."""
    file = folder / "tokenizer_config.json"
    config = read_json(file, default={})
    special = {key: config[key] for key in DEFAULT_SPECIAL if config.get(key) is not None}
    vocab, merges, tokens = _read_vocabulary(folder)
    if "added_tokens_decoder" in config:  # then transformers reads no other list of tokens
        tokens = _of(dict, config["added_tokens_decoder"], file, "added_tokens_decoder")
    else:
        overrides = read_json(folder / "special_tokens_map.json", default={})
        special.update({key: overrides[key] for key in DEFAULT_SPECIAL if key in overrides})
        names = {token_text(token) for token in special.values()}
        for text, index in read_json(folder / "added_tokens.json", default={}).items():
            is_special = text in names
            flags = {"normalized": not is_special, "special": is_special}
            tokens.setdefault(index, {"content": text, **flags})
    added = {int(index): token_arguments(token) for index, token in tokens.items()}
    if len(added) > MOST_ADDED:
        raise TokenizerError(f"{folder}: {len(added):,} added tokens; expected up to {MOST_ADDED}")
    if pad_token is not None:
        special["pad_token"] = pad_token
    length = own_length(config, file, context_length, DEFAULT_CONTEXT_LENGTH)
    return {
        "vocab": vocab, "merges": merges, "context_length": length, "special": special,
        "added": added,
    }  # fmt: skip


def own_length(
    config: dict[str, Any], file: paths.Path, context_length: int | None, default: int
) -> int:
    """Return the length of rows: the given one, or that of a tokenizer_config.json.

    Raises:
        TokenizerError: the file's is no length.
    """
    length = context_length or config.get("model_max_length", default)
    if not isinstance(length, int | float) or isinstance(length, bool) or not length >= 1:
        raise TokenizerError(f"{file}: model_max_length is {brief(length)}; expected a number")
    # transformers writes 1e30 for an unknown length
    return default if length > 1e6 else int(length)


def _of(kind: type, value: Any, file: paths.Path, field: str) -> Any:
    """Return the value. TokenizerError if it is of another kind."""
    if not isinstance(value, kind):
        raise TokenizerError(f"{file}: {field} is {brief(value)}; expected a {kind.__name__}")
    return value


def _checked_vocabulary(vocab: Any, file: paths.Path) -> dict[str, int]:
    """Return the vocabulary. TokenizerError unless it is {text: id} with different ids."""
    for token, index in _of(dict, vocab, file, "the vocabulary").items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MOST_TOKENS:
            raise TokenizerError(
                f"{file}: the token {brief(token)} has the id {brief(index)}; expected 0 to "
                f"{MOST_TOKENS - 1:,}"
            )
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"{file}: two tokens have the same id")
    return vocab


def _read_vocabulary(
    folder: paths.Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[Any, dict[str, Any]]]:
    """The vocabulary, the merges and the added tokens by id.

    tokenizer.json wins over the other files, as in transformers.
    """
    single = folder / "tokenizer.json"
    if single.is_file():
        content = read_json(single)
        model = _of(dict, content.get("model", {}), single, "model")
        kind, suffix = model.get("type"), model.get("end_of_word_suffix")
        if kind not in ("BPE", None) or suffix != END_OF_WORD or "vocab" not in model:
            raise TokenizerError(
                f"{single}: expected CLIP's BPE model with end_of_word_suffix {END_OF_WORD!r}, "
                f"found type {brief(kind)} with {brief(suffix)}; sdjax reads CLIP tokenizers only"
            )
        tokens = {entry["id"]: entry for entry in content.get("added_tokens", [])}
        added = {
            index: {key: value for key, value in entry.items() if key != "id"}
            for index, entry in tokens.items()
        }
        vocab = _checked_vocabulary(model["vocab"], single)
        return vocab, merge_pairs(_of(list, model.get("merges"), single, "merges")), added
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise TokenizerError(
            f"{folder}: no {' and no '.join(missing)}; expected a CLIP tokenizer folder with "
            "vocab.json and merges.txt, or tokenizer.json"
        )
    try:
        lines = text_files.lines(text_files.read_text(folder / "merges.txt"))
    except text_files.TextError as error:
        raise TokenizerError(f"{error}; copy the file again") from error
    merges = [line for line in lines if line and not line.startswith("#version")]
    file = folder / "vocab.json"
    return _checked_vocabulary(read_json(file), file), merge_pairs(merges), {}


def merge_pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """The merges as pairs; files hold them as "a b" or as ["a", "b"]. Raises TokenizerError."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    for rank, pair in enumerate(pairs):
        if len(pair) != 2:
            raise TokenizerError(f"merge {rank} is {brief(pair)}: expected two tokens")
    return pairs  # type: ignore[return-value]


def token_text(token: str | dict[str, Any]) -> str:
    """The text of a token, which files hold alone or with flags. Raises TokenizerError."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TokenizerError(f"a token is {brief(token)}; expected a text, or a group with content")
    return text


def token_arguments(token: str | dict[str, Any]) -> dict[str, Any]:
    """The arguments of an `AddedToken`. Raises TokenizerError."""
    if isinstance(token, str):
        return {"content": token}
    token_text(token)
    return {key: value for key, value in token.items() if key not in ("__type", "id")}


def read_json(path: paths.Path, default: Any = None) -> Any:
    """The JSON object in a file, or `default` if the file is missing."""
    if default is not None and not path.is_file():
        return default
    try:
        content = text_files.read_json(path)
    except text_files.TextError as error:
        raise TokenizerError(f"{error}; copy the file again") from error
    return _of(dict, content, path, "its content")
