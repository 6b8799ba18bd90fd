"""The types that all readers of raw data share: shards, rows, and skips with their reason."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from sdjax.data.config import DataError
from sdjax.data.named_images import NamedImage
from sdjax.data.raw.tree import Links, walk
from sdjax.system import paths, untrusted

# Endings of pictures in the formats `image_files.FORMATS`.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".mpo"
)  # fmt: skip
CAPTION_SUFFIXES = (".txt", ".caption", ".cap")  # of files beside a picture; the first one is read
SPLITS = ("train", "validation", "test")
OUTSIDE = "data.outside_links (--outside_links) reads what links lead to outside of the folder"
# The words of Hugging Face datasets (data_files.py, SPLIT_KEYWORDS) ...
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_LAST_WORDS = ("dev", "testing", "eval", "evaluation")  # ... these only at the end of a name
# img2dataset's names for the size of a picture before it was stored smaller.
ORIGINAL = ("original_height", "original_width")
# (a row's or skip's name, its split) -> whether the reader should yield it
Chosen = Callable[[str, str], bool]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the data's parts: JSON fields of folders and tars, columns of parquet."""

    image: str = "image"  # for parquet alone
    text: str = "text"  # the main caption; in tars "text" is the .txt, else a field of the .json
    captions: str = "captions"  # a list of alternatives, optional
    columns: tuple[str, ...] = ()  # others to pass on, such as scores
    images: tuple[NamedImage, ...] = dataclasses.field(default=(), repr=False)

    @property
    def handed_on(self) -> tuple[str, ...]:
        """The fields that go into `Row.columns`, if the data has them."""
        return (*self.columns, *ORIGINAL)

    @property
    def texts(self) -> tuple[str, ...]:
        """The fields that may hold the main caption: `text`, and `caption` besides the default."""
        return (self.text, "caption") if self.text == "text" else (self.text,)

    def caption(self, entry: Mapping[str, Any]) -> Any:
        """The main caption of a row, unchecked; None if it has no such field."""
        return next((entry[name] for name in self.texts if entry.get(name) is not None), None)

    def sought(self, entry: Iterable[str]) -> str:
        """Words for the fields that may hold a caption, and for the fields that a row has."""
        there = ", ".join(untrusted.brief(name) for name in list(entry)[:12])
        return f"no field {' or '.join(map(repr, self.texts))}; it has {there or 'none'}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One image and its captions as they were found; only the image's path is checked."""

    name: str  # the image's path below the root, or its place in a shard; unique except repeats
    split: str
    image: bytes | None
    text: Any
    captions: Any = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""  # the line of the metadata, where it is not the name
    sought: str = ""  # the places where a caption was not found
    images: Mapping[str, bytes | None] = dataclasses.field(default_factory=dict)  # by name


@dataclasses.dataclass(frozen=True)
class Skip:
    """A row, a metadata line or a shard that was left out, and the reason."""

    name: str
    reason: str  # a short word, for counting
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The syntax of a metadata file.

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

    `start`, `stop` (bytes, or rows of parquet) and `line` (number of the first) are those of a
    stretch of metadata, and `dialect` is its syntax. `names` are images with captions beside them,
    in files with the endings `captions` ("" for none). `split` is that of every row, except those
    of
    `folders`: (folder of the row's image, split). `nearer` are metadata files in folders below this
    one's, which take precedence for the images that they name. `outside`: links may lead out of the
    root.
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
    captions: tuple[str, ...] = ()
    folders: tuple[tuple[str, str], ...] = ()
    nearer: tuple[str, ...] = ()
    outside: bool = False

    @property
    def name(self) -> str:
        """The path below the root."""
        return relative(self.path, self.root)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of its rows."""
        return tuple(dict.fromkeys((self.split, *(split for _, split in self.folders))))


@dataclasses.dataclass(frozen=True)
class Survey:
    """The parts of a source, as far as they are known before any row is read.

    made: {split: {its origin, in words: number of rows or files}}.
    passed_over: number of files without a row, by ending. unnamed: number of pictures that no
      metadata
    file names, by ending. remarks: other lines for the user.
    """

    shards: list[Shard]
    made: Mapping[str, Mapping[str, int]]
    unit: str  # of the counts of `made`: "row" or "file"
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unnamed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The survey as lines for people."""
        said = []
        for split in SPLITS:
            for reason, count in self.made.get(split, {}).items():
                plural = "" if count == 1 else "s"
                said.append(f"split {split}: {count:,} {self.unit}{plural}, {reason}")
        if self.unnamed:
            said.append(f"{_total(self.unnamed, 'picture')} that no metadata file names: "
                        f"{by_ending(self.unnamed)}")  # fmt: skip
        if self.passed_over:
            said.append(passed_over(self.passed_over))
        return [*said, *self.remarks]


def passed_over(endings: Mapping[str, int]) -> str:
    """A line such as "6 files passed over: 3 .heic, 2 .jxl, 1 .tiff"."""
    return f"{_total(endings, 'file')} passed over: {by_ending(endings)}"


def by_ending(endings: Mapping[str, int]) -> str:
    """The counts by ending, the most frequent first: "3 .heic, 2 .jxl"."""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - 12} other endings" if len(ordered) > 12 else ""
    return ", ".join(f"{count:,} {ending}" for ending, count in ordered[:12]) + more


