"""The view that watches runs: the page, its events, pictures, and wishes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdjax.system.wishes import SAMPLE, STOP
from sdjax.web.server.fields import InvalidRequest, read_fields
from sdjax.web.server.site import NotTrustedError, Place, page
from sdjax.web.templating import asset
from sdjax.web.watch.runs import LiveRun, Runs
from sdjax.web.watch.stream import MOST, Stream

ADDRESS = "/watch"
_MOST_STREAMS = 64
_SCRIPTS = ("figures.js", "watch_plots.js", "watch_pictures.js", "watch.js")


@dataclasses.dataclass(eq=False)
class Watch:
    """The routes of some runs.

    trusted: whether the server has a token, without which nobody may ask a run for anything.
    ending: set when the server stops, so that streams end.
    """

    runs: Runs
    trusted: bool
    places: Sequence[Place] = ()
    ending: threading.Event = dataclasses.field(default_factory=threading.Event)
    _streams: int = 0

    def routes(self) -> list[Route]:
        """Return the page, and what it asks for."""
        return [
            Route(ADDRESS, self.page, methods=["GET"]),
            Route(f"{ADDRESS}/runs", self.list, methods=["GET"]),
            Route(f"{ADDRESS}/events", self.events, methods=["GET"]),
            Route(f"{ADDRESS}/picture", self.picture, methods=["GET"]),
            Route(f"{ADDRESS}/ask", self.ask, methods=["POST"]),
        ]

    async def page(self, http: Request) -> Response:
        """Return the page."""
        facts = {"trusted": self.trusted, "most": MOST}
        style = asset("report.css") + asset("watch.css")
        return page(
            "watch.html", _SCRIPTS, plots=True, facts=facts, style=style, places=self.places,
            here=ADDRESS,
        )  # fmt: skip

    async def list(self, http: Request) -> Response:
        """Return the names of the runs, those that go on first named so."""
        runs = await run_in_threadpool(self.runs.all)
        found = await run_in_threadpool(lambda: [_summary(run) for run in runs.values()])
        return JSONResponse(found)

    async def events(self, http: Request) -> Response:
        """Return the events of the runs that are named, up to `MOST`."""
        names = http.query_params.getlist("run")
        if not 0 < len(names) <= MOST:
            raise InvalidRequest(f"{len(names)} runs are named; expected 1 to {MOST}")
        if self._streams >= _MOST_STREAMS:
            raise InvalidRequest(f"{_MOST_STREAMS} pages watch already; close one")
        runs = [await run_in_threadpool(self.runs.get, name) for name in names]
        last = http.headers.get("last-event-id", "")[:2000]
        stream = await run_in_threadpool(Stream, runs, last, self.ending)

        async def counted():
            self._streams += 1
            try:
                async for text in stream.events():
                    yield text
            finally:
                self._streams -= 1

        return StreamingResponse(
            counted(), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )

    async def picture(self, http: Request) -> Response:
        """Return a grid as a data: address, with its prompts."""
        run = await run_in_threadpool(self.runs.get, http.query_params.get("run", ""))
        kind, step = http.query_params.get("kind", ""), http.query_params.get("step", "")
        if not step.isdecimal() or len(step) > 12:
            raise InvalidRequest(f"step is {step[:20]!r}; expected a whole number")
        found = await run_in_threadpool(run.picture, kind, int(step))
        width, height = found.size
        content = {"uri": found.uri, "width": width, "height": height, "prompts": found.prompts}
        return JSONResponse(content)

    async def ask(self, http: Request) -> Response:
        """Pass a wish on to a run."""
        if not self.trusted:
            raise NotTrustedError(
                "a run is asked for nothing by a server without a token: start it with "
                "--token_file=FILE, as docs/serving.md says"
            )
        fields = await read_fields(http)
        run = await run_in_threadpool(self.runs.get, fields.text("run", most=1000))
        wish = fields.text("wish", most=20)
        if wish not in (STOP, SAMPLE):
            raise InvalidRequest(f"wish is {wish!r}; expected {STOP!r} or {SAMPLE!r}")
        await run_in_threadpool(run.ask, wish)
        return JSONResponse(None)


def _summary(run: LiveRun) -> dict[str, object]:
    return {"name": run.name, "active": run.active, "newest": run.newest}
