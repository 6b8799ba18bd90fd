"""The sockets at which servers listen."""

from __future__ import annotations

import errno
import ipaddress
import socket

from sdjax.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether an address is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may mean any address


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. UserError if it cannot."""
    if not 0 <= port < 65536:
        raise UserError(f"--port={port}; expected 0 to 65535")
    try:
        return _bound(host, port)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port} cannot be listened at: {error.strerror}; choose another "
            "--port, or 0 for a free one"
        ) from error


def listen_near(host: str, port: int) -> socket.socket:
    """Return a socket that listens at a port, or at a free one where another program has that.

    Raises:
        UserError: there is no such address.
    """
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return listen(host, 0)
        raise UserError(f"{host}:{port} cannot be listened at: {error.strerror}") from error


def handed(number: int) -> socket.socket:
    """Return the socket that the process which started this one has opened."""
    return socket.socket(fileno=number)


def address(listener: socket.socket, host: str) -> str:
    """Return where a browser finds a socket."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _bound(host: str, port: int) -> socket.socket:
    family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(128)  # so that a port in use is seen now
    except OSError:
        listener.close()
        raise
    return listener
