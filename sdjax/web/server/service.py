"""Pictures for all protocols: from a request to finished files, or to an error with its status."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.requests import Request

from sdjax.diffusion.grids import SAMPLERS, changed_sampler
from sdjax.errors import UserError
from sdjax.system.untrusted import brief
from sdjax.web.server.engine import Engine, Job
from sdjax.web.server.fields import Fields, InvalidRequest, Limits, read_fields
from sdjax.web.server.loaded import LoadedModel
from sdjax.web.server.ratings import RatingStore
from sdjax.web.server.requests import PictureRequest
from sdjax.web.server.statistics import Statistics

_LOOK = 0.25  # seconds between looks whether the client is still there


class TooSlowError(UserError):
    """A request that took longer than the limit."""


class GoneError(UserError):
    """The client has closed the connection."""


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """A model that is served.

    digest: sha256 of its parameters, in hexadecimal.
    negative: the negative prompt of requests that name none.
    ratings: where ratings go; None where none are taken.
    statistics: of the pictures, which the engine hands it.
    place: what --model is to be for the same pictures by `sdjax.sample`.
    experts: that predict in its place, as --expert named them; words: those of --embedding.
    """

    loaded: LoadedModel
    engine: Engine
    limits: Limits
    digest: str = ""
    words: Sequence[str] = ()
    negative: str = ""
    place: str = ""
    ratings: RatingStore | None = None
    statistics: Statistics = dataclasses.field(default_factory=Statistics)
    experts: Sequence[str] = ()
    started: float = dataclasses.field(default_factory=time.time)

    @property
    def title(self) -> str:
        """Return the name of the model with the beginning of its digest, as A1111 titles are."""
        return f"{self.loaded.name} [{self.digest[:10]}]" if self.digest else self.loaded.name

    def check_model(self, field: str, name: str) -> None:
        """Raise InvalidRequest if a client names another model than this one; "" names none."""
        if name not in ("", self.title, self.loaded.name, self.digest, self.digest[:10]):
            raise InvalidRequest(
                f"{field} is {brief(name)}; this server has {self.title} alone: start another for "
                "another model"
            )

    def check(self, requests: Sequence[PictureRequest]) -> None:
        """Raise UserError if a picture is not for this model."""
        for request in requests:
            self.loaded.check(request)

    def wording(self, fields: Fields) -> dict[str, Any]:
        """Return fields of `PictureRequest`: both prompts, and what the first says of adapters.

        Raises:
            InvalidRequest: an adapter is not known, or a prompt is too long.
            UserError: a weight in a prompt is none.
        """
        most, loaded = self.limits.prompt, self.loaded
        given = fields.text("prompt", most=most)
        prompt, adapters = loaded.adapters.asked(given, fields.group("loras"))
        negative = fields.text("negative_prompt", self.negative, most=most)
        chunks = 1 if loaded.embedder is None else loaded.embedder.chunks([prompt, negative])
        if chunks > self.limits.chunks:
            raise InvalidRequest(
                f"the prompt has {chunks} chunks of tokens; expected at most {self.limits.chunks}"
            )
        return {
            "prompt": prompt, "negative_prompt": negative, "adapters": adapters, "chunks": chunks,
        }  # fmt: skip

    @functools.cached_property
    def samplers(self) -> tuple[str, ...]:
        """Return the samplers that go with the model's noise schedule."""
        return tuple(name for name in SAMPLERS if self._fits(name))

    def _fits(self, name: str) -> bool:
        own, (height, width) = self.loaded.own, self.loaded.model.native_size
        try:
            sampler = changed_sampler(own.sampler, {"name": name})
            self.loaded.check(PictureRequest("", "", 0, height, width, sampler, 1.0))
        except InvalidRequest:
            return True  # the model reads a picture
        except UserError:
            return False
        return True

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
        return await read_fields(http)

    async def draw(
        self,
        requests: Sequence[PictureRequest],
        look: Callable[[Sequence[Job]], Awaitable[bool]],
    ) -> list[np.ndarray]:
        """Return the pictures, uint8 [H, W, 3], unless the client leaves or the time is over.

        Args:
            look: called four times a second with the jobs; returns whether the client has left.

        Raises:
            UserError: a request is not for this model, the queue is full, or it took too long.
        """
        self.check(requests)
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
                if await look(jobs):
                    raise GoneError("the client has closed the connection")
        finally:
            self.engine.stop(jobs)
            for future in futures:
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return [job.done.result() for job in jobs]


def leaving(http: Request) -> Callable[[Sequence[Job]], Awaitable[bool]]:
    """Return a `look` that sees whether the client of a request has left."""

    async def look(jobs: Sequence[Job]) -> bool:
        return await http.is_disconnected()

    return look


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
