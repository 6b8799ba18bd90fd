"""The settings of a run of prepare, and the places of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdjax.data import named_images
from sdjax.data.image_files import MOST_PIXELS
from sdjax.data.raw.clean import Rules
from sdjax.data.raw.rows import ORIGINAL, Fields, fraction
from sdjax.errors import UserError
from sdjax.system import paths

DUPLICATES = ("none", "exact", "near")
MAX_DISTANCE = 10
FEATURES = ("image", "text", "captions", "file_name", "width", "height", *ORIGINAL)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the output depends on, besides the content of the input.

    Raises UserError where a setting is out of its range.
    """

    format: str
    fields: Fields
    rules: Rules
    duplicates: str = "exact"  # "near" also drops pictures that look alike
    near_distance: int = 6  # bits of 64 in which the hashes of alike pictures may differ
    validation_share: float = 0.0  # of train, by hash of the name, unless the source has the split
    test_share: float = 0.03
    shard_mb: int = 256
    thumbnails: int = 8  # in the report, of each reason
    outside_links: bool = False  # links below the input may lead out of it
    captions_from: str = ""  # a file of captions that take the place of those of the input
    captions_sha256: str = ""  # of that file

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATES:
            raise UserError(f"--duplicates is {self.duplicates!r}; expected one of {DUPLICATES}")
        if not 0 <= self.near_distance <= MAX_DISTANCE:
            raise UserError(f"--near_distance is {self.near_distance}; expected 0 to "
                            f"{MAX_DISTANCE} of 64 bits")  # fmt: skip
        for name in ("validation_share", "test_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected 0 to below 1")
        if self.validation_share + self.test_share >= 1:
            raise UserError(
                f"--validation_share and --test_share are {self.validation_share} and "
                f"{self.test_share}, which leaves nothing to train on; expected less than 1 in all"
            )
        if self.shard_mb < 1:
            raise UserError(f"--shard_mb is {self.shard_mb}; expected at least 1")
        for name in ("min_side", "max_aspect", "min_caption_chars", "max_caption_chars"):
            if getattr(self.rules, name) < 0:
                raise UserError(f"--{name} is {getattr(self.rules, name)}; expected 0 or more")
        if not 0 <= self.rules.max_pixels <= MOST_PIXELS:
            raise UserError(f"--max_pixels is {self.rules.max_pixels}; expected 1 to {MOST_PIXELS},"
                            " or 0 for that, beyond which Pillow opens nothing")  # fmt: skip
        if self.thumbnails < 0:
            raise UserError(f"--thumbnails is {self.thumbnails}; expected 0 or more")
        try:
            re.compile(self.rules.drop_pattern)
        except re.error as error:
            raise UserError(
                f"--drop_pattern is {self.rules.drop_pattern!r}, no regular expression: {error}"
            ) from error
        named_images.check(self.fields.images)
        if taken := set(self.scores) & {image.name for image in self.fields.images}:
            raise UserError(f"--score and --named_image both name {sorted(taken)}; give other names"
                            " to the pictures")  # fmt: skip
        for score in self.rules.scores:
            if score.column in FEATURES or not re.fullmatch(r"[A-Za-z]\w*", score.column):
                raise UserError(
                    f"--score names {score.column!r}; expected a word that is none of {FEATURES}"
                )

    @property
    def scores(self) -> tuple[str, ...]:
        """The columns of scores."""
        return tuple(rule.column for rule in self.rules.scores)

    def cuts(self, stored: set[str]) -> list[str]:
        """Lines about the parts to cut out of `train`, unless their splits are in `stored`."""
        if "train" not in stored:
            return []
        shares = {"validation": self.validation_share, "test": self.test_share}
        return [
            f"split {split}: {share:.3g} of train, by a hash of the name"
            for split, share in shares.items()
            if share and split not in stored
        ]

    def to_json(self) -> dict[str, Any]:
        """The settings for the report and for a run's identity; an infinite limit is null."""
        found = json.loads(json.dumps(dataclasses.asdict(self)))
        for score in found["rules"]["scores"]:
            for limit in ("low", "high"):
                score[limit] = score[limit] if math.isfinite(score[limit]) else None
        return found


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The output folder of a run, and its intermediate files."""

    output: str

    @property
    def folder(self) -> paths.Path:
        """The folder of the finished dataset."""
        return paths.to_path(self.output)

    @property
    def work(self) -> paths.Path:
        """The folder of intermediate files, which is removed at the end."""
        return self.folder / "work"

    def cleaned(self, number: int) -> paths.Path:
        """The usable examples of a shard of the input."""
        return self.work / f"clean-{number:05}.array_record"

    def index(self, number: int) -> paths.Path:
        """The index of a shard's rows; it appears after `cleaned`."""
        return self.work / f"clean-{number:05}.json"

    def part(self, number: int) -> paths.Path:
        """The share of a shard that is clean, while a worker reads it."""
        return self.work / f"clean-{number:05}.part"

    @contextmanager
    def writing(self, target: paths.Path) -> Iterator[Path]:
        """A context with a local file to write, which becomes target whole or not at all.

        Workers of a killed run may still write the same file: each has a file of its own.
        """
        own = self.work / f"{target.name}-{uuid.uuid4().hex[:12]}"
        with paths.writing(own) as local:
            yield local
        own.replace(target)

    def write_json(self, target: paths.Path, value: Any) -> None:
        """Write JSON, whole or not at all."""
        with self.writing(target) as local:
            local.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def identity(settings: Settings, fingerprint: str) -> str:
    """A digest that differs between runs whose outputs may differ."""
    text = json.dumps(settings.to_json(), sort_keys=True) + fingerprint
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def assign_splits(
    names: list[str], found: list[str], stored: set[str], settings: Settings
) -> list[str]:
    """The split of each example: its own, or for train by the hash of its name.

    stored: the splits of the source, which are not cut out of train. A share too small for any
    example still gets the one of the lowest hash, when there are two or more.
    """
    test = 0.0 if "test" in stored else settings.test_share
    validation = 0.0 if "validation" in stored else settings.validation_share
    ats = [fraction(name) for name in names]
    train = sorted({at for at, split in zip(ats, found, strict=True) if split == "train"})
    if test and len(train) > 1:
        test = max(test, math.nextafter(train[0], 1))  # just above the lowest, because of `<`
    splits = []
    for at, split in zip(ats, found, strict=True):
        if split == "train" and at < test + validation:
            split = "test" if at < test else "validation"
        splits.append(split)
    return splits
