"""The little HTTP server that answers Prometheus."""

from __future__ import annotations

import errno
import socket
import socketserver
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PORTS = 16  # tried from the given one on: several processes, or runs, share a machine
_PATIENCE = 10.0  # seconds that a client may take to send its request


class _Quiet(wsgiref.simple_server.WSGIRequestHandler):
    """A handler that logs nothing and waits for nobody."""

    timeout = _PATIENCE

    def log_message(self, format: str, *args: object) -> None:
        """See `http.server.BaseHTTPRequestHandler`."""


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True
    allow_reuse_port = False  # another server's port is taken, not shared

    def server_bind(self) -> None:
        """Bind without asking DNS for the host's name, as `http.server` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Leave alone a client that went away."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class MetricsServer:
    """A server of /metrics in a thread; `port` is the one that it has got.

    Args:
        collect: yields the numbers; called by threads of the server.

    Raises:
        OSError: the host is none of this machine's, or the ports are taken or not allowed.
    """

    def __init__(self, host: str, port: int, collect: Callable[[], Iterator[Metric]]):
        from prometheus_client import CollectorRegistry, make_wsgi_app

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(collect))
        self._server = _bound(host, port)
        self._server.set_app(make_wsgi_app(registry))
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="prometheus", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()


class _Collector:
    """The collector of a registry of prometheus_client."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]):
        self.collect = collect

    def describe(self) -> list[Metric]:
        """Return nothing: names are not compared with those of other collectors."""
        return []


def _bound(host: str, port: int) -> _Server:
    kind = _Server6 if ":" in host else _Server
    last = min(port + PORTS, 65536) - 1
    for candidate in range(port, last + 1):
        try:
            return kind((host, candidate), _Quiet)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"the ports {port} to {last} are all taken")
