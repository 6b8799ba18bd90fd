"""The rows that `sdjax.prepare` left out of a dataset, duplicates first, as its files list them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from sdjax.data.prepare.duplicates import EXACT, NEAR
from sdjax.data.prepare.report import DROPPED
from sdjax.errors import UserError
from sdjax.system import paths, untrusted

MOST = 500  # rows that the page shows
_MOST_BYTES = 256 << 20


def read(folder: paths.Path) -> dict[str, Any] | None:
    """Return what was dropped: {"counts": {reason: rows}, "pairs": [...], "others": [...]}.

    A pair is {"name", "of", "reason"}, another row {"name", "reason", "detail"}. None if the folder
    has no list, which `sdjax.prepare` writes.

    Raises:
        UserError: the list cannot be read.
    """
    file = folder / DROPPED
    if not paths.exists(file):
        return None
    try:
        lines = untrusted.read_bytes(file, _MOST_BYTES).decode("utf-8", "replace").split("\n")
        rows = [_row(line) for line in lines if line.strip()]
    except untrusted.damage() as error:
        raise UserError(f"{file} cannot be read: {untrusted.why(error)}") from error
    counts = Counter(row["reason"] for row in rows)
    alike = [row for row in rows if row["reason"] in (EXACT, NEAR)]
    pairs = [
        {"name": row["name"], "of": row["detail"].removeprefix("of "), "reason": row["reason"]}
        for row in alike[:MOST]
    ]
    others = [row for row in rows if row["reason"] not in (EXACT, NEAR)][:MOST]
    return {"counts": dict(counts.most_common()), "pairs": pairs, "others": others}


def _row(line: str) -> dict[str, str]:
    row = json.loads(line)
    return {name: str(row[name])[:2000] for name in ("name", "reason", "detail")}
