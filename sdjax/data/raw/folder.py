"""The reader of image folders: captions in metadata files, or in a .txt or .caption by each image.

The imagefolder convention: `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in the folder or
in folders below it, with `file_name` (a path below the metadata file's folder) and a caption in
every row. Without any metadata file every image is taken, with the caption beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sdjax.data.config import DataError
from sdjax.data.raw import metadata_parquet
from sdjax.data.raw.beside import NamedFiles, is_named
from sdjax.data.raw.files import PathGuard, safe_name
from sdjax.data.raw.layout import FolderContents, join, made_by_folders, split_folders, with_splits
from sdjax.data.raw.limits import MOST_CAPTION_BYTES, MOST_PICTURE_BYTES
from sdjax.data.raw.metadata import parse, read_dialect, row_ends
from sdjax.data.raw.rows import (
    OUTSIDE,
    BadRow,
    Chosen,
    Fields,
    Row,
    Shard,
    Skip,
    Survey,
    by_ending,
    caption_files,
    links_left,
    shown,
    stamp,
)
from sdjax.data.raw.tree import Links, walk
from sdjax.system import paths, untrusted

FORMAT = "image_text_folder"
METADATA = "metadata.jsonl"
CSV = "metadata.csv"
ROWS_PER_SHARD = 500  # small enough to distribute, large enough to be worth a file of its own
_PLAIN = Fields()
_LONGEST_SHOWN = 200  # letters of a name in what is said of a row


def survey(path: str, fields: Fields, *, outside: bool) -> Survey:
    """The images of a folder, in shards. Raises DataError when it is no folder or has none.

    outside: links may lead out of it.
    """
    folder = paths.to_path(path)
    if not folder.is_dir():
        raise DataError(
            f"data.path (--input) is {path!r}, which is "
            f"{'no folder' if folder.exists() else 'not there'}; expected a folder of images with "
            f"{METADATA}"
        )
    contents, links, remarks = FolderContents(), Links(), list[str]()
    inside = PathGuard(str(folder), outside=outside)
    for below, files in walk(folder, links, outside=outside):
        chosen = metadata_of(folder / below, files, inside)
        remarks += [f"{join(below, name)} is not read, for {chosen[0]} beside it is"
                    for name in chosen[1:]]  # fmt: skip
        rows = [file for file in files if not is_named(below, file, fields)]
        contents.add(below, rows, chosen[0] if chosen else "")
    if contents.metadata:
        parts = _described(folder, contents, fields)
    elif contents.names:
        parts = _captioned(folder, contents)
    else:
        raise DataError(_no_images(path, contents))
    counts = Counter[str]()
    for _, of_part in parts:
        counts.update(of_part)
    made, classes = split_folders(counts)
    shards = [
        dataclasses.replace(with_splits(shard, of_part, made), outside=outside)
        for shard, of_part in parts
    ]
    return Survey(
        shards,
        made_by_folders(counts, made),
        "row",
        contents.passed_over(),
        contents.unnamed(),
        (*remarks, *classes, *contents.remarks(made), *links_left(links)),
    )


def metadata_of(folder: paths.Path, files: list[str], inside: PathGuard) -> list[str]:
    """The metadata files among the files of a folder, with the one to read first.

    Raises DataError: one cannot be read, or a link to it leads out of the folder.
    """
    for name in (METADATA, CSV, metadata_parquet.NAME):
        try:
            if name in files:
                inside.check(folder / name)
        except BadRow as bad:
            raise DataError(
                f"{folder / name}: {bad.detail}; put the file itself there, or take it away "
                f"({OUTSIDE})"
            ) from bad
        except paths.storage_errors():
            pass  # reading it reports this error
    found = [name for name in (METADATA, CSV) if name in files]
    if metadata_parquet.NAME in files and metadata_parquet.names_pictures(
        folder / metadata_parquet.NAME
    ):
        found.append(metadata_parquet.NAME)
    return found


def _no_images(path: str, contents: FolderContents) -> str:
    """The message about a folder without images."""
    there = by_ending(contents.passed_over())
    return (
        f"data.path (--input) is {path!r}, which has no {METADATA}, nor has a subfolder train or "
        f"any other, nor images{f', but {there}' if there else ''}; write a "
        f'{METADATA} with a line {{"file_name": "a.png", "text": "a caption"}} for each image, or '
        "put a.txt with the caption beside each a.png"
    )


Parts = list[tuple[Shard, Counter[str]]]  # a shard, and its number of rows in each folder


def _described(folder: paths.Path, contents: FolderContents, fields: Fields) -> Parts:
    """The rows of all metadata files."""
    parts = []
    for name in contents.metadata:
        base = name.removesuffix(posixpath.basename(name))
        others = (other for other in contents.metadata if other != name)
        nearer = tuple(other for other in others if other.startswith(base))
        for shard in _stretches(folder, "train", folder / name):
            pictures = list(names(shard))
            contents.name(pictures)
            contents.name(_named_beside(shard, fields))
            if close := _nearer(set(map(posixpath.dirname, pictures)), nearer):
                shard = dataclasses.replace(shard, nearer=close)
                pictures = list(names(shard))  # without those that nearer files name
            parts.append((shard, Counter(map(posixpath.dirname, pictures))))
    return parts


def _named_beside(shard: Shard, fields: Fields) -> Iterator[str]:
    """The files of the named pictures of a shard, as far as there are any."""
    beside = NamedFiles(shard.root, posixpath.dirname(shard.name), fields, outside=shard.outside)
    for _, entry in _entries(shard) if fields.images else ():
        if not isinstance(entry, BadRow):
            with contextlib.suppress(BadRow):  # reading reports it
                yield from filter(None, beside.files(entry).values())


def _nearer(folders: Iterable[str], metadata: tuple[str, ...]) -> tuple[str, ...]:
    """The metadata files that lie in one of the folders or above it."""
    above = {at for folder in folders for at in _upwards(folder)} if metadata else set()
    return tuple(name for name in metadata if posixpath.dirname(name) in above)


def _upwards(folder: str) -> Iterator[str]:
    """A folder below the root, and all folders above it except the root."""
    while folder:
        yield folder
        folder = posixpath.dirname(folder)


def _captioned(folder: paths.Path, contents: FolderContents) -> Parts:
    """All pictures, each with the ending of the caption beside it."""
    root, parts = str(folder), []
    for at in range(0, len(contents.names), ROWS_PER_SHARD):
        some = tuple(contents.names[at : at + ROWS_PER_SHARD])
        captions = tuple(contents.captions[at : at + ROWS_PER_SHARD])
        shard = Shard(FORMAT, root, root, "train", names=some, captions=captions)
        parts.append((shard, Counter(map(posixpath.dirname, some))))
    return parts


def _stretches(folder: paths.Path, split: str, metadata: paths.Path) -> Iterator[Shard]:
    """Cut a metadata file into shards of ROWS_PER_SHARD rows."""
    if metadata.name == metadata_parquet.NAME:
        for start, stop in metadata_parquet.stretches(metadata, ROWS_PER_SHARD):
            yield Shard(FORMAT, str(folder), str(metadata), split, start, stop)
        return
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


def read(
    shard: Shard, fields: Fields, chosen: Chosen, passed_over: Counter[str]
) -> Iterator[Row | Skip]:
    """The rows of a shard, each with its image's bytes, or a skip with the reason."""
    root, splits = paths.to_path(shard.root), dict(shard.folders)
    inside = PathGuard(shard.root, outside=shard.outside)
    base = "" if shard.names else posixpath.dirname(shard.name)
    beside = NamedFiles(shard.root, base, fields, outside=shard.outside)
    captions = dict(zip(shard.names, shard.captions, strict=True))
    looked = False
    for place, entry in _entries(shard):
        if isinstance(entry, BadRow):
            if chosen(place, shard.split):
                yield Skip(place, entry.reason, entry.detail)
            continue
        name = entry["file_name"]
        split = splits.get(posixpath.dirname(name), shard.split)
        if not chosen(name, split):
            continue
        sought = ""
        try:
            image = inside.read(root / name, MOST_PICTURE_BYTES, "too_many_bytes")
            if captions.get(name):
                entry[fields.text] = _caption_beside(root, name, captions[name], inside)
            images = beside.read(entry)
        except BadRow as bad:
            yield Skip(place, bad.reason, bad.detail)
            continue
        except paths.storage_errors() as error:
            yield Skip(place, "missing_file", str(error)[:200])
            continue
        text, others = fields.caption(entry), entry.get(fields.captions)
        if text is None and shard.names:
            sought = _sought_beside(root, name, look=not looked)
            looked = True  # the folder is listed for the first such row only
        elif text is None:
            sought = fields.sought(entry)
        columns = {column: entry.get(column) for column in fields.handed_on}
        place = "" if shard.names else place
        yield Row(name, split, image, text, others, columns, place, sought, images)


