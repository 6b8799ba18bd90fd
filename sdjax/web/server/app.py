"""The application: all routes, and what becomes of errors."""

from __future__ import annotations

import contextlib
import html
from collections.abc import AsyncIterator, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sdjax.errors import UserError, WriteError
from sdjax.web.server.a1111 import A1111
from sdjax.web.server.a1111_lists import Lists
from sdjax.web.server.engine import BusyError, StoppedError
from sdjax.web.server.gate import LOOPBACK, Gate
from sdjax.web.server.metrics import exposition
from sdjax.web.server.openai import OpenAI
from sdjax.web.server.page import Page
from sdjax.web.server.service import GoneError, Service, TooSlowError


def make_app(
    service: Service,
    *,
    token: str = "",
    hosts: Collection[str] = LOOPBACK,
    origins: Collection[str] = (),
    grace: float = 10.0,
) -> Gate:
    """Return the ASGI application of a service.

    Args:
        token, hosts, origins: see `Gate`.
        grace: seconds for the pictures that are on their way when the server stops.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.engine.close(grace)

    async def alive(http: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(http: Request) -> Response:
        content, kind = exposition(service)
        return Response(content, media_type=kind)

    errors: dict[Any, Any] = {
        UserError: _refused,
        HTTPException: _http_error,
        FloatingPointError: _broken,
        StoppedError: _stopped,
        ClientDisconnect: _stopped,
        Exception: _failed,
    }
    routes = [
        Route("/healthz", alive, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        *Page(service).routes(),
        *A1111(service).routes(),
        *Lists(service).routes(),
        *OpenAI(service).routes(),
    ]
    app = Starlette(routes=routes, exception_handlers=errors, lifespan=lifespan)
    return Gate(app, service.limits, token=token, hosts=hosts, origins=origins)


def _answer(http: Request, status: int, words: str, headers: dict[str, str] | None = None):
    """Return an error as the clients of its protocol read it."""
    if http.url.path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": words, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": error}, status, headers)
    return JSONResponse({"error": "Error", "detail": words, "errors": words}, status, headers)


async def _refused(http: Request, error: Exception) -> Response:
    if isinstance(error, BusyError):
        return _answer(http, 503, str(error), {"retry-after": str(error.seconds)})
    if isinstance(error, TooSlowError):
        return _answer(http, 504, str(error))
    if isinstance(error, GoneError):
        return _answer(http, 499, str(error))  # nobody reads it
    if isinstance(error, WriteError):
        return _answer(http, 507, str(error))  # RFC 4918: Insufficient Storage
    return _answer(http, 400 if http.url.path.startswith("/v1/") else 422, str(error))


async def _http_error(http: Request, error: HTTPException) -> Response:
    return _answer(http, error.status_code, html.unescape(error.detail), dict(error.headers or {}))


async def _broken(http: Request, error: Exception) -> Response:
    return _answer(http, 500, str(error))


async def _stopped(http: Request, error: Exception) -> Response:
    return _answer(http, 503, str(error) or "stopped")


async def _failed(http: Request, error: Exception) -> Response:
    return _answer(http, 500, "the server failed; its log says why")
