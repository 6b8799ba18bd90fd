"""The pickles in a PyTorch file, read without the pickle module: nothing in them can run.

A pickle is a program for a stack machine. The machine here has the opcodes of tensors,
dictionaries, lists, numbers and texts, and the few names of PyTorch that describe tensors. It
counts its steps, so that a small program makes nothing large. `sdjax.formats.numpy_pickle` gives it
other names.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax.models.weights import WeightsError
from sdjax.system.untrusted import brief

MOST_BYTES = 32 * 2**20  # bytes of a pickle; that of SDXL's weights has 0.4 MB
MOST_STEPS = 500_000  # opcodes, and items that are copied; some 30 for a tensor
_MOST_DIMENSIONS = 32
_MOST_BITS = 128  # bits of a number; PyTorch's magic number has 77
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
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT")
_TEXTS = (
    "BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING",
    "BINBYTES", "SHORT_BINBYTES",
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class TorchFileError(WeightsError):
    """A PyTorch file that is damaged, or that holds more than tensors."""


class Storage(NamedTuple):
    """The place of numbers in the file: `length` of `dtype` under `key`."""

    key: str
    dtype: np.dtype
    length: int


class Tensor(NamedTuple):
    """A view of a storage, before its numbers are read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """A placeholder for a name of a module; the pickle never gets the named object."""

    kind: str  # "dict", "size", "tensor", "parameter" or "storage"
    dtype: np.dtype | None = None


