"""Arrays of NumPy in a pickle, read without the pickle module: nothing in the file can run.

It is the machine of `sdjax.formats.torch_pickle`, which here knows how NumPy describes an array
instead of PyTorch's tensors: `_reconstruct`, a dtype, and a state with shape and bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.formats.torch_pickle import Machine, TorchFileError, read_pickle
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained

MOST_BYTES = 2**30  # VGG16 has 59 MB
_MOST_DEPTH = 16
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}
_DTYPES = ("f2", "f4", "f8")


class _Name(NamedTuple):
    """A placeholder for a name of NumPy."""

    kind: str


class _Pending:
    """A dtype or an array whose state follows; `value` is what it becomes."""

    def __init__(self, kind: str, value: Any = None):
        self.kind, self.value = kind, value


class _Machine(Machine):
    """The stack machine, for arrays."""

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        if name == "REDUCE":
            self._make()
        elif name == "BUILD":
            self._fill()
        else:
            super().run(name, argument)

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        if (module, name) in _NAMES:
            return _Name(_NAMES[module, name])
        raise TorchFileError(
            f"{self.where}: refused: the file asks for {module[:80]}.{name[:80]}, and weights need "
            "arrays and dictionaries alone. Nothing was run"
        )

    def _make(self) -> None:
        arguments, function = self.pop(), self.pop()
        kind = function.kind if isinstance(function, _Name) else None
        if kind == "array":
            self.push(_Pending("array"))
        elif kind == "dtype" and isinstance(arguments, tuple) and arguments[0] in _DTYPES:
            self.push(_Pending("dtype", arguments[0]))
        else:
            raise ValueError(f"it makes {brief(kind)} of {brief(arguments)}")

    def _fill(self) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(state, tuple) or not isinstance(target, _Pending):
            raise ValueError(f"it gives {brief(target)} a state")
        if target.kind == "dtype":
            if state[1] not in ("<", "|", "="):
                raise ValueError(f"numbers of the byte order {brief(state[1])}; expected '<'")
            self.push(target)
            return
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Pending) or not isinstance(data, bytes) or by_columns is True:
            raise ValueError(f"an array with the state {brief(state[:4])}")
        kind = np.dtype("<" + dtype.value)
        if not isinstance(shape, tuple) or math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {brief(shape)} with {len(data):,} bytes")
        target.value = np.frombuffer(data, kind).reshape(shape)
        self.push(target)


def read_arrays(file: paths.Path) -> dict[str, np.ndarray]:
    """Return {path: array} of nested dictionaries in a pickle; names are joined by dots.

    Raises:
        TorchFileError: it is damaged, or holds anything but arrays and dictionaries.
    """
    with (
        explained(file, "a pickle of NumPy's arrays", error=TorchFileError),
        paths.reading(file) as local,
        open(local, "rb") as opened,
    ):
        size = os.fstat(opened.fileno()).st_size
        tree = read_pickle(opened, str(file), size, machine=_Machine, most=MOST_BYTES)
        return _flat(tree, str(file))


def _flat(tree: Any, where: str, depth: int = 0) -> dict[str, np.ndarray]:
    if not isinstance(tree, Mapping) or depth > _MOST_DEPTH:
        raise TorchFileError(
            f"{where}: holds {brief(tree)}; expected dictionaries of NumPy's arrays"
        )
    found: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, _Pending) and isinstance(value.value, np.ndarray):
            found[str(name)] = value.value
        else:
            inner = _flat(value, where, depth + 1)
            found |= {f"{name}.{path}": array for path, array in inner.items()}
    return found
