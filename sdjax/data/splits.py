"""Splits by hash, for datasets that come without, and folds for cross-validation.

The split of an example depends on its key alone. So it does not change when other examples come or
go, and a larger share only takes examples from `train`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sdjax.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def hashes(key: str) -> tuple[int, int]:
    """Two independent 64-bit numbers of a key: one for the shares, one for the folds."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def parse_fold(fold: str) -> tuple[int, int]:
    """Parse a fold: "2/5" -> (1, 5), counted from 0; "" -> (0, 0). Raises UserError."""
    if not fold:
        return 0, 0
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    if not match or int(match[2]) < 2 or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"data.fold is {fold!r}; expected 'I/K' with K at least 2 and I from 1 to "
                        "K, such as '2/5'")  # fmt: skip
    return int(match[1]) - 1, int(match[2])


@dataclasses.dataclass(frozen=True)
class Cut:
    """The part of the stored split `train` that makes a split.

    name: train, validation or test.
    validation, test: shares of all keys; 0 where the dataset stores that split.
    fold: (number, count) of the fold that is the validation split; (0, 0) without.
    """

    name: str
    validation: float
    test: float
    fold: tuple[int, int]

    def keep(self, share: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Whether each example belongs to the split, bool [N], from its uint64 hashes [N]."""
        at = (share >> np.uint64(11)) / 2.0**53  # in [0, 1)
        test = at < self.test
        number, count = self.fold
        if count:
            validation = ~test & (np.floor((fold >> np.uint64(11)) / 2.0**53 * count) == number)
        else:
            validation = ~test & (at < self.test + self.validation)
        return {TEST: test, VALIDATION: validation, TRAIN: ~test & ~validation}[self.name]


def plan(
    split: str, stored: Collection[str], *, validation: float, test: float, fold: str
) -> tuple[str, Cut | None]:
    """The stored split to read for a wanted one, and the cut of it (None: all of it).

    Raises UserError for a slice of a split that is cut by hash.
    """
    number, count = parse_fold(fold)
    validation = 0.0 if VALIDATION in stored or count else validation
    test = 0.0 if TEST in stored else test
    base = split.split("[")[0]
    cut = (base == TRAIN and (validation or test or count)) or (
        base == VALIDATION and (validation or count)) or (base == TEST and test)  # fmt: skip
    if not cut or TRAIN not in stored:
        return split, None
    if base != split:
        raise UserError(
            f"split {split!r} is a slice, but {base} is cut by hash (data.fold, "
            "data.validation_share, data.test_share); use the one or the other"
        )
    return TRAIN, Cut(base, validation, test, (number, count))


class Subset:
    """Some of the records of a source with random access, by their numbers."""

    def __init__(self, records: Any, numbers: np.ndarray):
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        return self._records[int(self._numbers[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return self._records.__getitems__([int(self._numbers[index]) for index in indices])