class _Limited:
    """A file from which at most `limit` bytes can be read."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._left, self._limit = file, limit, limit

    def read(self, count: int) -> bytes:
        """Return `count` bytes. ValueError if there are fewer."""
        return self._counted(self._file.read(count) if 0 <= count <= self._left else None)

    def readline(self) -> bytes:
        """Return the bytes up to a line feed, or to the limit."""
        return self._counted(self._file.readline(self._left))

    def _counted(self, data: bytes | None) -> bytes:
        if data is None:
            raise ValueError(f"a part of it goes beyond its end, or {self._limit:,} bytes")
        self._left -= len(data)
        return data


def read_pickle(
    file: BinaryIO,
    where: str,
    size: int,
    storages: dict[str, Storage] | None = None,
    *,
    machine: type[Machine] | None = None,
    most: int | None = None,
) -> Any:
    """Return the object that the pickle at the present position of a file describes.

    Args:
        file: ends up behind the pickle.
        where: its name, for messages.
        size: the number of its bytes that are left.
        storages: {key: storage}, to which the storages in the pickle are added.
        machine: the one that runs it, which knows PyTorch's names by default.
        most: bytes that are read, `MOST_BYTES` by default.

    Returns:
        Dictionaries, lists, tuples, numbers, texts and `Tensor`.

    Raises:
        TorchFileError: it asks for anything else; the message names it.
        ValueError, IndexError, KeyError, TypeError: it is damaged.
    """
    running = (machine or Machine)(where, {} if storages is None else storages)
    limited: Any = _Limited(file, min(size, MOST_BYTES if most is None else most))
    for opcode, argument, _ in pickletools.genops(limited):
        running.count(1)
        if opcode.name == "STOP":
            return running.pop()
        running.run(opcode.name, argument)
    raise ValueError("it has no end")


class Machine:
    """The stack machine that runs the opcodes of a pickle."""

    def __init__(self, where: str, storages: dict[str, Storage]):
        self.where, self._storages = where, storages
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def count(self, steps: int) -> None:
        """Count steps. ValueError beyond the limit."""
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise ValueError(f"it takes more than {MOST_STEPS:,} steps to read")

    def push(self, value: Any) -> None:
        """Put a value on top of the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Remove the top of the stack and return it."""
        return self._stack.pop()

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        if name in _NUMBERS or name in _TEXTS:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                raise ValueError(f"it holds {brief(argument)}")
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self.push(self.find(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            action = _ACTIONS.get(name)
            if action is None:
                raise TorchFileError(
                    f"{self.where}: refused: the file has the opcode {name}, and weights need "
                    "tensors and dictionaries alone. Nothing was run"
                )
            action(self)

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _tuple(self) -> None:
        parts = self._since_mark()  # first: it changes the stack
        self._stack.append(tuple(parts))

    def _short_tuple(self, count: int) -> None:
        parts = [self.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(parts)))

    def _append(self, parts: list[Any]) -> None:
        _of(list, self._stack[-1]).extend(parts)

    def _set_items(self, parts: list[Any]) -> None:
        target = _of(dict, self._stack[-1])
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            target[_key(key)] = value

    def _list(self) -> None:
        parts = self._since_mark()
        self._stack.append(parts)

    def _dict(self) -> None:
        parts = self._since_mark()
        self._stack.append({})
        self._set_items(parts)

    def _build(self) -> None:
        """Drop the attributes of a state dict (its versions); nothing else has any."""
        self.pop()
        _of(collections.OrderedDict, self._stack[-1])

    def _stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.find(_of(str, module), _of(str, name)))

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name of a module.

        Raises:
            TorchFileError: no tensor needs it.
        """
        known = {
            ("collections", "OrderedDict"): _Name("dict"),
            ("torch", "Size"): _Name("size"),
            ("torch._utils", "_rebuild_tensor"): _Name("tensor"),
            ("torch._utils", "_rebuild_tensor_v2"): _Name("tensor"),
            ("torch._utils", "_rebuild_parameter"): _Name("parameter"),
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name.lower() in _STORAGES:
            return _Name("storage", _STORAGES[name.lower()])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            raise TorchFileError(
                f"{self.where}: holds tensors of a kind that only torch knows, as float8; write "
                "them as .safetensors or as float16 where PyTorch is installed"
            )
        raise TorchFileError(
            f"{self.where}: refused: the file asks for {module[:80]}.{name[:80]}, and weights "
            "need tensors and dictionaries alone. Nothing was run. If you trust it, write its "
            "tensors as .safetensors where PyTorch is installed"
        )

    def _reduce(self) -> None:
        arguments, function = _of(tuple, self.pop()), _of(_Name, self.pop())
        self._stack.append(self._call(function.kind, arguments))

    def _call(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        if kind == "tensor":
            return _tensor(*arguments[:4])
        if kind == "parameter":
            return _of(Tensor, arguments[0])
        if kind == "size":
            (parts,) = arguments
            return shape_of(parts)
        if kind == "dict":
            made: dict[Any, Any] = collections.OrderedDict()
            for pairs in arguments[:1]:  # Python 2 wrote a list of pairs
                self.count(len(_of(list, pairs)))
                for key, value in pairs:
                    made[_key(key)] = value
            return made
        raise ValueError(f"it calls a {kind}")

    def _persistent(self) -> None:
        """Push a storage: ("storage", kind, key, device, count[, view])."""
        pid = self.pop()
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or pid[0] != "storage"
            or not isinstance(pid[1], _Name)
            or pid[1].dtype is None
            or not isinstance(pid[2], str | int)
            or not isinstance(pid[4], int)
            or pid[4] < 0
            or any(pid[5:])
        ):
            raise TorchFileError(
                f"{self.where}: refused: it refers to {brief(pid)}; expected a storage. A file "
                "with a whole model must be saved anew: torch.save(model.state_dict(), PATH)"
            )
        storage = Storage(str(pid[2]), pid[1].dtype, pid[4])
        if self._storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {brief(storage.key)} has two descriptions")
        self._stack.append(storage)


_ACTIONS: dict[str, Callable[[Machine], Any]] = {
    "MARK": Machine._mark,
    "POP": lambda machine: machine.pop(),
    "POP_MARK": lambda machine: machine._since_mark(),
    "EMPTY_TUPLE": lambda machine: machine._short_tuple(0),
    "TUPLE1": lambda machine: machine._short_tuple(1),
    "TUPLE2": lambda machine: machine._short_tuple(2),
    "TUPLE3": lambda machine: machine._short_tuple(3),
    "TUPLE": Machine._tuple,
    "EMPTY_LIST": lambda machine: machine._stack.append([]),
    "LIST": Machine._list,
    "APPEND": lambda machine: machine._append([machine.pop()]),
    "APPENDS": lambda machine: machine._append(machine._since_mark()),
    "EMPTY_DICT": lambda machine: machine._stack.append({}),
    "DICT": Machine._dict,
    "SETITEM": lambda machine: machine._set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine: machine._set_items(machine._since_mark()),
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}


def _of(kind: type, value: Any) -> Any:
    """Return the value. ValueError if it is of another kind."""
    if not isinstance(value, kind):
        raise ValueError(f"it has {brief(value)} where a {kind.__name__.strip('_')} is expected")
    return value


def _key(key: Any) -> Any:
    """Return the key of a dictionary. ValueError unless it is a text, a number or None."""
    if not isinstance(key, str | bytes | int | float | None):  # the hash of a tuple may take years
        raise ValueError(f"a dictionary has the key {brief(key)}")
    return key


def shape_of(values: Any) -> tuple[int, ...]:
    """Return a shape or strides of a pickle as a tuple. ValueError if it is none."""
    if not isinstance(values, list | tuple) or len(values) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of shape or strides {brief(values)}")
    if any(not isinstance(n, int) or not 0 <= n < 2**63 for n in values):
        raise ValueError(f"a tensor of shape or strides {brief(values)}")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """Return a view of a storage. ValueError if its numbers are none of a view."""
    shape, strides = shape_of(shape), shape_of(strides)
    (offset,) = shape_of([offset])
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    return Tensor(_of(Storage, storage), offset, shape, strides)
