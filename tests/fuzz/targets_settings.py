"""Hostile settings: JSON, the description of a stored dataset."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np

from sdjax import text_files
from sdjax.errors import UserError
from tests.fuzz import mutation, stored_dataset

_WORDS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"\\u0000", b"null", b"NaN", b"-",
    b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\xef\xbb\xbf", b"\0",
    b"\xed\xa0\x80", b"\r", b"\n", "\u2028".encode(), b"0", b'"a"', b"true", b"__proto__",
)  # fmt: skip


def json_text(rng: np.random.Generator, folder: Path) -> str:
    """Text that is nearly JSON, in any codec."""
    if rng.random() < 0.5:
        content = mutation.tree(rng, {"a": [1, {"b": "c"}], "d": None, "e": {"f": [0.5, "g"]}})
        data = mutation.damaged(rng, json.dumps(content).encode()) if rng.random() < 0.5 else (
            json.dumps(content).encode())  # fmt: skip
        return _json(folder, data)
    words = rng.choice(len(_WORDS), int(rng.integers(1, 30)))
    data = b"".join(_WORDS[i] for i in words)
    if rng.random() < 0.3:
        data = bytes(rng.integers(0, 256, int(rng.integers(0, 64)), np.uint8)) + data
    return _json(folder, data)


def _json(folder: Path, data: bytes) -> str:
    (folder / "file.json").write_bytes(data)
    try:
        text_files.read_json(folder / "file.json")
    except UserError as error:
        assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


@functools.cache
def _dataset() -> dict[str, bytes]:
    """The files of a good dataset, made once for a process."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            file.name: file.read_bytes() for file in stored_dataset.write(Path(folder)).iterdir()
        }


def dataset(rng: np.random.Generator, folder: Path) -> str:
    """A stored dataset with other features.json, dataset_info.json, labels or records."""
    for name, data in _dataset().items():
        (folder / name).write_bytes(data)
    file = sorted(folder.iterdir())[rng.integers(len(_dataset()))]
    if file.suffix == ".json" and rng.random() < 0.9:
        file.write_text(json.dumps(mutation.tree(rng, json.loads(file.read_text()))))
    else:
        file.write_bytes(mutation.damaged(rng, file.read_bytes()))
    try:
        stored_dataset.read(folder)
    except UserError as error:
        assert len(str(error)) < 3000, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


TARGETS = [("json", json_text), ("dataset", dataset)]
