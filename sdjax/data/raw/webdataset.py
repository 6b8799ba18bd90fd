"""The reader of WebDataset tars in img2dataset's layout: 000.jpg, 000.txt, 000.json, 001.jpg ...

A sample is a run of members with one key, which is the path up to the first dot of the file name
(https://github.com/webdataset/webdataset, `base_plus_ext`). Where a key has no picture of its own,
names with more dots are read, too: v1.0_07.jpg with v1.0_07.txt, or 000.input.jpg with 000.txt.
Members of other kinds are counted by their ending.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from sdjax.data.raw import tar
from sdjax.data.raw.files import open_shard
from sdjax.data.raw.limits import MOST_CAPTION_BYTES, MOST_PICTURE_BYTES, MOST_ROW_BYTES
from sdjax.data.raw.rows import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    BadRow,
    Chosen,
    Fields,
    Row,
    Shard,
    Skip,
    Survey,
    caption_files,
    ending,
    find_shards,
    raised,
)
from sdjax.system import paths
from sdjax.system.text_files import pointer_note

FORMAT = "webdataset"
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_KINDS = {
    **{suffix[1:]: "image" for suffix in IMAGE_SUFFIXES},
    **{suffix[1:]: suffix for suffix in CAPTION_SUFFIXES},
    "json": "json",
}
_MOST_PARTS = 8  # parts of a key that are kept until it ends; more are samples of their own
_MOST = {  # bytes of each kind
    "image": MOST_PICTURE_BYTES,
    "json": MOST_ROW_BYTES,
    **dict.fromkeys(CAPTION_SUFFIXES, MOST_CAPTION_BYTES),
}
_Sample = dict[str, tar.TarMember]  # by kind: "image", "json", ".txt", "image of edge" ...


def survey(path: str, fields: Fields, *, outside: bool) -> Survey:
    """The tar files of a folder or a pattern. Raises DataError when there is none."""
    return find_shards(path, SUFFIXES, FORMAT, outside=outside)


def read(
    shard: Shard, fields: Fields, chosen: Chosen, passed_over: Counter[str]
) -> Iterator[Row | Skip]:
    """The rows of a tar in order; a tar that breaks off gives a skip."""
    for name, sample in _samples(shard, fields, passed_over):
        if not chosen(name, shard.split):
            continue
        if isinstance(sample, Skip):
            yield sample
        elif "image" not in sample:
            members = [member.name.rpartition("/")[2] for member in sample.values()]
            yield Skip(name, "missing_image", f"only {' and '.join(sorted(members))}")
        else:
            try:
                yield _row(name, shard, sample, fields)
            except Exception as error:
                yield Skip(name, *raised(error))


def _row(name: str, shard: Shard, sample: _Sample, fields: Fields) -> Row:
    """The row of a sample with a picture. Raises BadRow: a member of it was not read."""
    image = _content(sample, "image")
    json_read = sample["json"].data if "json" in sample else None
    entry = _json(json_read)
    text = fields.caption(entry)
    if fields.text == "text":
        beside = next((_content(sample, end) for end in CAPTION_SUFFIXES if end in sample), None)
        text = beside if beside is not None else entry.get("caption", text)
    if text is None and "json" in sample:
        _content(sample, "json")
    columns = {column: entry.get(column) for column in fields.handed_on}
    sought = "" if text is not None else _sought(name, fields, entry)
    images = {
        named.name: _content(sample, kind)
        for named in fields.images
        if (kind := _kind_of(named.origin)) in sample
    }
    return Row(
        name, shard.split, image, text, entry.get(fields.captions), columns, sought=sought,
        images=images,
    )  # fmt: skip


def _kind_of(key: str) -> str:
    """The kind of the picture KEY.edge.png in a sample, for the key "edge"."""
    return f"image of {key.lower()}"


def _content(sample: _Sample, kind: str) -> bytes:
    """The bytes of a member of a sample. Raises BadRow: they were not read."""
    member = sample[kind]
    if member.data is not None:
        return member.data
    if member.is_sparse:
        raise BadRow("bad_record", "a sparse member, of which parts are not there")
    is_image = kind.startswith("image")
    reason, most = "too_many_bytes" if is_image else "caption_too_long", _MOST.get(kind)
    raise BadRow(reason, f"{member.size:,} bytes; at most {most or MOST_PICTURE_BYTES:,} are read")


def _sought(name: str, fields: Fields, entry: dict[str, Any]) -> str:
    """Words for the places where a caption was not found."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    beside = f"no {caption_files(stem)} beside it, "
    return f"{beside if fields.text == 'text' else ''}in {stem}.json {fields.sought(entry)}"


