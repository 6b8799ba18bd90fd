"""A C++ abort, JAX's answer to a failed connection, as a message and an exit code."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
# Not Python's signal module: its handlers wait for the main thread, which abort() does not.
# https://docs.python.org/3/c-api/sys.html#c.PyOS_setsig: it returns the handler before.
_set_handler = ctypes.PYFUNCTYPE(_Handler, ctypes.c_int, _Handler)(
    ("PyOS_setsig", ctypes.pythonapi)
)


@contextlib.contextmanager
def abort_becomes(code: int, message: str, unless: Callable[[], bool] = bool) -> Iterator[None]:
    """In this context, end the process with a message and an exit code where C++ would abort it.

    Args:
        unless: is called in the dying process; where it returns True the abort goes on.
    """

    def handle(number: int) -> None:
        if not unless():
            os.write(2, f"{message}\n".encode())
            os._exit(code)

    handler = _Handler(handle)
    before = _set_handler(signal.SIGABRT, handler)
    try:
        yield
    finally:
        _set_handler(signal.SIGABRT, before)
