"""Mistakes of input, as against bugs: shown as one message with its remedy, without a traceback."""

from __future__ import annotations

import sys


class UserError(ValueError):
    """Something the user can mend; the message names it, the value, and the remedy."""


def explain(error: Exception) -> int:
    """Print the message and give the exit code for wrong input."""
    print(f"error: {error}", file=sys.stderr)
    return 2