def _caption_beside(root: paths.Path, name: str, ending: str, inside: PathGuard) -> bytes | None:
    """The bytes of the caption beside a picture; None if it cannot be read."""
    file = root / f"{name.rpartition('.')[0]}{ending}"
    try:
        return inside.read(file, MOST_CAPTION_BYTES, "caption_too_long")
    except paths.storage_errors():
        return None


def _sought_beside(root: paths.Path, name: str, *, look: bool) -> str:
    """Words for the files that may hold a caption, and with `look` for the files there."""
    stem = posixpath.basename(name).rpartition(".")[0]
    sought = f"no {caption_files(stem)} beside it"
    folder = (root / name).parent
    try:
        beside = sorted(
            child.name
            for child in (folder.iterdir() if look else ())
            if child.name.startswith(stem) and child.name != posixpath.basename(name)
        )
    except paths.storage_errors():
        beside = []
    return f"{sought}, but {', '.join(beside[:5])}" if beside else sought


def names(shard: Shard, fields: Fields = _PLAIN) -> Iterator[str]:
    """The names of a shard's rows, without reading any image."""
    for _, entry in _entries(shard):
        if not isinstance(entry, BadRow):
            yield entry["file_name"]


def described(shard: Shard, fields: Fields = _PLAIN) -> Iterator[tuple[str, str, Any]]:
    """The name, split and unchecked caption of each row, without reading any image."""
    root, splits = paths.to_path(shard.root), dict(shard.folders)
    inside = PathGuard(shard.root, outside=shard.outside)
    captions = dict(zip(shard.names, shard.captions, strict=True))
    for _, entry in _entries(shard):
        if isinstance(entry, BadRow):
            continue
        name, text = entry["file_name"], fields.caption(entry)
        if captions.get(name):
            with contextlib.suppress(BadRow):
                text = _caption_beside(root, name, captions[name], inside)
        yield name, splits.get(posixpath.dirname(name), shard.split), text


