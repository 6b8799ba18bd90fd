"""Reads WebDataset tar shards in the layout of img2dataset: 000.jpg, 000.txt, 000.json, 001.jpg ...

A sample is a run of members with one key, which is the path up to the first dot of the file name
(https://github.com/webdataset/webdataset, `base_plus_ext`). Members of other kinds are ignored.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from sdjax import paths
from sdjax.data.raw.rows import IMAGE_SUFFIXES, Chosen, Fields, Row, Shard, Skip, find_shards
from sdjax.text_files import pointer_note

FORMAT = "webdataset"
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_KINDS = {**{suffix[1:]: "image" for suffix in IMAGE_SUFFIXES}, "txt": "txt", "json": "json"}


def shards(path: str) -> list[Shard]:
    """The tar files of a folder or a pattern. Raises DataError when there is none."""
    return find_shards(path, SUFFIXES, FORMAT)


def read(shard: Shard, fields: Fields, chosen: Chosen) -> Iterator[Row | Skip]:
    """The rows of a tar in order; a tar that breaks off ends in a skip of its own."""
    for name, sample in _samples(shard):
        if not chosen(name):
            continue
        if isinstance(sample, Skip):
            yield sample
        elif "image" not in sample:
            yield Skip(name, "missing_image", f"only {' and '.join(sorted(sample))}")
        else:
            entry = _json(sample.get("json"))
            text = entry.get(fields.text)
            if fields.text == "text":
                text = sample.get("txt", entry.get("caption", text))
            columns = {column: entry.get(column) for column in fields.handed_on}
            yield Row(name, shard.split, sample["image"], text, entry.get(fields.captions), columns)


def names(shard: Shard) -> Iterator[str]:
    """The names of a shard's samples that have an image."""
    for name, sample in _samples(shard, contents=False):
        if not isinstance(sample, Skip) and "image" in sample:
            yield name


def _json(encoded: bytes | None) -> dict[str, Any]:
    """A sample's metadata; {} when it has none that can be read, for the caption may do without."""
    try:
        entry = json.loads(encoded or b"{}")
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _samples(
    shard: Shard, *, contents: bool = True
) -> Iterator[tuple[str, dict[str, bytes] | Skip]]:
    """(name, {"image", "txt", "json"}) of each sample; the name is its image's path in the tar."""
    key, named = ("", ""), ""
    sample: dict[str, bytes] = {}
    seen: dict[str, int] = {}

    def finish() -> tuple[str, dict[str, bytes]]:
        name = f"{shard.name}/{named}"
        seen[name] = seen.get(name, 0) + 1  # a key that comes again is another sample
        return (name if seen[name] == 1 else f"{name}#{seen[name]}"), sample

    for member in _members(shard, contents):
        if isinstance(member, Skip):
            if sample:
                yield finish()
                sample = {}
            yield member.name, member
            continue
        path, data = member
        folder, _, file = path.rpartition("/")
        stem, _, extension = file.partition(".")
        kind = _KINDS.get(extension.lower())
        if kind is None or not stem or path.startswith("__MACOSX"):
            continue
        if (folder, stem) != key or kind in sample:
            if sample:
                yield finish()
            key, sample, named = (folder, stem), {}, path
        sample[kind] = data
        if kind == "image":
            named = path
    if sample:
        yield finish()


class _Strict(tarfile.TarInfo):
    """tarfile ends in silence where a header is damaged or cut off; this makes it say so."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark of the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _members(shard: Shard, contents: bool) -> Iterator[tuple[str, bytes] | Skip]:
    """(path, content) of each file; the last is a Skip when the tar cannot be read to its end."""
    try:
        with (
            paths.to_path(shard.path).open("rb") as file,
            tarfile.open(
                fileobj=file, mode="r|*", tarinfo=_Strict
            ) as tar,  # one pass from front to back
        ):
            for member in tar:
                if not member.isfile():
                    continue
                data = b""
                if contents:
                    content = tar.extractfile(member)
                    data = content.read() if content else b""
                    if len(data) < member.size:
                        raise tarfile.ReadError(f"{member.name} breaks off")
                tar.members = []  # type: ignore[attr-defined]  # or it remembers them all
                yield member.name, data
    except paths.storage_errors(tarfile.TarError, zlib.error, EOFError) as error:
        note = pointer_note(shard.path)
        yield Skip(shard.name, "bad_shard", note or f"not read to its end: {str(error)[:200]}")
