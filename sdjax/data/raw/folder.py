"""Reads an image folder: captions in `metadata.jsonl` or `metadata.csv`, or in a .txt beside each.

The imagefolder convention: a metadata file beside the images, or one in each of the subfolders
`train`, `test` and `validation`, with `file_name` and a caption in every line. Without any metadata
file every image is taken whose name, ending in .txt, is its caption's file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from sdjax import paths
from sdjax.data.raw.metadata import parse, read_dialect, row_ends
from sdjax.data.raw.rows import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    BadRow,
    Chosen,
    Fields,
    Row,
    Shard,
    Skip,
    find,
    relative,
    shown,
    split_of,
    stamp,
)
from sdjax.data.sources import DataError

FORMAT = "image_text_folder"
METADATA = "metadata.jsonl"
CSV = "metadata.csv"
ROWS_PER_SHARD = 500  # small enough to share out, large enough to be worth a file of its own


def shards(path: str) -> list[Shard]:
    """Stretches of a folder's metadata. Raises DataError when it is no folder or has no images."""
    folder = paths.to_path(path)
    if not folder.is_dir():
        raise DataError(
            f"data.path (--input) is {path!r}, which is "
            f"{'no folder' if folder.exists() else 'not there'}; expected a folder of images with "
            f"{METADATA}"
        )
    found = _metadata_files(folder)
    if found:
        return [shard for split, file in found for shard in _stretches(folder, split, file)]
    names = [relative(str(file), str(folder)) for file in find(folder, IMAGE_SUFFIXES)]
    if not names:
        raise DataError(
            f"data.path (--input) is {path!r}, which has no {METADATA}, nor has a subfolder "
            f'train or test, nor images; write one with a line {{"file_name": "a.png", "text": '
            f'"a caption"}} for each image, or put a.txt with the caption beside each a.png'
        )
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(split_of(name) if "/" in name else "train", []).append(name)
    root = str(folder)
    return [
        Shard(FORMAT, root, root, split, names=tuple(group[at : at + ROWS_PER_SHARD]))
        for split, group in by_split.items()
        for at in range(0, len(group), ROWS_PER_SHARD)
    ]


def _metadata_files(folder: paths.Path) -> list[tuple[str, paths.Path]]:
    """(split, metadata file) of each split; the folder's own metadata is one called train."""
    for name in (METADATA, CSV):
        if (folder / name).is_file():
            return [("train", folder / name)]
    found = []
    for child in sorted(folder.iterdir(), key=lambda path: path.name):
        if child.name.lower() in SPLIT_NAMES:
            files = [child / name for name in (METADATA, CSV) if (child / name).is_file()]
            found += [(SPLIT_NAMES[child.name.lower()], file) for file in files[:1]]
    return found


def has_metadata(folder: paths.Path) -> bool:
    """Whether a folder or one of its splits has a metadata file."""
    return bool(_metadata_files(folder))


def _stretches(folder: paths.Path, split: str, metadata: paths.Path) -> Iterator[Shard]:
    """Cuts a metadata file into shards of ROWS_PER_SHARD rows."""
    dialect = read_dialect(metadata)
    start, line, count = 0, 1, 0
    stop = last = 0
    for last, stop, cells in row_ends(metadata, dialect):
        if dialect.kind == "csv" and not dialect.header:
            dialect = dataclasses.replace(dialect, header=tuple(cells))
            if "file_name" not in cells:
                raise DataError(
                    f"{metadata} has the columns {cells}; expected file_name among them"
                )
            start, line = stop, last + 1
            continue
        count += 1
        if count == ROWS_PER_SHARD:
            yield Shard(FORMAT, str(folder), str(metadata), split, start, stop, line, dialect)
            start, line, count = stop, last + (dialect.kind != "values"), 0
    if count:
        yield Shard(FORMAT, str(folder), str(metadata), split, start, stop, line, dialect)


def read(shard: Shard, fields: Fields, chosen: Chosen) -> Iterator[Row | Skip]:
    """The rows of a shard, each with its image's bytes, or why there is none."""
    root = paths.to_path(shard.root)
    for place, entry in _entries(shard):
        if isinstance(entry, BadRow):
            if chosen(place):
                yield Skip(place, entry.reason, entry.detail)
            continue
        name = entry["file_name"]
        if not chosen(name):
            continue
        try:
            image = (root / name).read_bytes()
            if shard.names:
                entry[fields.text] = _caption_beside(root / name)
        except paths.storage_errors() as error:
            yield Skip(place, "missing_file", str(error)[:200])
            continue
        columns = {column: entry.get(column) for column in fields.handed_on}
        text, captions = entry.get(fields.text), entry.get(fields.captions)
        place = "" if shard.names else place
        yield Row(name, shard.split, image, text, captions, columns, place)


def _caption_beside(image: paths.Path) -> bytes | None:
    try:
        return image.with_suffix(".txt").read_bytes()
    except paths.storage_errors():
        return None


def names(shard: Shard) -> Iterator[str]:
    """The names of a shard's rows, without reading any image."""
    for _, entry in _entries(shard):
        if not isinstance(entry, BadRow):
            yield entry["file_name"]


def marks(shard: Shard) -> Iterator[str]:
    """What changes whenever the shard's metadata or an image or caption of it does."""
    root = paths.to_path(shard.root)
    for place, entry in _entries(shard):
        if isinstance(entry, BadRow):
            yield f"{place} {entry.reason}"
            continue
        name = entry["file_name"]
        files = [root / name]
        if shard.names:
            files.append(files[0].with_suffix(".txt"))
        yield f"{json.dumps(entry)} {' '.join(stamp(file) for file in files)}"


def _entries(shard: Shard) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(place, metadata) of each row; file_name is checked and made one below the root."""
    if shard.names:
        yield from ((name, {"file_name": name}) for name in shard.names)
        return
    base = PurePosixPath(shard.name).parent
    with paths.to_path(shard.path).open("rb") as file:
        file.seek(shard.start)
        stretch = file.read(shard.stop - shard.start)
    for number, entry in parse(stretch, shard.dialect, shard.line):
        place = f"{shard.name} line {number}"
        if isinstance(entry, BadRow):
            yield place, entry
            continue
        try:
            entry["file_name"] = (base / _safe(entry.get("file_name"))).as_posix()
        except BadRow as bad:
            name = entry.get("file_name")
            yield (f"{place} ({shown(name)})" if name and isinstance(name, str) else place), bad
            continue
        yield f"{place} ({entry['file_name']})", entry


def _safe(name: Any) -> PurePosixPath:
    """A path that stays below the folder. Raises BadRow for any other."""
    if not isinstance(name, str) or not name:
        raise BadRow("no_file_name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise BadRow("unsafe_path", "expected a path below the folder")
    if shown(name) != name:
        raise BadRow("bad_encoding", "a file_name with half of a surrogate pair")
    return path
