"""Hostile text and JSON: what every reader of settings begins with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdjax import text_files
from sdjax.errors import UserError

_WORDS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"\\u0000", b"null", b"NaN", b"-",
    b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\xef\xbb\xbf", b"\0",
    b"\xed\xa0\x80", b"\r", b"\n", "\u2028".encode(), b"0", b'"a"', b"true", b"__proto__",
)  # fmt: skip


def json_text(rng: np.random.Generator, folder: Path) -> str:
    """Text that is nearly JSON, in any codec."""
    words = rng.choice(len(_WORDS), int(rng.integers(1, 30)))
    data = b"".join(_WORDS[i] for i in words)
    if rng.random() < 0.3:
        data = bytes(rng.integers(0, 256, int(rng.integers(0, 64)), np.uint8)) + data
    (folder / "file.json").write_bytes(data)
    try:
        text_files.read_json(folder / "file.json")
    except UserError as error:
        assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


TARGETS = [("json", json_text)]
