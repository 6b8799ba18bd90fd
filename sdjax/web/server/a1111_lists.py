"""The answers to what A1111's clients ask about the server: model, samplers, adapters, memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdjax.diffusion.grids import SamplerConfig
from sdjax.system.untrusted import brief
from sdjax.web.server.infotext import parsed
from sdjax.web.server.requests import InvalidRequest, decoded_image
from sdjax.web.server.service import Service

PREFIX = "/sdapi/v1"
# {A1111's name: (sampler, its aliases)}. Flow models have one, which is called Euler there.
SAMPLERS = {
    "Euler": ("euler", ("k_euler",)),
    "Euler a": ("euler_ancestral", ("k_euler_a", "k_euler_ancestral")),
    "Heun": ("heun", ("k_heun",)),
    "DPM++ 2M": ("dpmpp_2m", ("k_dpmpp_2m",)),
    "DDIM": ("ddim", ("ddim",)),
    "DDPM": ("ddpm", ()),
    "PLMS": ("pndm", ("plms", "pndm")),
    "UniPC": ("unipc", ("unipc",)),
    "LCM": ("lcm", ("lcm",)),
}
SCHEDULERS = {"automatic": "Automatic", "uniform": "Uniform", "karras": "Karras"}
_EMPTY = (
    "upscalers", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "sd-vae",
    "extensions", "latent-upscale-modes",
)  # fmt: skip


def sampler_of(given: str, own: SamplerConfig) -> str:
    """Return our name of a sampler that A1111 calls so; `own` is the model's.

    Raises:
        InvalidRequest: there is none.
    """
    for title, (name, aliases) in SAMPLERS.items():
        if given.lower() in (title.lower(), name, *aliases):
            return own.name if own.name == "flow_euler" and name == "euler" else name
    raise InvalidRequest(f"sampler_name is {brief(given)}; expected one of {', '.join(SAMPLERS)}")


def title_of(name: str) -> str:
    """Return A1111's name of a sampler of ours."""
    known = {own: title for title, (own, _) in SAMPLERS.items()}
    return "Euler" if name == "flow_euler" else known.get(name, name)


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """The routes of one service."""

    service: Service

    def routes(self) -> list[Route]:
        """Return the routes below /sdapi/v1."""
        gets = {
            "options": self.options, "cmd-flags": self.flags, "sd-models": self.models,
            "samplers": self.samplers, "schedulers": self.schedulers, "loras": self.loras,
            "embeddings": self.embeddings, "memory": self.memory, "scripts": self.scripts,
            **dict.fromkeys(_EMPTY, self.nothing),
        }  # fmt: skip
        posts = {
            "options": self.set_options, "png-info": self.png_info,
            "refresh-checkpoints": self.done, "refresh-loras": self.done,
        }  # fmt: skip
        return [
            *(Route(f"{PREFIX}/{name}", call, methods=["GET"]) for name, call in gets.items()),
            *(Route(f"{PREFIX}/{name}", call, methods=["POST"]) for name, call in posts.items()),
        ]

    async def options(self, http: Request) -> Response:
        """Say which model there is."""
        name = self.service.title
        return JSONResponse(
            {"sd_model_checkpoint": name, "sd_checkpoint_hash": self.service.digest,
             "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "samples_format": "png"}
        )  # fmt: skip

    async def set_options(self, http: Request) -> Response:
        """Take the options there are, and refuse another model in words."""
        wanted = (await self.service.fields(http)).text("sd_model_checkpoint", most=1000)
        self.service.check_model("sd_model_checkpoint", wanted)
        return JSONResponse(None)

    async def flags(self, http: Request) -> Response:
        """Answer with the flags that clients look at."""
        return JSONResponse({"api": True, "nowebui": False, "listen": False})

    async def models(self, http: Request) -> Response:
        """List the one model."""
        service = self.service
        return JSONResponse([{
            "title": service.title, "model_name": service.loaded.name,
            "hash": service.digest[:10], "sha256": service.digest,
            "filename": service.loaded.name, "config": None,
        }])  # fmt: skip

    async def samplers(self, http: Request) -> Response:
        """List the samplers that go with the model's noise schedule."""
        own = self.service.loaded.own.sampler
        return JSONResponse([
            {"name": title, "aliases": list(aliases), "options": {}}
            for title, (name, aliases) in SAMPLERS.items()
            if sampler_of(name, own) in self.service.samplers
        ])  # fmt: skip

    async def schedulers(self, http: Request) -> Response:
        """List the spacings of noise levels."""
        return JSONResponse([
            {"name": name, "label": label, "aliases": [], "default_rho": -1,
             "need_inner_model": False}
            for name, label in SCHEDULERS.items()
        ])  # fmt: skip

    async def loras(self, http: Request) -> Response:
        """List the adapters."""
        own = self.service.loaded.adapters
        return JSONResponse([
            {"name": name, "alias": name, "path": lora.option, "metadata": {}}
            for name, lora in zip(own.names, own.loras, strict=True)
        ])  # fmt: skip

    async def embeddings(self, http: Request) -> Response:
        """List the words that were learnt."""
        words = {
            word: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
            for word in self.service.words
        }
        return JSONResponse({"loaded": words, "skipped": {}})

    async def png_info(self, http: Request) -> Response:
        """Return the settings in a picture's file."""
        fields = await self.service.fields(http)
        limits = self.service.limits
        image = decoded_image("image", fields.text("image", most=limits.body), limits.image)
        items = {name: value for name, value in image.info.items() if isinstance(value, str)}
        text = items.pop("parameters", "")
        return JSONResponse({"info": text, "items": items, "parameters": parsed(text)})

    async def memory(self, http: Request) -> Response:
        """Say how much memory the process and the device use, in bytes."""
        stats = jax.local_devices()[0].memory_stats() or {}
        used, limit = stats.get("bytes_in_use", 0), stats.get("bytes_limit", 0)
        ram = {"used": _resident(), "free": _pages("AVPHYS"), "total": _pages("PHYS")}
        system = {"free": max(limit - used, 0), "used": used, "total": limit}
        return JSONResponse({"ram": ram, "cuda": {"system": system, "events": {}}})

    async def scripts(self, http: Request) -> Response:
        """There are none."""
        return JSONResponse({"txt2img": [], "img2img": []})

    async def nothing(self, http: Request) -> Response:
        """Answer for a list of what this server has not."""
        return JSONResponse([])

    async def done(self, http: Request) -> Response:
        """Answer for what there is nothing to do."""
        return JSONResponse(None)


def _resident() -> int:
    """Return the bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _pages(kind: str) -> int:
    """Return the bytes of the machine's memory of a kind; 0 where the system does not say."""
    try:
        return os.sysconf(f"SC_{kind}_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