def names(shard: Shard, fields: Fields) -> Iterator[str]:
    """The names of a shard's samples that have an image."""
    for name, sample in _samples(shard, fields, Counter(), contents=False):
        if not isinstance(sample, Skip) and "image" in sample:
            yield name


def _json(encoded: bytes | None) -> dict[str, Any]:
    """The metadata of a sample; {} if it is unreadable: the caption may not need it."""
    try:
        entry = json.loads(encoded or b"{}")
    except (ValueError, RecursionError, MemoryError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _samples(
    shard: Shard, fields: Fields, passed_over: Counter[str], *, contents: bool = True
) -> Iterator[tuple[str, _Sample | Skip]]:
    """The name and the sample of each; the name is its image's path in the tar."""
    seen: dict[str, int] = {}
    keys = tuple(named.origin.lower() for named in fields.images)

    def named(sample: _Sample) -> tuple[str, _Sample]:
        first = sample.get("image") or next(iter(sample.values()))
        name = f"{shard.name}/{first.name}"
        seen[name] = seen.get(name, 0) + 1  # a repeated key is another sample
        return (name if seen[name] == 1 else f"{name}#{seen[name]}"), sample

    key = ("", "")
    parts: dict[str, _Sample] = {}  # of the key, by the text between its dot and the last dot

    def wanted(path: str) -> int:
        """The most bytes to read of a member; those kept for a key are bounded, too."""
        folder, _, file = path.rpartition("/")
        same = (folder, file.partition(".")[0]) == key
        kept = [m for part in parts.values() for m in part.values()] if same else []
        held = sum(len(member.data or b"") for member in kept)
        most = _MOST.get(_KINDS.get(file.rpartition(".")[2].lower(), ""), 0)
        return max(0, min(most, MOST_PICTURE_BYTES - held)) if contents else 0

    for member in _members(shard, wanted):
        if isinstance(member, Skip):
            yield from map(named, _finished(parts, keys, passed_over))
            parts = {}
            yield member.name, member
            continue
        path = member.name
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
            yield from map(named, _finished(parts, keys, passed_over))
            key, parts = (folder, stem), {}
        if (
            len(parts) >= _MOST_PARTS + len(keys)
            and middle not in parts
            and "image" not in parts.get("", ())
        ):
            oldest = next(part for part in parts if part and part not in keys)
            yield from map(named, _finished({oldest: parts.pop(oldest)}, (), passed_over))
        parts.setdefault(middle, {})[kind] = member
    yield from map(named, _finished(parts, keys, passed_over))


def _finished(
    parts: dict[str, _Sample], keys: Collection[str], passed_over: Counter[str]
) -> Iterator[_Sample]:
    """The samples that the members of a key make; the other members are counted.

    Pictures of `keys` (000.edge.png for "edge") belong to the samples and make none.
    A plain picture (000.jpg) is the sample of its key, and others (000.mask.png) are passed over
    unless they have captions of their own. Without one, a single picture takes the key's caption.
    """
    named = {_kind_of(key): parts[key]["image"] for key in keys if "image" in parts.get(key, ())}
    others = {middle: part for middle, part in parts.items() if middle not in keys}
    for sample in _unnamed(others, passed_over):
        yield sample | named
    if not others:
        members = [(middle, member) for middle in parts for member in parts[middle].values()]
        passed_over.update(f".{middle}{ending(member.name)}" for middle, member in members)


def _unnamed(parts: dict[str, _Sample], passed_over: Counter[str]) -> Iterator[_Sample]:
    """The samples of `_finished`, without named pictures."""
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
            passed_over.update(f".{middle}{ending(member.name)}" for member in part.values())


def _members(shard: Shard, wanted: Callable[[str], int]) -> Iterator[tar.TarMember | Skip]:
    """The files of a tar; the last is a Skip if the tar cannot be read to its end."""
    try:
        with open_shard(shard) as file:
            yield from tar.members(file, wanted)
    except BadRow as bad:
        yield Skip(shard.name, bad.reason, bad.detail)
    except paths.storage_errors(tar.TarError, zlib.error, EOFError) as error:
        note = pointer_note(shard.path)
        yield Skip(shard.name, "bad_shard", note or f"not read to its end: {str(error)[:200]}")
