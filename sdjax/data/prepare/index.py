"""What is known of a shard after its first step: the usable examples and what was left out."""

from __future__ import annotations

import dataclasses
import json

from sdjax.data.prepare.settings import Place
from sdjax.data.raw.rows import Skip


@dataclasses.dataclass(frozen=True, slots=True)  # there are as many as examples
class Entry:
    """What is known of a usable example; the hashes are hexadecimal."""

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
    changed: list[str]  # what was mended, in words of `clean`


@dataclasses.dataclass(frozen=True)
class Index:
    """What became of a shard: its usable examples in order, and all that was left out."""

    entries: list[Entry]
    skips: list[Skip]
    thumbnails: dict[str, list[tuple[str, str, str]]]  # by reason: name, detail, base64 JPEG
    passed_over: dict[str, int]  # by ending: members of a tar that no row is made of


def counts(index: Index) -> dict[str, int]:
    """How many were left out for each reason, and how many used."""
    found = {"used": len(index.entries)}
    for skip in index.skips:
        found[skip.reason] = found.get(skip.reason, 0) + 1
    return found


def read_index(place: Place, number: int) -> Index:
    """What `clean_shard` wrote."""
    stored = json.loads(place.index(number).read_text())
    return Index(
        [Entry(**entry) for entry in stored["entries"]],
        [Skip(**skip) for skip in stored["skips"]],
        stored["thumbnails"],
        stored["passed_over"],
    )
