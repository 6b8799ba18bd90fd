"""Arrays in .npy and .npz files of unknown origin: real numbers and texts of checked size."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sdjax.system.untrusted import brief, check_regular

# A .npz may unpack to MOST_UNPACKED bytes, or to _MOST_RATIO times its size if that is more.
# Numbers other than zeros shrink to a half at best.
MOST_UNPACKED, _MOST_RATIO = 256 * 2**20, 20


def read_npy(path: os.PathLike[str] | str) -> np.ndarray:
    """Return the real numbers in a local .npy file.

    Raises:
        ValueError, TypeError, OSError: it is no .npy file, or its header announces more than it
            has.
    """
    size = check_regular(path)
    with open(path, "rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("not a .npy file")
        file.seek(0)
        return _read_array(file, size)


def _read_array(file: Any, size: int) -> np.ndarray:
    """Return the array of a .npy file of `size` bytes; ValueError if its header announces more."""
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
    """Open a local .npz file as {name: array}; an array is read when its name is looked up.

    Raises:
        ValueError, zipfile.BadZipFile, OSError, ...: see `untrusted.damage`.
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
    """The arrays of an open .npz file by name, each read when it is looked up."""

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
