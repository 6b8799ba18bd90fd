"""The API of AUTOMATIC1111's web UI, /sdapi/v1, as its clients use it.

Fields, defaults and answers are those of its modules/api/api.py and models.py. What this server has
not (upscalers, styles, scripts) is an empty list; fields that it does not know are ignored.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdjax.web.server.a1111_lists import PREFIX, title_of
from sdjax.web.server.a1111_requests import picture_requests, text_requests
from sdjax.web.server.fields import Fields
from sdjax.web.server.infotext import infotext
from sdjax.web.server.requests import (
    PictureRequest,
)
from sdjax.web.server.service import Service, encode, leaving


@dataclasses.dataclass(frozen=True, eq=False)
class A1111:
    """The routes of one service."""

    service: Service

    def routes(self) -> list[Route]:
        """Return the routes below /sdapi/v1."""
        posts = {
            "txt2img": self.txt2img, "img2img": self.img2img, "interrupt": self.interrupt,
            "skip": self.interrupt,
        }  # fmt: skip
        return [
            Route(f"{PREFIX}/progress", self.progress, methods=["GET"]),
            *(Route(f"{PREFIX}/{name}", call, methods=["POST"]) for name, call in posts.items()),
        ]

    async def txt2img(self, http: Request) -> Response:
        """Draw pictures of a prompt."""
        fields = await self.service.fields(http)
        return await self._answer(http, fields, text_requests(self.service, fields))

    async def img2img(self, http: Request) -> Response:
        """Draw pictures that begin with one, or fill in its mask."""
        fields = await self.service.fields(http)
        return await self._answer(http, fields, picture_requests(self.service, fields))

    async def _answer(
        self, http: Request, fields: Fields, requests: Sequence[PictureRequest]
    ) -> Response:
        pictures = await self.service.draw(requests, leaving(http))
        service, first = self.service, requests[0]
        title = title_of(first.sampler.name)
        texts = [infotext(request, service, title) for request in requests]
        files = [
            encode(picture, "png", {"parameters": text})
            for picture, text in zip(pictures, texts, strict=True)
        ]
        prompts = [service.loaded.adapters.written(r.prompt, r.adapters) for r in requests]
        info = {
            "prompt": prompts[0],
            "all_prompts": prompts,
            "negative_prompt": first.negative_prompt,
            "all_negative_prompts": [each.negative_prompt for each in requests],
            "seed": first.seed,
            "all_seeds": [each.seed for each in requests],
            "subseed": first.seed,
            "all_subseeds": [each.seed for each in requests],
            "subseed_strength": 0,
            "width": first.width,
            "height": first.height,
            "sampler_name": title,
            "cfg_scale": first.guidance,
            "steps": first.sampler.steps,
            "batch_size": len(requests),
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": service.loaded.name,
            "sd_model_hash": service.digest[:10],
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "denoising_strength": first.strength if first.image is not None else 0,
            "extra_generation_params": {},
            "index_of_first_image": 0,
            "infotexts": texts,
            "styles": [],
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "clip_skip": 1,
            "is_using_inpainting_conditioning": False,
            "version": "sdjax",
        }
        send = fields.flag("send_images", True)
        images = [base64.b64encode(file).decode() for file in files] if send else []
        echo = {key: info[key] for key in ("prompt", "negative_prompt", "seed", "steps", "width",
                                           "height", "cfg_scale", "sampler_name")}  # fmt: skip
        body = {"images": images, "parameters": echo, "info": json.dumps(info)}
        return JSONResponse(body)

    async def progress(self, http: Request) -> Response:
        """Say how far the pictures are that are being drawn, with the first as it is estimated."""
        drawing, waiting = self.service.engine.jobs()
        first = drawing[0] if drawing else None
        done = first.step / first.steps if first else 0.0
        eta = 0.0
        if first and first.began and done:
            eta = (time.monotonic() - first.began) * (1 - done) / done
        skip = http.query_params.get("skip_current_image", "").lower() == "true"
        picture = None if skip or first is None else self.service.preview(first)
        current = None
        if picture is not None:
            current = base64.b64encode(encode(picture, "png", {})).decode()
        state = {
            "skipped": False,
            "interrupted": bool(first and first.stopped),
            "stopping_generation": bool(first and first.stopped),
            "job": "drawing" if first else "",
            "job_count": len(drawing) + len(waiting),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": first.step if first else 0,
            "sampling_steps": first.steps if first else 0,
        }
        return JSONResponse({
            "progress": done, "eta_relative": eta, "state": state, "current_image": current,
            "textinfo": None,
        })  # fmt: skip

    async def interrupt(self, http: Request) -> Response:
        """Stop what is being drawn; its pictures are answered as they are estimated now."""
        self.service.engine.stop()
        return JSONResponse({})
