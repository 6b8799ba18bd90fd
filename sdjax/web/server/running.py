"""A server from its first request to its last."""

from __future__ import annotations

import os
import socket
import sys
import threading
from types import FrameType

import uvicorn

from sdjax.web.server.gate import Gate


class _Server(uvicorn.Server):
    """A server that ends its streams when it is told to stop, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, ending: threading.Event):
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._ending.set()
        super().handle_exit(sig, frame)

    def end(self) -> None:
        """Stop, from another thread."""
        self._ending.set()
        self.should_exit = True


def run_site(
    app: Gate, listener: socket.socket, ending: threading.Event, *, until_input_ends: bool = False
) -> None:
    """Serve an application until SIGTERM or Ctrl-C.

    Args:
        ending: set when it stops.
        until_input_ends: stop when the standard input does, which is a pipe from the process that
            started this one: it ends with it, however it ends.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=15, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    server = _Server(config, ending)
    if until_input_ends:

        def wait() -> None:
            while sys.stdin.buffer.read(1024):
                pass
            server.end()

        os.nice(10)  # the run has the processors first
        threading.Thread(target=wait, daemon=True).start()
    server.run(sockets=[listener])
