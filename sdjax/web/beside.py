"""The page that watches a run, as a process of its own beside the training.

It has no device, the lowest priority, and ends when the training does, however that ends: its
standard input is a pipe from it. What becomes of it never stops the training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

from sdjax.errors import UserError
from sdjax.system.listening import address, is_loopback, listen_near

HOST, PORT = "127.0.0.1", 7860
TOKEN_VARIABLE = "SDJAX_SERVE_TOKEN"
_PACKAGES = ("starlette", "uvicorn")


def parse(text: str) -> tuple[str, int]:
    """Return the host and port of "", "PORT", "HOST:PORT" or "[IPV6]:PORT".

    Raises:
        UserError: it is none of them, or lets other machines in without a token.
    """
    host, _, number = text.rpartition(":")
    host = host.strip("[]") or HOST
    port = int(number) if number.isascii() and number.isdecimal() else PORT if not text else -1
    if not 0 <= port < 65536:
        raise UserError(f"--serve={text}; expected a port from 0 to 65535, or HOST:PORT")
    if not is_loopback(host) and not os.environ.get(TOKEN_VARIABLE):
        raise UserError(
            f"--serve={text} lets other machines in, which needs a token of 16 characters or more "
            f"in ${TOKEN_VARIABLE}, as `openssl rand -hex 32` makes them"
        )
    return host, port


def check() -> None:
    """Raise UserError if the packages of the server are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'--serve needs {" and ".join(missing)}: install them by `pip install "sdjax[serve]"`'
        )


@contextlib.contextmanager
def served(workdir: str, host: str, port: int) -> Iterator[None]:
    """Watch a workdir while this context lasts, at a free port where another program has `port`.

    The workdir need not be there yet.
    """
    try:
        listener = listen_near(host, port)
    except UserError as error:
        print(f"the run is not served: {error}", file=sys.stderr, flush=True)
        yield
        return
    place = address(listener, host)
    taken = "" if port in (0, listener.getsockname()[1]) else f" (port {port} is taken)"
    print(f"watch the run at {place}{taken}", flush=True)
    command = [
        sys.executable, "-m", "sdjax.serve", f"--workdir={workdir}", f"--host={host}",
        f"--handed={listener.fileno()}",
    ]  # fmt: skip
    # No device, whatever a library may do.
    own = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with listener:
        # In a session of its own: Ctrl-C asks the training to save, and the page shows that.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            env=os.environ | own, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