def marks(shard: Shard, fields: Fields) -> Iterator[str]:
    """Texts that change whenever the shard's metadata, or an image or caption of it, changes."""
    base = "" if shard.names else posixpath.dirname(shard.name)
    beside = NamedFiles(shard.root, base, fields, outside=shard.outside)
    root = paths.to_path(shard.root)
    captions = dict(zip(shard.names, shard.captions, strict=True))
    yield f"{shard.folders}"
    for place, entry in _entries(shard):
        if isinstance(entry, BadRow):
            yield f"{place} {entry.reason}"
            continue
        name = entry["file_name"]
        files = [root / name]
        if captions.get(name):
            files.append(root / f"{name.rpartition('.')[0]}{captions[name]}")
        with contextlib.suppress(BadRow):  # reading reports it
            files += [root / file for file in beside.files(entry).values() if file]
        yield f"{json.dumps(entry, default=str)} {' '.join(stamp(file) for file in files)}"


@functools.lru_cache(maxsize=16)
def _named(root: str, name: str, stamped: str) -> frozenset[str]:
    """The pictures that a metadata file names."""
    folder = paths.to_path(root)
    return frozenset(
        picture for shard in _stretches(folder, "", folder / name) for picture in names(shard)
    )


def _entries(shard: Shard) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The place and metadata of each row; file_name is checked and made a path below the root.

    If a nearer metadata file also names the picture of a row, the row is a BadRow.
    """
    root = paths.to_path(shard.root)
    nearer = {
        posixpath.dirname(name): (name, _named(shard.root, name, stamp(root / name)))
        for name in shard.nearer
    }
    for place, entry in _rows(shard):
        if nearer and not isinstance(entry, BadRow):
            picture = entry["file_name"]
            for above in _upwards(posixpath.dirname(picture)):
                other, pictures = nearer.get(above, ("", frozenset()))
                if picture in pictures:
                    entry = BadRow("named_twice", f"{other}, nearer to the picture, names it, too")
                    break
        yield place, entry


def _rows(shard: Shard) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The entries of a shard, without regard to other metadata files."""
    if shard.names:
        yield from ((name, {"file_name": name}) for name in shard.names)
        return
    base = posixpath.dirname(shard.name)
    for number, entry in _parsed(shard):
        place = f"{shard.name} line {number}"
        if isinstance(entry, BadRow):
            yield place, entry
            continue
        try:
            entry["file_name"] = join(base, safe_name(entry.get("file_name")))
        except BadRow as bad:
            name = entry.get("file_name")
            if bad.reason == "no_file_name" and not bad.detail:
                keys = ", ".join(map(untrusted.brief, list(entry)[:8]))
                bad.detail = f"the row has {keys or 'nothing'}"
            named = f" ({shown(name[:_LONGEST_SHOWN])})" if name and isinstance(name, str) else ""
            yield f"{place}{named}", bad
            continue
        yield f"{place} ({entry['file_name'][:_LONGEST_SHOWN]})", entry


def _parsed(shard: Shard) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The line and fields of each row of a stretch of metadata."""
    file = paths.to_path(shard.path)
    if file.name == metadata_parquet.NAME:
        yield from metadata_parquet.parse(file, shard.start, shard.stop)
        return
    with file.open("rb") as opened:
        opened.seek(shard.start)
        yield from parse(opened, shard.stop - shard.start, shard.dialect, shard.line)
