"""Ratings of pictures: a log that survives kills, and the datasets that follow from it.

A folder of ratings has `ratings.jsonl`, a line for each rating in its order, and `pictures/`, the
rated pictures by their sha256. A line rates a picture, "picture" and "rating", or says which of two
is better, "better" and "worse". It is appended by one write: whoever is killed leaves at most half
a line at the end, which readers pass over. A later rating of a picture, or of the same two, takes
the place of an earlier one.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from sdjax.data.pictures import METADATA
from sdjax.data.raw.limits import MOST_CAPTION_CHARS, MOST_PICTURE_BYTES, MOST_ROW_BYTES
from sdjax.errors import UserError
from sdjax.system import paths, untrusted

LOG, PICTURES = "ratings.jsonl", "pictures"
KINDS = ("pairs", "weights", "good")
MOST_LOG = 64 << 20  # bytes of a log, some 100,000 ratings
_GOOD, _BAD = 1, -1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(rb"\S[^\n]*")  # one that is not blank, of which there may be millions
_MOST_DAMAGED = 100_000  # lines, beyond which a file is no log


@dataclasses.dataclass(frozen=True)
class Rating:
    """A rating of a picture.

    picture: the sha256 of its file, in hexadecimal; rating: 1 for good, -1 for bad.
    prompt: what it was drawn for.
    """

    picture: str
    rating: int
    prompt: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, by the sha256 of their files, one better than the other."""

    better: str
    worse: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Ratings:
    """The ratings of a folder, each picture's last one; damaged: lines that are none.

    pairs: of the same two pictures the last one.
    """

    each: tuple[Rating, ...]
    damaged: int
    pairs: tuple[Pair, ...] = ()


