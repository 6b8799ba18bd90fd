"""The index of a shard after the first step: its usable examples, and those left out."""

from __future__ import annotations

import dataclasses

from sdjax.data.prepare.settings import Workspace
from sdjax.data.raw.rows import Skip
from sdjax.system import text_files, untrusted


@dataclasses.dataclass(frozen=True, slots=True)  # there is one for each example
class IndexEntry:
    """The facts about a usable example; the hashes are hexadecimal."""

    name: str
    split: str
    digest: str  # of the pixels
    alike: str  # the difference hash
    width: int
    height: int
    bytes: int
    chars: int  # of the main caption
    captions: int  # main and alternatives
    scores: list[float]
    changed: list[str]  # the changes to it, in words of `clean`


@dataclasses.dataclass(frozen=True)
class Index:
    """The usable examples of a shard in order, and all that was left out."""

    entries: list[IndexEntry]
    skips: list[Skip]
    thumbnails: dict[str, list[tuple[str, str, str]]]  # by reason: name, detail, base64 JPEG
    passed_over: dict[str, int]  # by ending: members of a tar without a row


def counts(index: Index) -> dict[str, int]:
    """The number of rows left out for each reason, and of those used."""
    found = {"used": len(index.entries)}
    for skip in index.skips:
        found[skip.reason] = found.get(skip.reason, 0) + 1
    return found


def read_index(workspace: Workspace, number: int) -> Index:
    """The index that `clean_shard` wrote."""
    file = workspace.index(number)
    with untrusted.explained(file, "the index of a shard", remedy="delete its folder"):
        stored = text_files.read_object(file, most=untrusted.MOST_TEXT)
        return Index(
            [IndexEntry(**entry) for entry in stored["entries"]],
            [Skip(**skip) for skip in stored["skips"]],
            stored["thumbnails"],
            stored["passed_over"],
        )
