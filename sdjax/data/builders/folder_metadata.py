"""Reads the metadata of an image folder: which images, with which captions, in which split.

The imagefolder convention: `metadata.jsonl` with `file_name` and a caption field, either beside
the images, or one in each of the subfolders `train`, `test` and `validation`. Without a test or
validation folder, about 3 % of the images become the test split: those whose name's SHA-256, read
as a fraction, is at most 0.03 (or the lowest one), so images keep their side as the folder grows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sdjax.data.sources import DataError

METADATA = "metadata.jsonl"
TEST_SHARE = 0.03
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_INVISIBLE = "\u200b\u2060\ufeff"  # zero-width characters that str.split() does not count as space


@dataclasses.dataclass(frozen=True)
class Record:
    """One usable line: the image's path (below the folder, "/"-separated) and its caption."""

    file_name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Skip:
    """What was left out: the file, or the metadata line, and why."""

    name: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a folder's metadata says. The fingerprint changes when any image or caption does."""

    folder: Path
    splits: dict[str, list[Record]]
    skipped: list[Skip]
    fingerprint: str


class BadLine(ValueError):
    """A metadata line that cannot be used; reason is a short word for counting."""

    def __init__(self, reason: str, detail: str = "", name: str = ""):
        super().__init__(reason)
        self.skip = Skip(name, reason, detail)


def scan_folder(path: str, *, text_key: str = "text") -> Scan:
    """Reads all metadata of a folder. Raises DataError when there is no folder or no metadata."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"data.path is {path!r}, which is {'no folder' if folder.exists() else 'not there'}; "
            f"expected a folder of images with {METADATA}"
        )
    found = _metadata_files(folder)
    digest = hashlib.sha256(text_key.encode())
    splits: dict[str, list[Record]] = {}
    skipped: list[Skip] = []
    for split, metadata in found:
        for line in _read_lines(metadata, folder, text_key, digest):
            if isinstance(line, Skip):
                skipped.append(line)
            else:
                splits.setdefault(split, []).append(line)
    if not splits:
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:5])
        raise DataError(
            f"data.path is {path!r}, whose {METADATA} has no usable line ({reasons or 'empty'}); "
            f'expected lines such as {{"file_name": "a.png", "{text_key}": "a caption"}}'
        )
    if set(splits) == {"train"}:
        splits = split_by_hash(splits["train"])
    return Scan(folder, splits, skipped, digest.hexdigest())


def _metadata_files(folder: Path) -> list[tuple[str, Path]]:
    """(split, metadata file) of each split; the folder's own metadata is one called train."""
    if (folder / METADATA).is_file():
        return [("train", folder / METADATA)]
    found = [
        (SPLIT_FOLDERS[child.name.lower()], child / METADATA)
        for child in sorted(folder.iterdir())
        if child.name.lower() in SPLIT_FOLDERS and (child / METADATA).is_file()
    ]
    if found:
        return found
    hint = " (metadata.csv is not read; convert it)" if (folder / "metadata.csv").exists() else ""
    raise DataError(
        f"data.path is {str(folder)!r}, which has no {METADATA}, nor has a subfolder train or "
        f'test{hint}; write one with a line {{"file_name": "a.png", "text": "a caption"}} for '
        "each image"
    )


def split_by_hash(records: list[Record]) -> dict[str, list[Record]]:
    """Sets about 3 % aside as test, by file name; all captions of a file are on one side."""
    fractions = {record.file_name: _fraction(record.file_name) for record in records}
    if len(fractions) < 2:
        return {"train": records}
    limit = max(TEST_SHARE, min(fractions.values()))
    test = [record for record in records if fractions[record.file_name] <= limit]
    train = [record for record in records if fractions[record.file_name] > limit]
    return {"train": train, "test": test} if train else {"train": test}


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _read_lines(
    metadata: Path, folder: Path, text_key: str, digest: Any
) -> Iterator[Record | Skip]:
    """Yields each line's record or the reason it is skipped; blank lines are nothing at all."""
    base = metadata.parent.relative_to(folder).as_posix()
    with metadata.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # UTF-8 byte order mark
            digest.update(line)
            if not line.strip():
                continue
            place = f"{metadata.relative_to(folder).as_posix()} line {number}"
            try:
                record = _parse_line(line, base, text_key)
                status = _stat(folder / record.file_name, record.file_name)
            except BadLine as bad:
                yield dataclasses.replace(
                    bad.skip, name=f"{place} ({bad.skip.name})" if bad.skip.name else place
                )
                continue
            digest.update(f"{record.file_name}\0{status}\n".encode())
            yield record


def _parse_line(line: bytes, base: str, text_key: str) -> Record:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine("bad_encoding", "not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadLine("bad_json", str(error)) from error
    if not isinstance(entry, dict):
        raise BadLine("bad_record", f"a JSON {type(entry).__name__}, not an object")
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadLine("no_file_name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise BadLine("unsafe_path", "expected a path below the folder", name)
    text = entry.get(text_key)
    if text is None:
        raise BadLine("no_caption", f"no {text_key!r}", name)
    if not isinstance(text, str):
        raise BadLine("caption_not_text", f"a JSON {type(text).__name__}", name)
    text = " ".join(text.split()).strip(_INVISIBLE + " ")
    if not text:
        raise BadLine("no_caption", "blank", name)
    try:
        (text + name).encode()
    except UnicodeEncodeError as error:
        raise BadLine("bad_encoding", "half of a surrogate pair") from error
    return Record((PurePosixPath(base) / path).as_posix(), text)


def _stat(file: Path, name: str) -> str:
    """Size and time of an image; raises BadLine if it is not there."""
    try:
        status = file.stat()
    except OSError as error:
        raise BadLine("missing_file", error.strerror or str(error), name) from error
    if not file.is_file():
        raise BadLine("missing_file", "a folder", name)
    return f"{status.st_size} {status.st_mtime_ns}"
