"""Paths of stacked parameters: one array [N, ...] that holds a parameter of N equal blocks.

`encoder.layers.0-11.mlp.fc1.kernel` [12, in, out] is `encoder.layers.0.mlp.fc1.kernel` to
`encoder.layers.11.mlp.fc1.kernel`. Readers and writers of weights split and join by the path alone.
The optimizer and the sharding rules leave the first axis out of what they do to a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

_RUN = re.compile(r"(?:^|(?<=\.))(\d+)-(\d+)(?=\.|$)")


def leading_axes(path: str) -> int:
    """Return how many leading axes of a parameter count blocks: 1 of stacked ones, else 0."""
    return 1 if _RUN.search(path) else 0


def block_paths(path: str) -> list[str]:
    """Return the path of each block's part of a parameter, along its first axis.

    A parameter that is not stacked has one part, itself.
    """
    found = _RUN.search(path)
    if found is None:
        return [path]
    first, last = map(int, found.groups())
    head, tail = path[: found.start()], path[found.end() :]
    return [f"{head}{i}{tail}" for i in range(first, last + 1)]


def blocks_apart(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, array) of every parameter, stacked ones block by block."""
    for path, value in params.items():
        if leading_axes(path):
            yield from zip(block_paths(path), value, strict=True)
        else:
            yield path, value


def shapes_apart(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return {path: ShapeDtypeStruct} of every parameter, stacked ones block by block."""
    apart: dict[str, Any] = {}
    for path, value in shapes.items():
        if leading_axes(path):
            one = jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
            apart |= dict.fromkeys(block_paths(path), one)
        else:
            apart[path] = value
    return apart


def joined(parts: dict[str, np.ndarray], path: str) -> np.ndarray:
    """Take the parts of a parameter out of `parts` {path: array}; return the parameter."""
    names = block_paths(path)
    if not leading_axes(path):
        return parts.pop(path)
    whole = np.empty((len(names), *parts[names[0]].shape), parts[names[0]].dtype)
    for i, name in enumerate(names):
        whole[i] = parts.pop(name)
    return whole
