"""Which commit of sdjax runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PATIENCE = 5.0  # seconds; a clone may lie on a slow disk


def commit() -> str:
    """Return the commit of the clone that runs, with "-dirty" after changes; "" outside of one."""
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return ""
    command = ["git", "-C", str(clone), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):  # there is no git
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
