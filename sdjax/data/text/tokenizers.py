"""The kinds of tokenizers, by the names that the parts of families have for them."""

from __future__ import annotations

from sdjax.data.text.t5_tokenizer import T5Tokenizer
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.system import paths

KINDS: dict[str, type[Tokenizer] | type[T5Tokenizer]] = {"clip": Tokenizer, "t5": T5Tokenizer}


def load_tokenizer(
    kind: str,
    folder: paths.PathLike,
    context_length: int | None = None,
    pad_token: str | None = None,
) -> TextTokenizer:
    """Read a tokenizer's folder; see the `load` of its class. Raises TokenizerError."""
    return KINDS[kind].load(folder, context_length=context_length, pad_token=pad_token)


def inner_folder(folder: paths.PathLike, name: str) -> paths.Path:
    """Return the folder `name` of a pipeline, or the folder itself if it is no pipeline."""
    folder = paths.to_path(folder)
    return folder / name if (folder / name).is_dir() else folder
