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
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.web.server.fields import Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/healthz",)  # answers without a token
# Small pictures, of which a page shows many, count as a tenth of a request.
_SMALL = ("/watch/picture", "/look/picture")
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
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        origin = headers.get("origin", "")
        exchange = _Exchange(receive, send, self.limits.body, self._cors(origin))
        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and origin in self.origins:
                return await exchange.answer(204, None)
            await self.app(scope, exchange.receive, exchange.send)
        except RefusedError as refused:
            exchange.refused = refused
        except Exception:  # nothing of the inside reaches the client
            logging.exception("a request to %s failed", scope["path"])
            exchange.refused = exchange.refused or RefusedError(
                500, "the server failed; its log says why"
            )
        if (why := exchange.refused) is not None:
            words = str(why)
            body = {"detail": words, "error": {"message": words, "type": "refused"}}
            await exchange.answer(why.status, body, **why.headers)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Check everything that is known before the body."""
        host = _name(headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            raise RefusedError(
                421, f"this server is not called {host!r}; start it with --allow_host={host}"
            )
        origin = headers.get("origin", "")
        if origin and origin not in self.origins and not _same(origin, headers.get("host", "")):
            raise RefusedError(403, f"pages of {origin!r} may not use this server (--allow_origin)")
        cost = 0.1 if scope["path"].startswith(_SMALL) else 1.0
        self._check_rate((scope.get("client") or ("", 0))[0], cost)
        preflight = scope["method"] == "OPTIONS" and origin in self.origins
        if self.token and scope["path"] not in _OPEN and not preflight:
            if not _knows(headers.get("authorization", ""), self.token):
                raise RefusedError(
                    401, "expected the token: Authorization: Bearer TOKEN, or Basic with it as the "
                    "password", **{"www-authenticate": 'Basic realm="sdjax"'}
                )  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body:
            raise _too_large(self.limits.body)

    def _check_rate(self, address: str, cost: float) -> None:
        """Take a cost from the address's share, which fills up again within a minute."""
        most, now = float(self.limits.rate), time.monotonic()
        left, then = self._asked.pop(address, (most, now))
        left = min(most, left + (now - then) * most / 60)
        self._asked[address] = (max(left - cost, 0.0), now)
        if len(self._asked) > _ADDRESSES:
            self._asked.popitem(last=False)
        if left < cost:
            raise RefusedError(
                429, f"more than {self.limits.rate} requests a minute", **{"retry-after": "1"}
            )

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


def _too_large(most: int) -> RefusedError:
    return RefusedError(413, f"the request is too large; expected at most {most} bytes")


@dataclasses.dataclass(eq=False)
class _Exchange:
    """A request and its answer: what comes in is bounded, what goes out has our headers.

    refused: why nothing of the application is answered any more.
    """

    receiving: Receive
    sending: Send
    most: int
    headers: Sequence[tuple[bytes, bytes]]
    refused: RefusedError | None = None
    began: bool = False
    size: int = 0

    async def receive(self) -> Message:
        """Return the next part; a body that is longer than it says, or does not say, is refused."""
        message = await self.receiving()
        self.size += len(message.get("body", b""))
        if self.size > self.most:
            self.refused = _too_large(self.most)
            raise self.refused
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the application's answer."""
        if self.refused is None:
            await self._send(message)

    async def answer(self, status: int, body: object, **headers: str) -> None:
        """Send an answer of the gate, unless the application's has begun."""
        if self.began:
            return
        content = b"" if body is None else json.dumps(body).encode()
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        fields += [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
        await self._send({"type": "http.response.body", "body": content})

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.began = True
            given = list(message.get("headers", []))
            names = {name.lower() for name, _ in given}
            own = [*given, *(pair for pair in _HEADERS if pair[0] not in names), *self.headers]
            message = {**message, "headers": own}
        await self.sending(message)
