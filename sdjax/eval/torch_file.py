"""The tensors of a PyTorch file, without PyTorch and without running what the file says.

`torch.save` writes a pickle, and a pickle can call any function of the machine that reads it. The
reader here knows the few names that tensors are made with; any other is an error. Both formats are
read: the zip of PyTorch 1.6 and later, and the older one, which many published weights have
(torch/serialization.py, `_save` and `_legacy_save`).
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax import paths, text_files
from sdjax.models import weights
from sdjax.models.weights import WeightsError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ZIP = b"PK\x03\x04"
_DTYPES: dict[str, Any] = {
    "double": np.float64,
    "float": np.float32,
    "half": np.float16,
    "bfloat16": jnp.bfloat16,
    "long": np.int64,
    "int": np.int32,
    "short": np.int16,
    "char": np.int8,
    "byte": np.uint8,
    "bool": np.bool_,
    "complexfloat": np.complex64,
    "complexdouble": np.complex128,
}
_STORAGES = {f"{name}storage": np.dtype(dtype) for name, dtype in _DTYPES.items()}
_DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, KeyError, IndexError,
    ValueError, TypeError, AttributeError, OverflowError, RecursionError, NotImplementedError,
)  # fmt: skip


class TorchFileError(WeightsError):
    """A PyTorch file that is damaged, or that holds more than tensors."""


class _Storage(NamedTuple):
    """Where the numbers are: `length` of `dtype` under `key`. No pickle can alter a tuple."""

    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, before its numbers are read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: paths.PathLike) -> dict[str, np.ndarray]:
    """{name: array} of a state dict in a .pth, .pt, .bin, .ckpt or .safetensors file.

    Args:
        path: what `torch.save(model.state_dict(), path)` writes, or {"state_dict": that, ...}.
            Entries that are no tensors (numbers, texts) are left out.

    Returns:
        Read-only arrays; tensors that share their storage in the file share it here too.
        bfloat16 as ml_dtypes.bfloat16.

    Raises:
        TorchFileError: the file is damaged, or holds anything but tensors in dictionaries and
            lists; names what was found. Nothing of the file was executed.
        WeightsError: it is not there.
    """
    path = paths.to_path(path)
    if path.suffix == ".safetensors":
        return weights.load_file(path)
    if not path.is_file():
        raise WeightsError(f"no such weights file: {path}: download it, or fix the path")
    try:
        with paths.reading(path) as local, open(local, "rb") as file:
            start = file.read(64)
            file.seek(0)
            if text_files.is_pointer(start):
                raise TorchFileError(f"{path}: {text_files.POINTER}")
            tree, data = (_read_zip if start.startswith(_ZIP) else _read_legacy)(file, str(path))
            found = _state_dict(tree, str(path))
            return {name: _view(tensor, data, f"{path}: {name}") for name, tensor in found.items()}
    except TorchFileError:
        raise
    except _DAMAGED as error:
        raise TorchFileError(
            f"{path}: not a whole PyTorch file ({type(error).__name__}: {error}); download or copy "
            "it again"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors as `_Tensor`, and knows no other names."""

    def __init__(self, file: BinaryIO, where: str):
        super().__init__(file, encoding="latin-1")  # for files of Python 2
        self.storages: dict[str, _Storage] = {}
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for, made anew, so that nothing can be changed by it."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _tensor(
                storage, offset, shape, strides
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.lower() in _STORAGES:
            return name.lower()
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            raise TorchFileError(
                f"{self._where}: holds tensors of a kind that only torch knows, as float8; write "
                "them as .safetensors or as float16 where PyTorch is installed"
            )
        raise TorchFileError(
            f"{self._where}: refused: the file asks for {module}.{name}, and weights need tensors "
            "and dictionaries alone. Nothing was run. If you trust it, write its tensors as "
            ".safetensors where PyTorch is installed"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", kind, key, device, count[, view])."""
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or pid[0] != "storage"
            or pid[1] not in _STORAGES
            or not isinstance(pid[4], int)
            or any(pid[5:])
        ):
            raise TorchFileError(
                f"{self._where}: refused: it refers to {pid!r}; expected a storage. A file with a "
                "whole model must be saved anew: torch.save(model.state_dict(), PATH)"
            )
        storage = _Storage(str(pid[2]), _STORAGES[pid[1]], pid[4])
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} has two descriptions")
        return storage


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(strides)
        or any(not isinstance(n, int) or n < 0 for n in numbers)
    ):
        raise ValueError(f"a tensor of offset {offset}, shape {shape}, strides {strides}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _read_zip(file: BinaryIO, where: str) -> tuple[Any, Callable[[_Storage], bytes]]:
    """(the pickled object, how to read a storage)."""
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise TorchFileError(f"{where}: a zip file, but not one of PyTorch's: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise TorchFileError(f"{where}: written on a big-endian machine, which is not supported")
    tree = _Unpickler(io.BytesIO(archive.read(pickles[0])), where).load()
    # One copy of each storage, while the file is open.
    cache: dict[str, bytes] = {}

    def data(storage: _Storage) -> bytes:
        if storage.key not in cache:
            cache[storage.key] = archive.read(f"{root}data/{storage.key}")
        return cache[storage.key]

    return tree, data


def _read_legacy(file: BinaryIO, where: str) -> tuple[Any, Callable[[_Storage], bytes]]:
    """The same of pickles one after the other and, behind them, each storage with its length."""
    try:
        magic = _Unpickler(file, where).load()
    except _DAMAGED as error:
        if isinstance(error, TorchFileError):
            raise
        magic = None
    if magic != _MAGIC:
        raise TorchFileError(
            f"{where}: not a file of torch.save: expected a zip or PyTorch's magic number at its "
            "start; is it a web page, or a download that broke off?"
        )
    version, system = (_Unpickler(file, where).load() for _ in range(2))
    if version != _PROTOCOL or not system.get("little_endian", False):
        raise TorchFileError(
            f"{where}: protocol {version}, {system}; expected protocol {_PROTOCOL}, little-endian"
        )
    unpickler = _Unpickler(file, where)
    tree = unpickler.load()
    found = {}
    for key in _Unpickler(file, where).load():
        (count,) = struct.unpack("<q", file.read(8))
        storage = unpickler.storages[key]
        if count != storage.length:
            raise ValueError(f"storage {key} has {count} elements, not {storage.length}")
        found[key] = file.read(count * storage.dtype.itemsize)
    return tree, lambda storage: found[storage.key]


def _state_dict(tree: Any, where: str) -> dict[str, _Tensor]:
    """The tensors of a pickled dictionary."""
    if isinstance(tree, Mapping) and isinstance(tree.get("state_dict"), Mapping):
        tree = tree["state_dict"]
    found = {}
    if isinstance(tree, Mapping):
        found = {str(name): value for name, value in tree.items() if isinstance(value, _Tensor)}
    if not found:
        keys = f" with {', '.join(map(str, list(tree)[:8]))}" if isinstance(tree, Mapping) else ""
        raise TorchFileError(
            f"{where}: holds a {type(tree).__name__}{keys}; expected a state dict, a dictionary of "
            "tensors, as torch.save(model.state_dict(), PATH) writes it"
        )
    return found


def _view(tensor: _Tensor, data: Callable[[_Storage], bytes], where: str) -> np.ndarray:
    """The array of a tensor. ValueError if it reaches beyond its storage."""
    storage = tensor.storage
    flat = np.frombuffer(data(storage), storage.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    empty = 0 in tensor.shape
    if len(flat) != storage.length or (not empty and last >= len(flat)):
        raise ValueError(
            f"{where} of shape {tensor.shape} reaches to element {last} of {len(flat)} "
            f"(of {storage.length} announced)"
        )
    if empty:
        return np.empty(tensor.shape, storage.dtype)
    strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
