"""The images of OpenAI's API: /v1/images/generations, /v1/images/edits and /v1/models.

Fields are those of the API reference; what a model of ours has no use for (quality, style,
background, moderation, user) is ignored. A seed, steps, guidance and negative_prompt may be sent
besides (`extra_body` of the client).
"""

from __future__ import annotations

import base64
import dataclasses
import re
import secrets
import time
from typing import Any

import numpy as np
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdjax.diffusion.grids import changed_sampler
from sdjax.sampling.generate import MOST_SEED
from sdjax.system.untrusted import brief
from sdjax.web.server.a1111_lists import title_of
from sdjax.web.server.fields import Fields, InvalidRequest
from sdjax.web.server.infotext import infotext
from sdjax.web.server.requests import (
    PictureRequest,
    mask_array,
    picture_array,
    read_image,
)
from sdjax.web.server.service import Service, encode, leaving

_MOST = 10  # pictures of one request, as in the API
_FORMATS = ("png", "jpeg", "webp")


@dataclasses.dataclass(frozen=True, eq=False)
class OpenAI:
    """The routes of one service."""

    service: Service

    def routes(self) -> list[Route]:
        """Return the routes below /v1."""
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
        ]

    async def models(self, http: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [{
            "id": self.service.loaded.name, "object": "model",
            "created": int(self.service.started), "owned_by": "sdjax",
        }]})  # fmt: skip

    async def generations(self, http: Request) -> Response:
        """Draw pictures of a prompt."""
        fields = await self.service.fields(http)
        return await self._answer(http, fields, self._requests(fields, None))

    async def edits(self, http: Request) -> Response:
        """Draw pictures that begin with one; with a mask, where that is transparent."""
        limits = self.service.limits
        async with http.form(max_files=4, max_fields=40, max_part_size=limits.body) as form:
            fields = Fields({k: v for k, v in form.multi_items() if isinstance(v, str)})
            files = {name: await _file(form, name) for name in ("image", "image[]", "mask")}
        image = files["image"] or files["image[]"]
        if image is None:
            raise InvalidRequest("image is missing; send one picture as multipart/form-data")
        picture = read_image("image", image, limits.image)
        requests = self._requests(fields, picture.size[::-1])
        size = requests[0].height, requests[0].width
        begun: dict[str, Any] = {"image": picture_array(picture, size)}
        begun["strength"] = fields.number("strength", 0.75, least=0.0, most=1.0)
        if files["mask"] is not None:
            begun["mask"] = _transparent(files["mask"], size, limits.image)
            begun["strength"] = fields.number("strength", 1.0, least=0.0, most=1.0)
        requests = [dataclasses.replace(request, **begun) for request in requests]
        return await self._answer(http, fields, requests)

    def _requests(self, fields: Fields, own_size: tuple[int, int] | None) -> list[PictureRequest]:
        """Return the pictures that are asked for; picture i has the seed + i.

        Args:
            own_size: (height, width) of the picture to be edited, for the size "auto".
        """
        limits, loaded = self.service.limits, self.service.loaded
        self.service.check_model("model", fields.text("model", most=1000))
        if fields.text("response_format", "b64_json", most=100) == "url":
            raise InvalidRequest("response_format is 'url'; this server answers with 'b64_json'")
        if not fields.text("prompt", most=limits.prompt):
            raise InvalidRequest("prompt is missing; expected a text")
        count = fields.whole("n", 1, least=1, most=min(_MOST, limits.pictures))
        seed = fields.whole("seed", -1, least=-1, most=MOST_SEED - count + 1)
        if seed == -1:
            seed = secrets.randbelow(2**32 - 2 - _MOST)
        own = loaded.own
        steps = fields.whole("steps", own.sampler.steps, least=1, most=limits.steps)
        height, width = self._size(fields, own_size)
        one = PictureRequest(
            **self.service.wording(fields),
            seed=seed,
            height=height,
            width=width,
            sampler=changed_sampler(own.sampler, {"steps": steps}),
            guidance=fields.number("guidance", own.guidance, least=0.0, most=100.0),
        )
        return [dataclasses.replace(one, seed=seed + i) for i in range(count)]

    def _size(self, fields: Fields, own_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return (height, width) of "WIDTHxHEIGHT", or the model's for "auto"."""
        given = fields.text("size", "auto", most=100)
        native, most = self.service.loaded.model.native_size, self.service.limits.side
        if given == "auto":
            if own_size is None or max(own_size) > most:
                return native
            side = self.service.loaded.model.vae.downscale
            height, width = (max(side, length // side * side) for length in own_size)
            return height, width
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", given)
        if not found or not all(8 <= int(length) <= most for length in found.groups()):
            raise InvalidRequest(
                f"size is {brief(given)}; expected WIDTHxHEIGHT, each 8 to {most}, or auto"
            )
        return int(found[2]), int(found[1])

    async def _answer(
        self, http: Request, fields: Fields, requests: list[PictureRequest]
    ) -> Response:
        kind = fields.text("output_format", "png", most=10)
        if kind not in _FORMATS:
            raise InvalidRequest(
                f"output_format is {brief(kind)}; expected one of {', '.join(_FORMATS)}"
            )
        quality = fields.whole("output_compression", 90, least=0, most=100)
        pictures = await self.service.draw(requests, leaving(http))
        title = title_of(requests[0].sampler.name)
        data = []
        for request, picture in zip(requests, pictures, strict=True):
            text = {"parameters": infotext(request, self.service, title)}
            file = encode(picture, kind, text, quality)
            data.append({"b64_json": base64.b64encode(file).decode(), "seed": request.seed})
        size = f"{requests[0].width}x{requests[0].height}"
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": kind, "size": size}
        )


async def _file(form: FormData, name: str) -> bytes | None:
    """Return the bytes of an uploaded file; None if there is none."""
    given = form.get(name)
    return await given.read() if isinstance(given, UploadFile) else None


def _transparent(data: bytes, size: tuple[int, int], most_pixels: int) -> np.ndarray:
    """Return float32 [H, W, 1], 1 where a mask is transparent; one without alpha where it is white.

    As the API says: its fully transparent areas are where the picture is drawn anew.
    """
    image = read_image("mask", data, most_pixels)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return mask_array(image, size)
    return mask_array(image.convert("RGBA").getchannel("A"), size, inverted=True)
