"""The tensors of a PyTorch file, read without PyTorch and without running the file.

`torch.save` writes a pickle, and a pickle can call any function of the machine that reads it. Here
`sdjax.formats.torch_pickle` reads it, which can call none. Both formats are read: the zip of
PyTorch 1.6 and later, and the older one, which many published weights have
(torch/serialization.py, `_save` and `_legacy_save`). The arrays are never larger than the file.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from sdjax.formats.torch_pickle import MOST_BYTES, Storage, Tensor, TorchFileError, read_pickle
from sdjax.models import weights
from sdjax.models.weights import WeightsError
from sdjax.system import paths, text_files
from sdjax.system.untrusted import brief, damage, explained

__all__ = ["TorchFileError", "read_tensors"]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ZIP = b"PK\x03\x04"
_MOST_REPEATED = 2**20  # values of a tensor that repeats those of its storage


def read_tensors(
    path: paths.PathLike, *, inner: Sequence[str] = ("state_dict",)
) -> dict[str, np.ndarray]:
    """The arrays {name: array} of a state dict in a .pth, .pt, .bin, .ckpt or .safetensors file.

    Args:
        path: a file of `torch.save(model.state_dict(), path)`, or of {"state_dict": that, ...}.
            Entries that are no tensors (numbers, texts) are left out.
        inner: names of entries that may be the state dict.

    Returns:
        Read-only arrays; tensors that share their storage in the file share it here too.
        bfloat16 as ml_dtypes.bfloat16.

    Raises:
        TorchFileError: the file is damaged, or holds anything but tensors in dictionaries and
            lists; the message names it. Nothing in the file was executed.
        WeightsError: the file is missing.
    """
    path = paths.to_path(path)
    if path.suffix == ".safetensors":
        return weights.load_file(path)
    if not path.is_file():  # a device or a pipe is none either
        raise WeightsError(f"no such weights file: {path}: download it, or fix the path")
    again = "download or copy it again"
    whole = explained(path, "a whole PyTorch file", error=TorchFileError, remedy=again)
    with whole, paths.reading(path) as local, open(local, "rb") as file:
        start = file.read(64)
        file.seek(0)
        if text_files.is_pointer(start):
            raise TorchFileError(f"{path}: {text_files.POINTER}")
        tree, data = (_read_zip if start.startswith(_ZIP) else _read_legacy)(file, str(path))
        found = _state_dict(tree, str(path), inner)
        return {name: _view(name, tensor, data) for name, tensor in found.items()}


def _read_zip(file: BinaryIO, where: str) -> tuple[Any, Callable[[Storage], bytes]]:
    """The pickled object of a zip file, and a function that reads a storage."""
    archive = zipfile.ZipFile(file)
    _check_entries(archive, os.fstat(file.fileno()).st_size)
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        has = f"{len(pickles)} files data.pkl" if pickles else "no data.pkl"
        raise TorchFileError(f"{where}: a zip file, but not one of PyTorch's: it has {has}")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise TorchFileError(f"{where}: written on a big-endian machine, which is not supported")
    size = archive.getinfo(pickles[0]).file_size
    if size > MOST_BYTES:
        raise ValueError(f"data.pkl has {size:,} bytes; expected at most {MOST_BYTES:,}")
    tree = read_pickle(io.BytesIO(archive.read(pickles[0])), where, size)
    # Each storage is read once.
    cache: dict[str, bytes] = {}

    def data(storage: Storage) -> bytes:
        if storage.key not in cache:
            cache[storage.key] = archive.read(f"{root}data/{storage.key}")
        return cache[storage.key]

    return tree, data


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Raise a ValueError if parts are encrypted, compressed, or larger together than the file.

    torch.save compresses nothing; parts that overlap would be read many times.
    """
    for entry in archive.infolist():
        if entry.flag_bits & 1:
            raise ValueError(f"{brief(entry.filename)} in it is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{brief(entry.filename)} in it is compressed, as PyTorch never does")
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise ValueError("its parts are larger together than the file")


def _read_legacy(file: BinaryIO, where: str) -> tuple[Any, Callable[[Storage], bytes]]:
    """The pickled object of the older format, and a function that reads a storage.

    It has several pickles one after the other and, behind them, each storage with its length.
    """

    def left() -> int:
        return os.fstat(file.fileno()).st_size - file.tell()

    try:
        magic = read_pickle(file, where, left())
    except damage() as error:
        if isinstance(error, TorchFileError):
            raise
        magic = None
    if magic != _MAGIC:
        raise TorchFileError(
            f"{where}: not a file of torch.save: expected a zip or PyTorch's magic number at its "
            "start; is it a web page, or a download that broke off?"
        )
    version, system = (read_pickle(file, where, left()) for _ in range(2))
    if version != _PROTOCOL or not system.get("little_endian", False):
        raise TorchFileError(
            f"{where}: protocol {brief(version)}, {brief(system)}; expected protocol {_PROTOCOL}, "
            "little-endian"
        )
    storages: dict[str, Storage] = {}
    tree = read_pickle(file, where, left(), storages)
    found = {}
    for key in read_pickle(file, where, left()):
        (count,) = struct.unpack("<q", file.read(8))
        storage = storages[str(key)] if isinstance(key, str | int) else None
        if storage is None or count != storage.length:
            raise ValueError(f"storage {brief(key)} has {count} elements, not as announced")
        size = count * storage.dtype.itemsize
        if size > left():
            raise ValueError(f"storage {brief(key)} has {size:,} bytes, and {left():,} are left")
        found[storage.key] = file.read(size)
    return tree, lambda storage: found[storage.key]


def _state_dict(tree: Any, where: str, inner: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a pickled dictionary, or of the first dictionary in it with such a name."""
    for name in inner if isinstance(tree, Mapping) else ():
        if isinstance(tree.get(name), Mapping):
            tree = tree[name]
            break
    found = {}
    if isinstance(tree, Mapping):
        found = {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
    if not found:
        keys = f" with {brief(list(tree))}" if isinstance(tree, Mapping) and tree else ""
        raise TorchFileError(
            f"{where}: holds a {type(tree).__name__}{keys}; expected a state dict, a dictionary of "
            "tensors, as torch.save(model.state_dict(), PATH) writes it"
        )
    return found


def _view(name: str, tensor: Tensor, data: Callable[[Storage], bytes]) -> np.ndarray:
    """The array of a tensor; ValueError if it reaches beyond its storage."""
    storage = tensor.storage
    flat = np.frombuffer(data(storage), storage.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    empty = 0 in tensor.shape
    if len(flat) != storage.length or (not empty and last >= len(flat)):
        raise ValueError(
            f"{brief(name)} of shape {tensor.shape} reaches to element {last} of {len(flat)} "
            f"(of {storage.length} announced)"
        )
    if empty:
        return np.empty(tensor.shape, storage.dtype)
    if math.prod(tensor.shape) > max(len(flat), _MOST_REPEATED):
        raise ValueError(
            f"{brief(name)} of shape {tensor.shape} repeats its {len(flat)} numbers more often "
            "than weights do"
        )
    strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
