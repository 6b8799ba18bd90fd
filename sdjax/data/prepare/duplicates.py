"""The search for examples that repeat an earlier one: by their pixels, or by their look.

The rule is to go through the data in order and to drop an example that equals, or is alike, an
example that was kept. The comparisons are a Beam pipeline; the kept examples follow from its pairs.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data.prepare.index import read_index
from sdjax.data.prepare.settings import Workspace

EXACT, NEAR, SAME = "duplicate", "near_duplicate", "same_hash"
Pair = tuple[int, int, str]  # the earlier's position, the later's, and EXACT, NEAR or SAME
_BLOCK = 2048


def difference_hash(pixels: np.ndarray) -> int:
    """The difference hash of uint8 [H, W, 3], 64 bits.

    A bit says whether one of 8x8 areas is darker than its right neighbour.

    As `dhash` of github.com/JohannesBuchner/imagehash, after N. Krawetz (hackerfactor.com, 2013).
    """
    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS)).astype(int)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def bands(distance: int) -> list[tuple[int, int]]:
    """The (shift, mask) of distance + 1 parts of 64 bits.

    Two hashes that differ in at most `distance` bits agree in at least one part entirely.
    """
    edges = np.linspace(0, 64, distance + 2).astype(int)
    return [(int(a), (1 << int(b - a)) - 1) for a, b in zip(edges, edges[1:], strict=False)]


def position(shard: int, row: int) -> int:
    """The position of an example in the order of the input, as one number."""
    return (shard << 32) | row


def exact_pairs(group: tuple[str, Iterable[int]]) -> list[Pair]:
    """The pairs of (pixels' digest, positions): the first position with each of the others."""
    first, *others = sorted(group[1])
    return [(first, other, EXACT) for other in others]


def alike_pairs(group: tuple[Any, Iterable[tuple[int, int]]], *, distance: int) -> Iterator[Pair]:
    """The pairs of hashes within the distance, of (part of the hash, (hash, position) of each)."""
    members = sorted({(place, value) for value, place in group[1]})
    places = np.array([place for place, _ in members], np.int64)
    values = np.array([value for _, value in members], np.uint64)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK, None]
        for other in range(start, len(values), _BLOCK):
            differ = np.bitwise_count(block ^ values[None, other : other + _BLOCK])
            for a, b in np.argwhere(differ <= distance):
                if start + a < other + b:
                    yield int(places[start + a]), int(places[other + b]), NEAR


def find(pipeline: Any, numbers: list[int], *, workspace: Workspace, distance: int | None) -> Any:
    """Add the comparisons to a Beam pipeline; return a PCollection of Pair, which may repeat.

    distance: of alike pictures; None compares pixels alone.
    """
    import apache_beam as beam

    entries = (
        pipeline
        | "indices" >> beam.Create(numbers)
        | "entries" >> beam.FlatMap(_hashes, workspace=workspace)
    )
    equal = (
        entries
        | "by pixels" >> beam.Map(_by_digest)
        | "equal" >> beam.GroupByKey()
        | "pairs of equals" >> beam.FlatMap(exact_pairs)
    )
    if distance is None:
        return equal
    # The first example of a hash represents all of that hash: they are alike the same examples.
    same = entries | "by hash" >> beam.Map(_by_hash) | "same hash" >> beam.GroupByKey()
    pairs_of_same = same | "pairs of same" >> beam.FlatMap(_same_pairs)
    alike = (
        same
        | "parts" >> beam.FlatMap(_parts, distance=distance)
        | "by part" >> beam.GroupByKey()
        | "pairs of alike" >> beam.FlatMap(alike_pairs, distance=distance)
    )
    return (equal, pairs_of_same, alike) | beam.Flatten()


def _hashes(number: int, *, workspace: Workspace) -> Iterator[tuple[str, int, int]]:
    for row, entry in enumerate(read_index(workspace, number).entries):
        yield entry.digest, int(entry.alike, 16), position(number, row)


def _by_digest(entry: tuple[str, int, int]) -> tuple[str, int]:
    return entry[0], entry[2]


def _by_hash(entry: tuple[str, int, int]) -> tuple[str, int]:
    return f"{entry[1]:016x}", entry[2]


def _same_pairs(group: tuple[str, Iterable[int]]) -> list[Pair]:
    first, *others = sorted(group[1])
    return [(first, other, SAME) for other in others]


def _parts(
    group: tuple[str, Iterable[int]], *, distance: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    value, first = int(group[0], 16), min(group[1])
    for number, (shift, mask) in enumerate(bands(distance)):
        yield f"{number} {(value >> shift) & mask}", (value, first)


def write_pairs(pairs: list[Pair], *, workspace: Workspace) -> None:
    """Write some of the pairs into a file of their own."""
    workspace.write_json(workspace.work / "pairs" / f"{uuid.uuid4().hex}.json", pairs)


def resolve(pairs: Iterable[Pair]) -> dict[int, tuple[str, int]]:
    """The dropped examples of pairs: {position: (EXACT or NEAR, the kept one that it repeats)}.

    An example with the pixels or the hash of a dropped one is dropped too: both are alike the same
      one.
    """
    earlier: dict[int, set[tuple[int, str]]] = {}
    for first, later, kind in pairs:
        earlier.setdefault(later, set()).add((first, kind))
    dropped: dict[int, tuple[str, int]] = {}
    for later in sorted(earlier):
        reasons = []
        for first, kind in earlier[later]:
            if first not in dropped:
                reasons.append((EXACT if kind == EXACT else NEAR, first))
            elif kind != NEAR:
                reasons.append((NEAR, dropped[first][1]))
        if reasons:
            dropped[later] = min(reasons)
    return dropped