def append(folder: paths.Path, row: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
    """Add a rating, and the pictures it is of if they are not there.

    Args:
        row: with the fields of `Rating`, or of `Pair`, at least.
        pictures: {sha256: PNG file} of those that it names.

    Raises:
        WriteError: of the disk.
    """
    for name, picture in pictures.items():
        file = folder / PICTURES / f"{name}.png"
        if not file.exists():
            paths.make_folder(file.parent)
            with paths.writing(file) as local:
                local.write_bytes(picture)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with paths.explained_writes(folder / LOG), open(folder / LOG, "ab+") as log:
        if log.tell() and _last(log) != b"\n":
            line = b"\n" + line  # after half a line
        log.write(line)
        log.flush()
        os.fsync(log.fileno())


def _last(log: Any) -> bytes:
    log.seek(-1, os.SEEK_END)
    return log.read(1)


def read(folder: paths.Path) -> Ratings:
    """Return the last rating of each picture and of each two, in the order of the log.

    Raises:
        UserError: there is no log, or most of it is none.
    """
    try:
        data = untrusted.read_bytes(folder / LOG, MOST_LOG)
    except untrusted.damage(UserError) as error:
        why = untrusted.why(error)
        raise UserError(
            f"{folder / LOG} cannot be read: {why}; expected the folder that was the --ratings of "
            "sdjax.serve"
        ) from error
    found: dict[str, Rating] = {}
    pairs: dict[frozenset[str], Pair] = {}
    damaged = 0
    for line in (_kept(match[0]) for match in _LINE.finditer(data)):
        if not line.strip():
            continue
        rating = _rating(line)
        if rating is None:
            damaged += 1
            if damaged > _MOST_DAMAGED:
                raise UserError(f"{folder / LOG} has over {_MOST_DAMAGED:,} lines that are none")
        elif isinstance(rating, Pair):
            both = frozenset((rating.better, rating.worse))
            pairs.pop(both, None)
            pairs[both] = rating
        else:
            found.pop(rating.picture, None)
            found[rating.picture] = rating
    return Ratings(tuple(found.values()), damaged, tuple(pairs.values()))


def _kept(line: bytes) -> bytes:
    """Return a line; in place of one that is too long, or has no prompt to train on, no rating."""
    try:
        prompt: Any = json.loads(line)["prompt"] if len(line) <= MOST_ROW_BYTES else None
        prompt.encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return b"null"
    return line if len(prompt) <= MOST_CAPTION_CHARS else b"null"


def _rating(line: bytes) -> Rating | Pair | None:
    try:
        row = json.loads(line)
        prompt = row["prompt"]
        named = [row["better"], row["worse"]] if "better" in row else [row["picture"]]
        rating: Any = None if "better" in row else row["rating"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    right = all(isinstance(name, str) and _DIGEST.fullmatch(name) for name in named)
    if not right or not isinstance(prompt, str):
        return None
    if "better" in row:
        return Pair(named[0], named[1], prompt) if named[0] != named[1] else None
    rated = rating in (_GOOD, _BAD) and not isinstance(rating, bool)
    return Rating(named[0], rating, prompt) if rated else None


def graded(ratings: Ratings) -> list[tuple[str, str, float]]:
    """Return (picture, prompt, grade) of all that were rated, from -1 (bad) to 1 (good).

    The grade of a picture without a rating of its own is the mean over its pairs, 1 where it is
    the better and -1 where it is the worse.
    """
    grades: dict[str, tuple[str, list[float]]] = {
        each.picture: (each.prompt, [float(each.rating)]) for each in ratings.each
    }
    own = set(grades)
    for pair in ratings.pairs:
        for picture, grade in ((pair.better, _GOOD), (pair.worse, _BAD)):
            if picture not in own:
                grades.setdefault(picture, (pair.prompt, []))[1].append(float(grade))
    return [(name, prompt, sum(g) / len(g)) for name, (prompt, g) in grades.items()]


def rows(ratings: Ratings, kind: str, *, beta: float) -> list[dict[str, Any]]:
    """Return the examples of a dataset: "picture", "text" and what the kind adds.

    Args:
        kind: "pairs", "picture" and "rejected": those that were given as pairs, and of each prompt
            a good and a bad picture, as many as it has of the more frequent kind; "weights", all
            pictures with the "weight" of reward-weighted regression, n * softmax(grade / beta)
            over the n pictures of a prompt, whose mean is 1; "good", the pictures of grade 1 alone.
            See `graded`.
        beta: see "weights"; small ones leave the bad pictures out.
    """
    of_prompt: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    if kind == "pairs":
        for each in ratings.each:
            of_prompt[each.prompt].append((each.picture, each.rating))
    else:
        for picture, prompt, grade in graded(ratings):
            of_prompt[prompt].append((picture, grade))
    found: list[dict[str, Any]] = []
    if kind == "pairs":
        found += [
            {"picture": pair.better, "rejected": pair.worse, "text": pair.prompt}
            for pair in ratings.pairs
        ]
    for prompt, own in of_prompt.items():
        good = [picture for picture, grade in own if grade == _GOOD]
        bad = [picture for picture, grade in own if grade == _BAD]
        if kind == "pairs" and good and bad:
            for i in range(max(len(good), len(bad))):
                pair = {"picture": good[i % len(good)], "rejected": bad[i % len(bad)]}
                found.append({**pair, "text": prompt})
        elif kind == "good":
            found += [{"picture": picture, "text": prompt} for picture in good]
        elif kind == "weights":
            # From the highest grade, so that no exponential overflows.
            shares = [math.exp((grade - _GOOD) / beta) for _, grade in own]
            mean = sum(shares) / len(shares)
            if mean == 0.0:  # bad pictures alone
                shares, mean = [1.0] * len(own), 1.0
            found += [
                {"picture": picture, "text": prompt, "weight": share / mean}
                for (picture, _), share in zip(own, shares, strict=True)
            ]
    return found


def is_test(prompt: str, share: float) -> bool:
    """Return whether the pictures of a prompt are held out; it follows from the prompt alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def write(
    folder: paths.Path, output: paths.Path, kind: str, *, beta: float, test_share: float
) -> dict[str, int]:
    """Write a folder of pictures with metadata.jsonl, in train/ and test/.

    Args:
        folder: of ratings; kind, beta: see `rows`.
        test_share: of the prompts, held out with all their pictures.

    Returns:
        {split: examples}, and how many lines were "damaged", and examples left out since a picture
        was "missing", or was not the one that was rated.

    Raises:
        UserError: there is no rating, or none that makes an example.
        WriteError: of the disk.
    """
    ratings = read(folder)
    made = rows(ratings, kind, beta=beta)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    missing = 0
    for row in made:
        files = {
            # A picture beside its row's, which data.images finds by its name.
            f"{sum(map(len, lines.values())):06d}{end}.png": _picture(folder, row[field])
            for field, end in (("picture", ""), ("rejected", ".rejected"))
            if field in row
        }
        if None in files.values():
            missing += 1
            continue
        split = "test" if is_test(row["text"], test_share) else "train"
        paths.make_folder(output / split)
        for name, data in files.items():
            with paths.writing(output / split / name) as local:
                local.write_bytes(data or b"")
        content = {"file_name": next(iter(files)), "text": row["text"]}
        if "weight" in row:
            content["weight"] = row["weight"]
        lines[split].append(json.dumps(content, ensure_ascii=False))
    if not any(lines.values()):
        needed = {
            "pairs": "a pair, or a good and a bad picture of one prompt", "good": "a good picture",
        }  # fmt: skip
        count = len(ratings.each) + len(ratings.pairs)
        raise UserError(
            f"{folder / LOG} has {count} ratings, and the pictures of {missing} examples are "
            f"missing; {kind} take {needed.get(kind, 'a rating')}"
        )
    for split, own in lines.items():
        if own:
            paths.write_text(output / split / METADATA, "".join(f"{line}\n" for line in own))
    counts = {split: len(own) for split, own in lines.items()}
    return {**counts, "damaged": ratings.damaged, "missing": missing}


def _picture(folder: paths.Path, digest: str) -> bytes | None:
    """The file of a rated picture; None if it is missing or another.

    A link in a folder of strangers may lead to any file of this machine: the digest tells that it
    is the picture, which they know.
    """
    try:
        data = untrusted.read_bytes(folder / PICTURES / f"{digest}.png", MOST_PICTURE_BYTES)
    except untrusted.damage(UserError):
        return None
    return data if hashlib.sha256(data).hexdigest() == digest else None