def _total(endings: Mapping[str, int], what: str) -> str:
    count = sum(endings.values())
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class BadRow(ValueError):
    """A row that cannot be used; `reason` is a short word for counting, `detail` explains it."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def raised(error: Exception) -> tuple[str, str]:
    """The reason and the detail of a row whose reading raised this error."""
    if isinstance(error, BadRow):
        return error.reason, shown(error.detail)
    text = " ".join(str(error).split())[:200]
    return "bad_record", shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def relative(path: str, root: str) -> str:
    """A path below the root; the root's own name when it is the file itself."""
    below = path.removeprefix(root.rstrip("/")).lstrip("/")
    return below or path.rstrip("/").rsplit("/", 1)[-1]


def split_word(name: str) -> str:
    """The split that a folder or file is named after, as in `val`, `test_images`; "" for none."""
    words = [word for word in re.split(r"[\W\d_]+", name.lower()) if word and word != "of"]
    for word in words:
        if word in SPLIT_WORDS and (word not in _LAST_WORDS or word == words[-1]):
            return SPLIT_WORDS[word]
    return ""


def split_of(name: str) -> str:
    """The split of a shard, from the names of its folders or else from its name; else train."""
    *folders, file = name.split("/")
    stem = re.sub(r"\.(parquet|tar|tar\.gz|tgz)$", "", file, flags=re.IGNORECASE)
    for part in (*folders, stem):
        if split := split_word(part):
            return split
    return "train"


def fraction(name: str) -> float:
    """A number in [0, 1) of a name, the same for ever: the start of its SHA-256."""
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def ending(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; "no ending" for none."""
    stem, dot, last = name.rpartition(".")
    return f".{last.lower()}" if stem and dot and len(last) <= 16 else "no ending"


def caption_files(stem: str) -> str:
    """The files that may hold a picture's caption, in words: "a.txt, a.caption or a.cap"."""
    *others, last = (f"{stem}{end}" for end in CAPTION_SUFFIXES)
    return f"{', '.join(others)} or {last}"


def find_shards(path: str, suffixes: tuple[str, ...], format: str, *, outside: bool) -> Survey:
    """One shard for each such file of a folder or of a pattern (`*`, `?`), or for the file itself.

    outside: links may lead out of the folder.

    Raises DataError when there is none.
    """
    root = paths.to_path(path)
    others: Counter[str] = Counter()
    links = Links()
    if root.is_dir():
        files = []
        for folder, names in walk(root, links, outside=outside):
            for name in names:
                if name.lower().endswith(suffixes):
                    files.append(root / folder / name)
                else:
                    others[ending(name)] += 1
    elif root.exists():
        files = [root]
    else:
        root, files = _expand(root)
    if not files:
        there = f", but {by_ending(others)}" if others else ""
        raise DataError(
            f"data.path (--input) is {path!r}, where there is no file that ends in "
            f"{' or '.join(suffixes)}{there}; expected such a file, a folder with some, or a "
            f"pattern such as DIR/train-*{suffixes[0]}"
        )
    shards = [
        Shard(
            format, str(root), str(file), split_of(relative(str(file), str(root))), outside=outside
        )
        for file in files
    ]
    return Survey(shards, _made_by_names(shards), "file", others, {}, links_left(links))


def _made_by_names(shards: list[Shard]) -> dict[str, dict[str, int]]:
    """The counts of `Survey.made`, for shards."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for shard in shards:
        says = any(split_word(part) for part in shard.name.split("/"))
        groups.setdefault((shard.split, says), []).append(shard.name)
    made: dict[str, dict[str, int]] = {}
    for (split, says), names in groups.items():
        reason = f"by names such as {names[0]}" if says else "whose names say no split"
        made.setdefault(split, {})[reason] = len(names)
    return made


def links_left(links: Links) -> tuple[str, ...]:
    """Remarks on links to folders that are not followed, if there are any."""
    remarks = []
    for found, what in (
        (links.back, "to folders that are read already, not followed"),
        (links.out, f"to folders outside of this one, not followed ({OUTSIDE})"),
    ):
        if found:
            some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            remarks.append(f"{len(found)} link(s) {what}: {some}")
    return tuple(remarks)


def _expand(pattern: paths.Path) -> tuple[paths.Path, list[paths.Path]]:
    """The folder that a pattern starts from, and its matches; an existing part of it is a name."""
    if not any(sign in str(pattern) for sign in "*?["):
        return pattern, []
    least = 3 if paths.is_remote(pattern) else 0  # "/", "gs" and the bucket
    above = [folder for folder in pattern.parents if len(folder.parts) >= least]
    base = next((folder for folder in above if folder.exists()), above[-1])
    parts = pattern.parts[len(base.parts) :]
    if "**" in parts:
        raise DataError(
            f"data.path (--input) is {str(pattern)!r}; `**` is not known: name the folder alone, "
            "and all below it is read"
        )
    found = [base]
    for part in parts:
        found = [
            child
            for folder in found
            for child in ([folder / part] if (folder / part).exists() else folder.glob(part))
        ]
    return base, sorted(found, key=str)


def stamp(file: paths.Path) -> str:
    """A file's size and time, or "missing"."""
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
