"""Hostile variations of good files: of the tree of a JSON file, and of bytes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

# In place of a value: other types, numbers at every edge, names that mean something to somebody.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**40, 2**63, -(2**63), 10**400, 0.5, -0.0,
    float("nan"), float("inf"), 1e308, "", "0", "-1", "x" * 10_000, "../../escaped", "/etc/passwd",
    "/dev/zero", "gs://bucket/x", "evil_module.Feature", "__class__", "a\nb", "\ud800", "\u2028",
    "${HOME}", "`id`", "$(id)", "'\"; import os #", "<script>", [], {}, [[]], [None], [1] * 1000,
    ["a"], {"": ""}, {"__init__": 1}, {"a b": 1},
)  # fmt: skip
NAMES = ("", "a b", "__class__", "lambda", "x\ny", "x = 1; import os #", "É", "_", "9", "type")


def value(rng: np.random.Generator) -> Any:
    """Return one of VALUES."""
    return copy.deepcopy(VALUES[rng.integers(len(VALUES))])


def tree(rng: np.random.Generator, content: Any, most: int = 3) -> Any:
    """Return a copy of a JSON value in which 1 to `most` places are another value, or gone."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, most + 1)):
        places = list(_places(content))
        if not places:
            return value(rng)
        holder, key = places[rng.integers(len(places))]
        act = rng.random()
        if act < 0.15:
            del holder[key]
        elif act < 0.3 and isinstance(holder, dict):
            holder[NAMES[rng.integers(len(NAMES))]] = value(rng)
        elif act < 0.4 and isinstance(holder, list):
            holder.insert(key, value(rng))
        elif act < 0.5:
            other, name = places[rng.integers(len(places))]
            holder[key] = copy.deepcopy(other[name])
        elif act < 0.53:
            holder[key] = _nested(holder[key], int(rng.choice([20, 99, 300])))
        else:
            holder[key] = value(rng)
    return content


def _nested(inner: Any, depth: int) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


def _places(content: Any):
    """Yield (dictionary or list, key) of every value within a JSON value, without recursion."""
    left = [content]
    while left:
        holder = left.pop()
        pairs = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder)
            if isinstance(holder, list)
            else ()
        )
        for key, inner in pairs:
            yield holder, key
            left.append(inner)


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Return bytes with some changed, cut out, doubled, or put in."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(len(found) + 1))
        length = int(min(rng.integers(1, 64), len(found) - at))
        act = rng.integers(5)
        if act == 0 and at < len(found):
            found[at] ^= 1 << int(rng.integers(8))
        elif act == 1:
            found[at : at + length] = rng.bytes(length)
        elif act == 2:
            del found[at : at + length]
        elif act == 3:
            found[at:at] = found[at : at + length]
        else:
            found = found[:at] if rng.random() < 0.3 else found
    return bytes(found)
