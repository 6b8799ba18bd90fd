"""What every reader of raw data speaks in: shards, rows, and skips with their reason."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from sdjax import paths
from sdjax.data.sources import DataError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"
)  # fmt: skip
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
# What img2dataset calls the size of a picture before it was stored smaller.
ORIGINAL = ("original_height", "original_width")
Chosen = Callable[[str], bool]  # a row's or skip's name -> whether the reader should yield it


@dataclasses.dataclass(frozen=True)
class Fields:
    """What the data calls its parts: JSON fields of folders and tars, columns of parquet."""

    image: str = "image"  # of parquet alone
    text: str = "text"  # the main caption; in tars "text" is the .txt, or `caption` of the .json
    captions: str = "captions"  # a list of alternatives; it need not be there
    columns: tuple[str, ...] = ()  # others to hand on, such as scores

    @property
    def handed_on(self) -> tuple[str, ...]:
        """All that goes into `Row.columns`, where the data has it."""
        return (*self.columns, *ORIGINAL)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image and its captions as they were found: unchecked, but for the image's place."""

    name: str  # the image's path below the root, or its place in a shard; unique but for repeats
    split: str
    image: bytes | None
    text: Any
    captions: Any = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""  # the line that says all this, where it is not the name


@dataclasses.dataclass(frozen=True)
class Skip:
    """What was left out: the row, the metadata line or the shard, and why."""

    name: str
    reason: str  # a short word, for counting
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a metadata file is written.

    kind: "lines", one JSON object in each; "values", a JSON array or objects over several lines;
    or "csv", which has a delimiter and a header.
    """

    kind: str = "lines"
    encoding: str = "utf-8"
    delimiter: str = ","
    header: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the data that one worker reads, in order: a file, or a stretch of one.

    `start`, `stop` (bytes) and `line` (number of the first) are those of a stretch of metadata,
    `dialect` how that is written; `names` are images that have their captions beside them.
    """

    format: str
    root: str
    path: str
    split: str
    start: int = 0
    stop: int = 0
    line: int = 1
    dialect: Dialect = Dialect()
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path below the root."""
        return relative(self.path, self.root)


class BadRow(ValueError):
    """A row that cannot be used; `reason` is a short word for counting, `detail` says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def relative(path: str, root: str) -> str:
    """A path below the root; the root's own name when it is the file itself."""
    below = path.removeprefix(root.rstrip("/")).lstrip("/")
    return below or path.rstrip("/").rsplit("/", 1)[-1]


def split_of(name: str) -> str:
    """The split that a path says: a folder's name, or the word a file begins with; else train."""
    *folders, file = name.split("/")
    for folder in folders:
        if folder.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.lower()]
    word = re.match(r"[A-Za-z]*", file)
    return SPLIT_NAMES.get(word[0].lower() if word else "", "train")


def fraction(name: str) -> float:
    """A name -> [0, 1), the same for ever: the start of its SHA-256."""
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def find(folder: paths.Path, suffixes: tuple[str, ...]) -> Iterator[paths.Path]:
    """All files below a folder whose names end so, in the order of their names; no hidden ones."""
    for child in sorted(folder.iterdir(), key=lambda path: path.name):
        name = child.name.lower()
        if name.startswith(".") or name == "__macosx":
            continue
        if name.endswith(suffixes):
            yield child
        elif child.is_dir():
            yield from find(child, suffixes)


def find_shards(path: str, suffixes: tuple[str, ...], format: str) -> list[Shard]:
    """One shard for each such file of a folder, of a pattern (`*`, `?`), or for the file itself.

    Raises DataError when there is none.
    """
    root = paths.to_path(path)
    if root.is_dir():
        files = list(find(root, suffixes))
    elif any(sign in path for sign in "*?["):
        base = root.parent
        while any(sign in str(base) for sign in "*?["):
            base = base.parent
        files = sorted(base.glob(str(root)[len(str(base)) :].lstrip("/")), key=str)
        root = base
    else:
        files = [root] if root.exists() else []
    if not files:
        raise DataError(
            f"data.path (--input) is {path!r}, where there is no file that ends in "
            f"{' or '.join(suffixes)}; expected such a file, a folder with some, or a pattern "
            f"such as DIR/train-*{suffixes[0]}"
        )
    return [
        Shard(format, str(root), str(file), split_of(relative(str(file), str(root))))
        for file in files
    ]


def stamp(file: paths.Path) -> str:
    """A file's size and time, or that it is not there."""
    try:
        if paths.is_remote(file):
            remote = epath.Path(file).stat()
            return f"{remote.length} {remote.mtime}"
        local = os.stat(file)
        return f"{local.st_size} {local.st_mtime_ns}"
    except paths.storage_errors():
        return "missing"


def shown(name: str) -> str:
    """A name that can be written down, whatever bytes it came from."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
