"""Pictures that clients of A1111's API ask for, from the fields of txt2img and img2img."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from sdjax.diffusion.grids import SamplerConfig, changed_sampler
from sdjax.sampling.generate import MOST_SEED
from sdjax.system.untrusted import brief
from sdjax.web.server.a1111_lists import SCHEDULERS, sampler_of
from sdjax.web.server.fields import Fields, InvalidRequest
from sdjax.web.server.requests import (
    PictureRequest,
    decoded_image,
    mask_array,
    picture_array,
)
from sdjax.web.server.service import Service


def text_requests(service: Service, fields: Fields) -> list[PictureRequest]:
    """Return the pictures that txt2img asks for; picture i has the seed + i."""
    limits, own = service.limits, service.loaded
    height, width = own.model.native_size
    wanted = fields.group("override_settings").text("sd_model_checkpoint", most=1000)
    service.check_model("override_settings.sd_model_checkpoint", wanted)
    count = fields.whole("batch_size", 1, least=1, most=limits.pictures)
    count *= fields.whole("n_iter", 1, least=1, most=limits.pictures)
    if count > limits.pictures:
        raise InvalidRequest(f"batch_size * n_iter is {count}; expected at most {limits.pictures}")
    seed = fields.whole("seed", -1, least=-1, most=MOST_SEED)
    if seed == -1:
        seed = secrets.randbelow(2**32 - 2 - limits.pictures)
    one = PictureRequest(
        **service.wording(fields),
        seed=seed,
        height=fields.whole("height", height, least=8, most=limits.side),
        width=fields.whole("width", width, least=8, most=limits.side),
        sampler=_sampler(service, fields),
        guidance=fields.number("cfg_scale", own.own.guidance, least=0.0, most=100.0),
    )
    if seed + count - 1 > MOST_SEED:
        raise InvalidRequest(f"seed is {seed} for {count} pictures; expected a lower one")
    return [dataclasses.replace(one, seed=seed + i) for i in range(count)]


def picture_requests(service: Service, fields: Fields) -> list[PictureRequest]:
    """Return the pictures that img2img asks for: as txt2img, with one to begin with and a mask."""
    images = fields.names("init_images")
    if len(images) != 1:
        raise InvalidRequest(f"init_images has {len(images)} pictures; expected one")
    most = service.limits.image
    image = decoded_image("init_images[0]", images[0], most)
    mask = fields.text("mask", most=service.limits.body)
    strength = fields.number("denoising_strength", 0.75, least=0.0, most=1.0)
    requests = text_requests(service, fields)
    size = requests[0].height, requests[0].width
    begun: dict[str, Any] = {"image": picture_array(image, size), "strength": strength}
    if mask:
        inverted = bool(fields.whole("inpainting_mask_invert", 0, least=0, most=1))
        begun["mask"] = mask_array(decoded_image("mask", mask, most), size, inverted=inverted)
    return [dataclasses.replace(request, **begun) for request in requests]


def _sampler(service: Service, fields: Fields) -> SamplerConfig:
    """Return the sampler that a client names, or the model's own."""
    own = service.loaded.own.sampler
    given = fields.text("sampler_name", most=100) or fields.text("sampler_index", most=100)
    scheduler = fields.text("scheduler", most=100).lower() or "automatic"
    if given.endswith(" Karras"):  # as the names were before there was `scheduler`
        given, scheduler = given.removesuffix(" Karras"), "karras"
    if scheduler not in SCHEDULERS:
        names = ", ".join(SCHEDULERS.values())
        raise InvalidRequest(f"scheduler is {brief(scheduler)}; expected one of {names}")
    steps = fields.whole("steps", own.steps, least=1, most=service.limits.steps)
    changes: dict[str, Any] = {"steps": steps}
    if given:
        changes["name"] = sampler_of(given, own)
    if scheduler != "automatic":
        changes["karras"] = scheduler == "karras"
    return changed_sampler(own, changes)
