"""Reads WebDataset tar shards in the layout of img2dataset: 000.jpg, 000.txt, 000.json, 001.jpg ...

A sample is a run of members with one key, which is the path up to the first dot of the file name
(https://github.com/webdataset/webdataset, `base_plus_ext`). Where a key has no picture of its own,
names with more dots are read, too: v1.0_07.jpg with v1.0_07.txt, or 000.input.jpg with 000.txt.
Members of other kinds are counted by their ending.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sdjax import paths
from sdjax.data.raw.rows import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Chosen,
    Fields,
    Row,
    Shard,
    Skip,
    Survey,
    caption_files,
    ending,
    find_shards,
)
from sdjax.text_files import pointer_note

FORMAT = "webdataset"
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_KINDS = {
    **{suffix[1:]: "image" for suffix in IMAGE_SUFFIXES},
    **{suffix[1:]: suffix for suffix in CAPTION_SUFFIXES},
    "json": "json",
}
_MOST_PARTS = 8  # of a key, kept until it ends; more are samples of their own
_Sample = dict[str, tuple[str, bytes]]  # by kind ("image", "json", ".txt" ...): path and content


def survey(path: str) -> Survey:
    """The tar files of a folder or a pattern. Raises DataError when there is none."""
    return find_shards(path, SUFFIXES, FORMAT)


def read(
    shard: Shard, fields: Fields, chosen: Chosen, passed_over: Counter[str]
) -> Iterator[Row | Skip]:
    """The rows of a tar in order; a tar that breaks off ends in a skip of its own."""
    for name, sample in _samples(shard, passed_over):
        if not chosen(name, shard.split):
            continue
        if isinstance(sample, Skip):
            yield sample
        elif "image" not in sample:
            members = [path.rpartition("/")[2] for path, _ in sample.values()]
            yield Skip(name, "missing_image", f"only {' and '.join(sorted(members))}")
        else:
            entry = _json(sample["json"][1] if "json" in sample else None)
            text = fields.caption(entry)
            if fields.text == "text":
                beside = next((sample[end][1] for end in CAPTION_SUFFIXES if end in sample), None)
                text = beside if beside is not None else entry.get("caption", text)
            columns = {column: entry.get(column) for column in fields.handed_on}
            sought = "" if text is not None else _sought(name, fields, entry)
            captions, image = entry.get(fields.captions), sample["image"][1]
            yield Row(name, shard.split, image, text, captions, columns, sought=sought)


def _sought(name: str, fields: Fields, entry: dict[str, Any]) -> str:
    """Where a caption was looked for in vain."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    beside = f"no {caption_files(stem)} beside it, "
    return f"{beside if fields.text == 'text' else ''}in {stem}.json {fields.sought(entry)}"


def names(shard: Shard) -> Iterator[str]:
    """The names of a shard's samples that have an image."""
    for name, sample in _samples(shard, Counter(), contents=False):
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
    shard: Shard, passed_over: Counter[str], *, contents: bool = True
) -> Iterator[tuple[str, _Sample | Skip]]:
    """(name, sample) of each; the name is its image's path in the tar."""
    seen: dict[str, int] = {}

    def named(sample: _Sample) -> tuple[str, _Sample]:
        first = sample.get("image") or next(iter(sample.values()))
        name = f"{shard.name}/{first[0]}"
        seen[name] = seen.get(name, 0) + 1  # a key that comes again is another sample
        return (name if seen[name] == 1 else f"{name}#{seen[name]}"), sample

    key = ("", "")
    parts: dict[str, _Sample] = {}  # of the key, by what stands between its dot and the last one
    for member in _members(shard, contents):
        if isinstance(member, Skip):
            yield from map(named, _finished(parts, passed_over))
            parts = {}
            yield member.name, member
            continue
        path, data = member
        folder, _, file = path.rpartition("/")
        stem, _, extension = file.partition(".")
        middle, _, last = extension.lower().rpartition(".")
        kind = _KINDS.get(last)
        if path.startswith("__MACOSX") or file.startswith("."):
            continue
        if kind is None:
            passed_over[ending(file)] += 1
            continue
        if (folder, stem) != key or kind in parts.get(middle, ()):
            yield from map(named, _finished(parts, passed_over))
            key, parts = (folder, stem), {}
        if len(parts) >= _MOST_PARTS and middle not in parts and "image" not in parts.get("", ()):
            oldest = next(part for part in parts if part)
            yield from map(named, _finished({oldest: parts.pop(oldest)}, passed_over))
        parts.setdefault(middle, {})[kind] = (path, data)
    yield from map(named, _finished(parts, passed_over))


def _finished(parts: dict[str, _Sample], passed_over: Counter[str]) -> Iterator[_Sample]:
    """The samples that the members of a key make; what is left of them is counted.

    A plain picture (000.jpg) is the sample of its key, and others (000.mask.png) are passed over
    unless they have captions of their own. Without one, a single picture takes the key's caption.
    """
    plain = parts.get("", {})
    dotted = {middle: part for middle, part in parts.items() if middle and "image" in part}
    if plain and "image" not in plain and len(dotted) == 1:
        (middle,) = dotted
        dotted[middle] = plain | dotted[middle]
        plain = {}
    elif "image" in plain:
        dotted = {middle: part for middle, part in dotted.items() if len(part) > 1}
    if plain:
        yield plain
    yield from dotted.values()
    for middle, part in parts.items():
        if middle and middle not in dotted:
            passed_over.update(f".{middle}{ending(path)}" for path, _ in part.values())


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
