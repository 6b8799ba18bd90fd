"""The gate that every request passes first: host, origin, token, size and rate.

An ASGI middleware. It answers what it refuses itself: nothing behind it sees such a request.
"""

from __future__ import annotations

import base64
import binascii
import collections
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.web.server.requests import Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/healthz",)  # answers without a token
_ADDRESSES = 4096  # whose requests are counted
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class RefusedError(Exception):
    """A request that the gate refuses: a status, and the sentence that goes with it."""

    def __init__(self, status: int, words: str, **headers: str):
        super().__init__(words)
        self.status, self.headers = status, headers


@dataclasses.dataclass(eq=False)
class Gate:
    """The middleware.

    token: "" where none is needed.
    hosts: names by which the server may be asked; empty for any. A page of the web can make a
        browser ask a name of its own that leads here (DNS rebinding).
    origins: those of other pages that may ask too (CORS); none by default.
    """

    app: ASGIApp
    limits: Limits
    token: str = ""
    hosts: Collection[str] = LOOPBACK
    origins: Collection[str] = ()

    def __post_init__(self) -> None:
        self._asked: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin", "")
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                own = [*message.get("headers", []), *_HEADERS, *self._cors(origin)]
                message = {**message, "headers": own}
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and origin in self.origins:
                return await _answer(sending, 204, None)
            await self.app(scope, self._bounded(receive), sending)
        except RefusedError as refused:
            if not began:
                body = {
                    "detail": str(refused),
                    "error": {"message": str(refused), "type": "refused"},
                }
                await _answer(sending, refused.status, body, **refused.headers)
        except Exception:  # nothing of the inside reaches the client
            logging.exception("a request to %s failed", scope["path"])
            if not began:
                words = "the server failed; its log says why"
                body = {"detail": words, "error": {"message": words, "type": "server_error"}}
                await _answer(sending, 500, body)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Check everything that is known before the body."""
        host = _name(headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            raise RefusedError(
                421, f"this server is not called {host!r}; start it with --allow_host"
            )
        origin = headers.get("origin", "")
        if origin and origin not in self.origins and not _same(origin, headers.get("host", "")):
            raise RefusedError(403, f"pages of {origin!r} may not use this server (--allow_origin)")
        self._check_rate((scope.get("client") or ("", 0))[0])
        preflight = scope["method"] == "OPTIONS" and origin in self.origins
        if self.token and scope["path"] not in _OPEN and not preflight:
            if not _knows(headers.get("authorization", ""), self.token):
                raise RefusedError(
                    401, "expected the token: Authorization: Bearer TOKEN, or Basic with it as the "
                    "password", **{"www-authenticate": 'Basic realm="sdjax"'}
                )  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body:
            raise self._too_large()

    def _check_rate(self, address: str) -> None:
        """Take one from the address's share, which fills up again within a minute."""
        most, now = float(self.limits.rate), time.monotonic()
        left, then = self._asked.pop(address, (most, now))
        left = min(most, left + (now - then) * most / 60)
        self._asked[address] = (max(left - 1, 0.0), now)
        if len(self._asked) > _ADDRESSES:
            self._asked.popitem(last=False)
        if left < 1:
            raise RefusedError(
                429, f"more than {self.limits.rate} requests a minute", **{"retry-after": "1"}
            )

    def _bounded(self, receive: Receive) -> Receive:
        """Return a `receive` that refuses a body that is longer than it says, or does not say."""
        size = 0

        async def receiving() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limits.body:
                raise self._too_large()
            return message

        return receiving

    def _too_large(self) -> RefusedError:
        most = self.limits.body
        return RefusedError(413, f"the request is too large; expected at most {most} bytes")

    def _cors(self, origin: str) -> list[tuple[bytes, bytes]]:
        if not origin or origin not in self.origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"vary", b"origin"),
        ]


def _name(host: str) -> str:
    """Return the host without its port, in lower case."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    """Return whether a page of this origin came from the host that is asked."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False


def _knows(authorization: str, token: str) -> bool:
    """Return whether a header has the token; the time does not say how much of it is right."""
    kind, _, given = authorization.partition(" ")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode(), token.encode())


async def _answer(send: Send, status: int, body: object, **headers: str) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    fields += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content})
