"""Arrays in .npy and .npz files: real numbers and texts, never larger than announced and there."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sdjax.system.untrusted import brief, check_regular

# Bytes that a small .npz may unpack to; a larger one to so many times its size. Numbers shrink to a
# half at the best, but for zeros.
MOST_UNPACKED, _MOST_RATIO = 256 * 2**20, 20


def read_npy(path: os.PathLike[str] | str) -> np.ndarray:
    """Return the real numbers in a local .npy file.

    Raises:
        ValueError, TypeError, OSError: it is no such file, or announces more than it has.
    """
    size = check_regular(path)
    with open(path, "rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("not a .npy file")
        file.seek(0)
        return _read_array(file, size)


def _read_array(file: Any, size: int) -> np.ndarray:
    """Return the array of a .npy file that has `size` bytes. ValueError if it announces more."""
    start = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if start != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "biufU":
        raise ValueError(f"it holds {dtype}; expected real numbers")
    announced = math.prod(shape) * dtype.itemsize
    if announced > size or len(shape) > 32:
        raise ValueError(f"it announces {brief(announced)} bytes, and has {size:,}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def open_npz(path: os.PathLike[str] | str) -> Iterator[Mapping[str, np.ndarray]]:
    """Open a local .npz file, as {name: array}; each array is read when it is asked for.

    Raises:
        ValueError, zipfile.BadZipFile, OSError, ...: see `damage`.
    """
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        packed = sum(entry.file_size for entry in archive.infolist())
        most = max(
            MOST_UNPACKED, _MOST_RATIO * sum(entry.compress_size for entry in archive.infolist())
        )
        if packed > most:
            raise ValueError(f"it unpacks to {packed:,} bytes; expected at most {most:,}")
        yield _Arrays(archive)


class _Arrays(Mapping[str, np.ndarray]):
    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        self._names = {name.removesuffix(".npy"): name for name in archive.namelist()}

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._archive.getinfo(self._names[name])
        with self._archive.open(entry) as file:
            return _read_array(file, entry.file_size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
