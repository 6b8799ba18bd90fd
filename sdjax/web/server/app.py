"""The application with a model: all routes, and what becomes of errors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sdjax.errors import UserError
from sdjax.web.server import site
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
    others: Sequence[Route] = (),
    places: Sequence[site.Place] = (),
) -> Gate:
    """Return the ASGI application of a service.

    Args:
        token, hosts, origins: see `Gate`.
        grace: seconds for the pictures that are on their way when the server stops.
        others: routes of further views; places: all views, between which the page leads.
    """

    async def metrics(http: Request) -> Response:
        content, kind = exposition(service)
        return Response(content, media_type=kind)

    errors: dict[Any, site.Handler] = {
        UserError: _refused,
        FloatingPointError: _broken,
        StoppedError: site.stopped,
    }
    routes = [
        Route("/metrics", metrics, methods=["GET"]),
        *Page(service, places).routes(),
        *A1111(service).routes(),
        *Lists(service).routes(),
        *OpenAI(service).routes(),
        *others,
    ]
    return site.make_site(
        routes, service.limits, token=token, hosts=hosts, origins=origins, handlers=errors,
        closing=lambda: service.engine.close(grace),
    )  # fmt: skip


async def _refused(http: Request, error: Exception) -> Response:
    if isinstance(error, BusyError):
        return site.answer(http, 503, str(error), {"retry-after": str(error.seconds)})
    if isinstance(error, TooSlowError):
        return site.answer(http, 504, str(error))
    if isinstance(error, GoneError):
        return site.answer(http, 499, str(error))  # nobody reads it
    return await site.refused(http, error)


async def _broken(http: Request, error: Exception) -> Response:
    return site.answer(http, 500, str(error))
