"""Pictures for all protocols: from a request to finished files, or to an error with its status."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.requests import Request

from sdjax.errors import UserError
from sdjax.web.server.engine import Engine, Job
from sdjax.web.server.loaded import LoadedModel
from sdjax.web.server.requests import Fields, InvalidRequest, Limits, PictureRequest

_LOOK = 0.25  # seconds between looks whether the client is still there


class TooSlowError(UserError):
    """A request that took longer than the limit."""


class GoneError(UserError):
    """The client has closed the connection."""


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """A model that is served.

    digest: sha256 of its parameters, in hexadecimal.
    loras: the adapters in its weights, as --lora named them; words: those of --embedding.
    """

    loaded: LoadedModel
    engine: Engine
    limits: Limits
    digest: str = ""
    loras: Sequence[str] = ()
    words: Sequence[str] = ()
    started: float = dataclasses.field(default_factory=time.time)

    @property
    def title(self) -> str:
        """Return the name of the model with the beginning of its digest, as A1111 titles are."""
        return f"{self.loaded.name} [{self.digest[:10]}]" if self.digest else self.loaded.name

    def preview(self, job: Job) -> np.ndarray | None:
        """Return what a picture looks like so far, uint8 [H, W, 3]; None before its first step."""
        if job.estimate is None:
            return None
        size = job.request.height, job.request.width
        return self.loaded.preview.picture(job.estimate, size)

    async def fields(self, http: Request) -> Fields:
        """Return the JSON object of a request's body.

        Raises:
            InvalidRequest: it is none.
        """
        body = await http.body()
        try:
            return Fields(json.loads(body or b"{}"))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body is no JSON: {error}; send a JSON object") from error

    async def draw(
        self,
        requests: Sequence[PictureRequest],
        http: Request,
        watch: Callable[[Sequence[Job]], Awaitable[None]] | None = None,
    ) -> list[np.ndarray]:
        """Return the pictures, uint8 [H, W, 3], unless the client leaves or the time is over.

        Args:
            watch: called every quarter of a second with the jobs.

        Raises:
            UserError: a request is not for this model, the queue is full, or it took too long.
        """
        for request in requests:
            if "<lora:" in request.prompt:
                raise InvalidRequest(
                    "the prompt has <lora:...>; this server's adapters are those of its --lora, "
                    "leave the words out"
                )
            self.loaded.check(request)
        jobs = self.engine.submit(requests)
        futures = {asyncio.wrap_future(job.done) for job in jobs}
        deadline = time.monotonic() + self.limits.seconds
        try:
            while pending := (await asyncio.wait(futures, timeout=_LOOK))[1]:
                if time.monotonic() > deadline:
                    raise TooSlowError(
                        f"{len(pending)} of {len(jobs)} pictures were not done within "
                        f"{self.limits.seconds:g} s; ask for fewer, or for fewer steps"
                    )
                if await http.is_disconnected():
                    raise GoneError("the client has closed the connection")
                if watch is not None:
                    await watch(jobs)
        finally:
            self.engine.stop(jobs)
            for future in futures:
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return [job.done.result() for job in jobs]


def encode(picture: np.ndarray, kind: str, text: Mapping[str, str], quality: int = 90) -> bytes:
    """Return a picture as a file.

    Args:
        kind: "png", "jpeg" or "webp"; quality: of the last two, 1 to 100.
        text: the text fields of a PNG.
    """
    out = io.BytesIO()
    if kind == "png":
        info = PngInfo()
        for name, value in text.items():
            info.add_itxt(name, value) if not value.isascii() else info.add_text(name, value)
        Image.fromarray(picture).save(out, "PNG", pnginfo=info)
    else:
        Image.fromarray(picture).save(out, kind.upper(), quality=quality)
    return out.getvalue()
