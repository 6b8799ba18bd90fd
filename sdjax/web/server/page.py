"""The page at /: it draws, shows pictures as they form, and keeps a gallery with their settings."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdjax.errors import UserError
from sdjax.web.server.a1111_lists import title_of
from sdjax.web.server.a1111_requests import picture_requests, text_requests
from sdjax.web.server.engine import Job, StoppedError
from sdjax.web.server.fields import InvalidRequest
from sdjax.web.server.infotext import infotext
from sdjax.web.server.requests import PictureRequest
from sdjax.web.server.service import Service, encode
from sdjax.web.server.site import Place, page
from sdjax.web.templating import asset


@dataclasses.dataclass(frozen=True, eq=False)
class Page:
    """The routes of one service."""

    service: Service
    places: Sequence[Place] = ()

    def routes(self) -> list[Route]:
        """Return the page, and what it draws by."""
        return [
            Route("/", self.page, methods=["GET"]),
            Route("/draw", self.draw, methods=["POST"]),
            Route("/rate", self.rate, methods=["POST"]),
        ]

    async def page(self, http: Request) -> Response:
        """Return the page, which loads nothing besides."""
        loaded, limits = self.service.loaded, self.service.limits
        height, width = loaded.model.native_size
        facts = {
            "title": self.service.title,
            "height": height,
            "width": width,
            "step": loaded.model.vae.downscale,
            "sampler": loaded.own.sampler.name,
            "steps": loaded.own.sampler.steps,
            "guidance": loaded.own.guidance,
            "most": dataclasses.asdict(limits),
            "samplers": [(name, title_of(name)) for name in self.service.samplers],
            "words": list(self.service.words),
            "loras": list(zip(loaded.adapters.names, loaded.adapters.start, strict=True)),
            "weighed": loaded.embedder is not None,
            "experts": list(self.service.experts),
            "negative": self.service.negative,
            "rates": self.service.ratings is not None,
            "place": self.service.place or self.service.loaded.name,
        }
        style = asset("report.css") + asset("draw.css")
        return page(
            "draw.html", ["draw.js"], facts=facts, style=style, places=self.places, here="/"
        )

    async def draw(self, http: Request) -> Response:
        """Answer with lines of JSON: steps with previews, then the pictures, or an error."""
        fields = await self.service.fields(http)
        make = picture_requests if fields.names("init_images") else text_requests
        requests = make(self.service, fields)
        self.service.check(requests)  # an error is a status now, and a line later
        return StreamingResponse(self._lines(requests), media_type="application/x-ndjson")

    async def rate(self, http: Request) -> Response:
        """Keep what somebody said of a picture."""
        fields, store = await self.service.fields(http), self.service.ratings
        rating = fields.whole("rating", 0, least=-1, most=1)
        pair = [fields.text(name, most=64) for name in ("better", "worse")]
        if store is None or (rating == 0) != all(pair):
            raise InvalidRequest(
                "expected a picture and a rating of 1 or -1, or two pictures, better and worse; "
                "and a server with --ratings=DIR"
            )
        if all(pair):
            await run_in_threadpool(store.prefer, *pair)
        else:
            picture = fields.text("picture", most=64)
            await run_in_threadpool(store.rate, picture, rating)
        return JSONResponse(None)

    async def _lines(self, requests: Sequence[PictureRequest]) -> AsyncIterator[str]:
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        last = -1

        async def look(jobs: Sequence[Job]) -> bool:
            nonlocal last
            # Of several pictures, the first that is not done.
            job = next((job for job in jobs if not job.done.done()), jobs[-1])
            number = jobs.index(job)
            if (now := number * 100_000 + job.step) != last:
                last = now
                await lines.put(self._step(job, number, len(jobs)))
            return False  # a client that leaves cancels the task

        async def work() -> None:
            try:
                pictures = await self.service.draw(requests, look)
                for request, picture in zip(requests, pictures, strict=True):
                    await lines.put(self._picture(request, picture))
            except (UserError, StoppedError, FloatingPointError) as error:
                await lines.put({"error": str(error)})
            except Exception:
                logging.exception("a picture of the page failed")
                await lines.put({"error": "the server failed; its log says why"})
            finally:
                await lines.put(None)

        task = asyncio.create_task(work())
        try:
            while (line := await lines.get()) is not None:
                yield json.dumps(line) + "\n"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _step(self, job: Job, number: int, count: int) -> dict[str, Any]:
        preview = self.service.preview(job)
        shown = None if preview is None else _data_url(encode(preview, "jpeg", {}), "jpeg")
        return {
            "number": number, "count": count, "step": job.step, "steps": job.steps,
            "waits": job.began is None, "preview": shown,
        }  # fmt: skip

    def _picture(self, request: PictureRequest, picture: Any) -> dict[str, Any]:
        title = title_of(request.sampler.name)
        text = infotext(request, self.service, title)
        file = encode(picture, "png", {"parameters": text})
        store, adapters = self.service.ratings, self.service.loaded.adapters
        return {
            "picture": _data_url(file, "png"),
            "name": store.show(request, file) if store else "",
            "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "seed": request.seed, "steps": request.sampler.steps, "sampler": request.sampler.name,
            "guidance": request.guidance, "width": request.width, "height": request.height,
            "karras": request.sampler.karras, "begun": request.image is not None,
            "strength": request.strength, "masked": request.mask is not None,
            "loras": adapters.listed(request.adapters),
            "lora_options": adapters.options(request.adapters),
        }  # fmt: skip


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
