"""Orbax's log of a save that failed in the background, kept back: its caller says it better."""

from __future__ import annotations

import functools
import sys
from logging import ERROR
from pathlib import PurePath
from typing import Any

from absl import logging


@functools.cache
def leave_errors_to_callers() -> None:
    """Orbax logs the traceback of an error in the background, and raises it later all the same.

    Its other writes then end without those who waited for them, each with one more traceback.
    """
    hook = sys.unraisablehook

    def without_orphans(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_orphans
    logging.get_absl_logger().addFilter(
        lambda record: record.levelno < ERROR or "orbax" not in PurePath(record.pathname).parts
    )
