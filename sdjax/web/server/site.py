"""The parts that all applications of the server share: gate, health, scripts, errors in words."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sdjax.errors import UserError, WriteError
from sdjax.web.server.fields import Limits
from sdjax.web.server.gate import LOOPBACK, Gate
from sdjax.web.templating import asset, environment, policy, script_of_plots

_KEPT = "private, max-age=86400"


@dataclasses.dataclass(frozen=True)
class Place:
    """A view of the page, and where it is."""

    name: str
    address: str


class NotTrustedError(UserError):
    """Something that takes a token, asked of a server that has none."""


Handler = Callable[[Request, Exception], Any]


def make_site(
    routes: Sequence[Route],
    limits: Limits,
    *,
    token: str = "",
    hosts: Collection[str] = LOOPBACK,
    origins: Collection[str] = (),
    handlers: Mapping[Any, Handler] | None = None,
    closing: Callable[[], object] | None = None,
) -> Gate:
    """Return an ASGI application behind the gate.

    Args:
        token, hosts, origins: see `Gate`.
        handlers: of errors, besides those of everybody.
        closing: called when the server stops.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if closing is not None:
            closing()

    async def alive(http: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def plotly(http: Request) -> Response:
        kept = {"cache-control": _KEPT}
        return Response(script_of_plots(), media_type="text/javascript", headers=kept)

    errors: dict[Any, Any] = {
        NotTrustedError: _not_trusted,
        UserError: refused,
        HTTPException: _http_error,
        ClientDisconnect: stopped,
        Exception: _failed,
        **(handlers or {}),
    }
    own = [
        Route("/healthz", alive, methods=["GET"]),
        Route("/plots.js", plotly, methods=["GET"]),
    ]
    app = Starlette(routes=[*own, *routes], exception_handlers=errors, lifespan=lifespan)
    return Gate(app, limits, token=token, hosts=hosts, origins=origins)


def page(
    template: str,
    scripts: Sequence[str],
    *,
    plots: bool = False,
    pictures: bool = False,
    **values: Any,
) -> Response:
    """Return a page of a template with its scripts, which alone run; a view has one of each.

    Args:
        scripts: names beside the templates; joined, they are one.
        plots: whether the page draws plots, by /plots.js.
        pictures: whether it shows pictures of the server's, besides those in texts.
    """
    script = _joined(tuple(scripts))
    text = environment().get_template(template).render(script=script, **values)
    rules = policy([script]) + "; connect-src 'self'; frame-ancestors 'none'"
    if plots:
        rules = rules.replace("script-src", "script-src 'self'")
    if pictures:
        rules = rules.replace("img-src", "img-src 'self'")
    return HTMLResponse(text, headers={"content-security-policy": rules})


@functools.cache
def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(asset(name) for name in names)


def answer(http: Request, status: int, words: str, headers: dict[str, str] | None = None):
    """Return an error as the clients of its protocol read it."""
    if http.url.path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": words, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": error}, status, headers)
    return JSONResponse({"error": "Error", "detail": words, "errors": words}, status, headers)


async def refused(http: Request, error: Exception) -> Response:
    """Answer an input that is wrong, or a disk that is full."""
    if isinstance(error, WriteError):
        return answer(http, 507, str(error))  # RFC 4918: Insufficient Storage
    return answer(http, 400 if http.url.path.startswith("/v1/") else 422, str(error))


async def stopped(http: Request, error: Exception) -> Response:
    """Answer a request that was stopped."""
    return answer(http, 503, str(error) or "stopped")


async def _not_trusted(http: Request, error: Exception) -> Response:
    return answer(http, 403, str(error))


async def _http_error(http: Request, error: HTTPException) -> Response:
    return answer(http, error.status_code, html.unescape(error.detail), dict(error.headers or {}))


async def _failed(http: Request, error: Exception) -> Response:
    return answer(http, 500, "the server failed; its log says why")
