"""Arrays of NumPy in a pickle, read without the pickle module: nothing in the file can run.

It is the machine of `sdjax.formats.torch_pickle`, which here knows how NumPy describes an array
instead of PyTorch's tensors: `_reconstruct`, a dtype, and a state with shape and bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.formats.torch_pickle import Machine, TorchFileError, read_pickle, shape_of
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained

MOST_BYTES = 2**30  # VGG16 has 59 MB
_MOST_DEPTH = 16
_MOST_ITEMS = 100_000  # of all dictionaries; one that is in many places counts in each
_MOST_LETTERS = 1000  # of a path
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
        numbers = isinstance(dtype, _Pending) and dtype.kind == "dtype"
        if not numbers or not isinstance(data, bytes) or by_columns not in (False, 0):
            raise ValueError(f"an array with the state {brief(state[:4])}")
        kind, shape = np.dtype("<" + dtype.value), shape_of(shape)
        if math.prod(shape) * kind.itemsize != len(data):
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
        found: dict[str, np.ndarray] = {}
        for count, (name, value) in enumerate(_leaves(tree, str(file), "", 0)):
            if count >= _MOST_ITEMS:
                raise ValueError(f"it holds more than {_MOST_ITEMS:,} entries")
            if value is not None:
                found[name] = value
        return found


def _leaves(
    tree: Any, where: str, prefix: str, depth: int
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield (path, array) of nested dictionaries; None in place of the array for a dictionary."""
    if not isinstance(tree, Mapping) or depth > _MOST_DEPTH:
        raise TorchFileError(
            f"{where}: holds {brief(tree)}; expected dictionaries of NumPy's arrays"
        )
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if len(path) > _MOST_LETTERS:
            raise ValueError(f"it has the name {brief(path)}")
        if isinstance(value, _Pending) and isinstance(value.value, np.ndarray):
            yield path, value.value
        else:
            yield path, None
            yield from _leaves(value, where, f"{path}.", depth + 1)
