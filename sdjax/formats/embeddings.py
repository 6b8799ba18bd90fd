"""Files of words that a model has learnt (textual inversion), as the programs of others have them.

    {"<cat>": [n, d]}                            diffusers; SDXL has a second file beside it, NAME_2
    {"emb_params": [n, d]}                       kohya; the word is the file's name
    {"clip_l": [n, 768], "clip_g": [n, 1280]}    kohya, A1111 and ComfyUI, of SDXL
    {"string_to_param": {"*": [n, d]}, ...}      A1111, a .pt; the word is the file's name

A row alone, [d], is one of n = 1. Sources: diffusers loaders/textual_inversion.py; sd-scripts
train_textual_inversion.py; A1111 modules/textual_inversion; ComfyUI comfy/sd1_clip.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.embeddings import Embedding, check_family, with_embeddings
from sdjax.families.family import Family, Model
from sdjax.formats.torch_file import read_tensors
from sdjax.models.weight_checks import describe, is_finite
from sdjax.models.weights import load_file, save_file
from sdjax.system import paths
from sdjax.system.untrusted import brief, check_regular, plain

# Names of rows in a file of several encoders, in the order of the family's text encoders.
FOLDER = "embedding"  # of the workdir of a run that has learned words
_ROWS = ("clip_l", "clip_g")
_NAMELESS = ("emb_params", "*")  # names of rows that are no words
_FIRST, _SECOND = "learned_embeds", "learned_embeds_2"  # diffusers' names of files
_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt")
_MOST_BYTES = 64 * 2**20  # of a file; 75 rows of SDXL have 0.6 MB
_LONGEST_WORD = 100  # letters


class EmbeddingError(UserError):
    """A file of an embedding that cannot be read, or is not the model's; the message names it."""


def read_embedding(file: paths.PathLike, model: Model, word: str = "") -> Embedding:
    """Read the rows of a word, in any of the layouts above.

    Args:
        model: whose text encoders the rows are for.
        word: "" for the one that the file has, or else its name.

    Raises:
        EmbeddingError: it is damaged, or not for such text encoders; NaN and Inf are refused.
        WeightsError: it is no whole safetensors or PyTorch file.
    """
    file = paths.to_path(file)
    check_family(model.family)
    tensors = _tensors(file)
    by_encoder, found = _by_encoder(file, tensors, model.family)
    rows = {}
    for name, config in model.text_encoders.items():
        if name not in by_encoder:
            raise EmbeddingError(
                f"{file} has no rows for {name}: {model.family.title} takes clip_l and clip_g in "
                f"one file, or {file.stem}_2{file.suffix} beside it"
            )
        rows[name] = _checked(file, *by_encoder[name], name=name, width=config.hidden_size)
    counts = {name: len(own) for name, own in rows.items()}
    if len(set(counts.values())) > 1:
        raise EmbeddingError(f"{file}: the text encoders have different numbers of rows: {counts}")
    word = word or found or file.stem
    if not 0 < len(word) <= _LONGEST_WORD or not word.isprintable():
        raise EmbeddingError(
            f"{file}: the word is {brief(word)}; expected 1 to {_LONGEST_WORD} letters; give "
            "another as --embedding=FILE:WORD"
        )
    return Embedding(word, rows)


def with_files(model: Model, options: Sequence[str]) -> tuple[Model, list[Embedding]]:
    """Return a model with the words of files, and these.

    Args:
        options: each FILE, FILE:WORD or WORKDIR.

    Raises:
        UserError: a file cannot be read or is not for the model, or it has a word already.
    """
    read = [
        read_embedding(file, model, word)
        for place, word in map(parse_option, options)
        for file in _files(paths.to_path(place), word)
    ]
    return (with_embeddings(model, read) if read else model), read


def _files(place: paths.Path, word: str) -> list[paths.Path]:
    """A file itself; of the workdir of a run, or its folder of words, a file for each word."""
    if not place.is_dir():
        return [place]
    inner = place / FOLDER
    own = inner if paths.exists(inner) else place
    found = [
        f / f"{_FIRST}.safetensors" for f in (own, *sorted(f for f in own.iterdir() if f.is_dir()))
    ]
    found = [file for file in found if paths.exists(file)]
    if not found or (word and len(found) > 1):
        wrong = f"has {len(found)} words, and one name" if found else "has no words"
        raise EmbeddingError(
            f"--embedding={place}{':' if word else ''}{word} {wrong}; expected a file, or the "
            "workdir of a run that has learned words"
        )
    return found


def parse_option(option: str) -> tuple[str, str]:
    """Return (file, word) of FILE or FILE:WORD, where either may have colons; "" for no word.

    Raises:
        EmbeddingError: there is no such file.
    """
    colons = [match.start() for match in re.finditer(":", option)]
    for end in (len(option), *reversed(colons)):
        if option[:end] and paths.exists(paths.to_path(option[:end])):
            return option[:end], option[end + 1 :]
    raise EmbeddingError(f"--embedding={option}: no such file; expected FILE, or FILE:WORD")


