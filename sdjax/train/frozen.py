"""DIR/frozen.safetensors, read in parts: each host takes from it what its devices hold, no more.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the length n of the
header, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the arrays, row-major. The
library's own slices want a local file; a bucket serves ranges of bytes as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sdjax.errors import UserError
from sdjax.models import weight_checks
from sdjax.system import paths
from sdjax.system.text_files import pointer_note
from sdjax.system.untrusted import brief, check_regular, damage, plain, why

_MOST_HEADER = 16 * 2**20  # bytes; that of SDXL has 0.3 MB


def read_frozen(file: paths.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of `wanted`, on its shardings.

    At any time a host holds the rows of one array that its devices share, besides what is placed.

    Args:
        file: float32 arrays, local or in a bucket.
        wanted: {path: shape with sharding}.

    Raises:
        UserError: the file is not there, is cut short, or holds other arrays or NaN or Inf.
    """
    try:
        check_regular(file)
        with file.open("rb") as opened:
            start, header = _header(opened)
            _check(file, header, wanted)
            # In the file's order: from a bucket, going back would fetch a block again.
            order = sorted(wanted, key=lambda path: header[path]["data_offsets"])
            return {path: _read(opened, start, path, header[path], wanted[path]) for path in order}
    except UserError:
        raise
    except damage() as error:
        raise UserError(
            f"{file} cannot be read: {pointer_note(file) or why(error)}\n"
            "It holds the networks that this run does not train, and is written when the run "
            "begins. Restore it from a copy, or start in another --workdir"
        ) from error


def _header(opened: Any) -> tuple[int, dict[str, Any]]:
    """(where the arrays begin, {name: entry})."""
    size = int.from_bytes(opened.read(8), "little")
    if not 2 <= size <= _MOST_HEADER:
        raise ValueError("not a safetensors file")
    header = json.loads(opened.read(size))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: its header is no group")
    return 8 + size, header


def _check(file: paths.Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = []
    for path, want in wanted.items():
        if path not in header:
            problems.append(f"missing: {path}")
        elif (header[path]["dtype"], header[path]["shape"]) != ("F32", list(want.shape)):
            has = f"{plain(header[path]['dtype'])} {brief(header[path]['shape'])}"
            problems.append(f"{path} is {has}, the model has F32 {list(want.shape)}")
    if problems:
        raise UserError(
            f"{file} is not of this configuration:\n  " + "\n  ".join(problems[:20]) + "\nUse the "
            "one the run began with (networks, and which groups are trained), or another --workdir"
        )


def _read(
    opened: Any, start: int, path: str, entry: Mapping[str, Any], want: jax.ShapeDtypeStruct
) -> jax.Array:
    begin, shape = start + entry["data_offsets"][0], want.shape
    row = 4 * math.prod(shape[1:])
    cached: dict[tuple[int, int], np.ndarray] = {}  # devices of a host often share their rows

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0]) if shape else (0, 1, 1)
        if (first, last) not in cached:
            opened.seek(begin + first * row)
            data = opened.read((last - first) * row)
            if len(data) < (last - first) * row:
                raise ValueError("it is cut short")
            rows = np.frombuffer(data, "<f4")
            if not weight_checks.is_finite(rows):
                raise ValueError(weight_checks.describe(path, rows))
            cached[first, last] = rows.reshape((last - first, *shape[1:]) if shape else ())
        return cached[first, last][(slice(None), *index[1:]) if shape else ()]

    return jax.make_array_from_callback(shape, want.sharding, part)