def write_embeddings(
    folder: paths.Path, family: Family, embeddings: Sequence[Embedding]
) -> list[paths.Path]:
    """Write words for other programs: those of diffusers, and WORD.safetensors for all others.

    Where there are several words, each has a folder of its own.

    Returns:
        The files.

    Raises:
        WriteError: of the disk.
    """
    written = []
    encoders = list(family.encoders)
    for embedding, name in zip(embeddings, file_names(embeddings), strict=True):
        own = folder if len(embeddings) == 1 else folder / name
        paths.make_folder(own)
        rows = {encoder: np.asarray(x, np.float32) for encoder, x in embedding.rows.items()}
        files = {
            (_FIRST if len(rows) == 1 or encoder == encoders[0] else _SECOND): {embedding.token: x}
            for encoder, x in rows.items()
        }
        keys = {encoder: key for key, encoder in _encoders(family).items()}
        one = len(encoders) == 1
        files[name] = {embedding.token if one else keys[encoder]: x for encoder, x in rows.items()}
        for stem, content in files.items():
            save_file(content, own / f"{stem}.safetensors")
            written.append(own / f"{stem}.safetensors")
    return written


def file_names(embeddings: Sequence[Embedding]) -> list[str]:
    """Return a name for the files of each word: its letters and digits, told apart by numbers."""
    names: list[str] = []
    for embedding in embeddings:
        name = re.sub(r"[^\w.-]+", "_", embedding.token).strip("._-") or "word"
        taken = {*names, _FIRST, _SECOND}
        numbered = (f"{name}-{i}" for i in range(2, len(embeddings) + 4))
        names.append(next(n for n in (name, *numbered) if n not in taken))
    return names


def _tensors(file: paths.Path) -> dict[str, np.ndarray]:
    """{name: array} of a file, before anything but its size is checked."""
    if file.suffix not in _SUFFIXES:
        raise EmbeddingError(f"{file}: expected a file {', '.join(_SUFFIXES)}")
    if (size := check_regular(file)) > _MOST_BYTES:
        raise EmbeddingError(
            f"{file} has {size:,} bytes; the rows of a word have less than {_MOST_BYTES:,}. Is it "
            "a whole model?"
        )
    if file.suffix == ".safetensors":
        return load_file(file)
    return read_tensors(file, inner=("string_to_param",))


def _by_encoder(
    file: paths.Path, tensors: Mapping[str, np.ndarray], family: Family
) -> tuple[dict[str, tuple[str, np.ndarray]], str]:
    """({text encoder: (name in the file, array)}, the word or "")."""
    if tensors.keys() and tensors.keys() <= set(_ROWS):
        encoders = _encoders(family)
        found = {encoders[n]: (n, value) for n, value in tensors.items() if n in encoders}
        if others := [name for name in tensors if name not in encoders]:
            raise EmbeddingError(
                f"{file} has {', '.join(tensors)}, and {family.title} has nothing that reads "
                f"{others[0]}: it is an embedding of SDXL"
            )
        return found, ""
    name, value = _only(file, tensors)
    first, *others = family.encoders
    found = {first: (name, value)}
    beside = file.with_name(f"{file.stem}_2{file.suffix}")
    if others and paths.exists(beside):
        found[others[0]] = _only(beside, _tensors(beside))
    return found, "" if name in _NAMELESS else name


def _encoders(family: Family) -> dict[str, str]:
    """{name of rows: text encoder} of a family."""
    return dict(zip(_ROWS, family.encoders, strict=False))


def _only(file: paths.Path, tensors: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The name and the array of a file of one word."""
    if len(tensors) != 1:
        names = ", ".join(plain(name) for name in list(tensors)[:4])
        raise EmbeddingError(
            f"{file} has {len(tensors)} arrays ({names}); expected the rows of one word, or clip_l "
            "and clip_g"
        )
    return next(iter(tensors.items()))


def _checked(file: paths.Path, key: str, value: np.ndarray, *, name: str, width: int) -> np.ndarray:
    """The rows as float32 [n, width]. EmbeddingError if they are none of a text encoder."""
    where = f"{file}: {plain(key)}"
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise EmbeddingError(f"{where} is of {value.dtype}; expected floats")
    if value.ndim not in (1, 2) or not value.size:
        raise EmbeddingError(f"{where} is {value.shape}; expected [n, {width}] or [{width}]")
    if value.shape[-1] != width:
        raise EmbeddingError(
            f"{where} has rows of {value.shape[-1]} numbers, and {name} of the model rows of "
            f"{width}: it was made for another model (768 are of SD1, 1024 of SD2, 768 and 1280 of "
            "SDXL)"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 is Inf, which is told below
        rows = np.atleast_2d(np.asarray(value, np.float32))
    if not is_finite(rows):
        raise EmbeddingError(f"{describe(where, rows)}; get it again, or another")
    return rows
