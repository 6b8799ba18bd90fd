"""The text that A1111 writes into its pictures, which its clients parse, and its way back."""

from __future__ import annotations

import json
import re
from typing import Any

from sdjax.web.server.requests import PictureRequest
from sdjax.web.server.service import Service

_NEGATIVE = "Negative prompt: "
# As A1111's infotext_utils.re_param: a value in quotes may hold what separates values.
_SETTING = re.compile(r'\s*([\w ]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def infotext(request: PictureRequest, service: Service, sampler: str) -> str:
    """Return prompts and settings of a picture; `sampler` is A1111's name."""
    settings: dict[str, Any] = {"Steps": request.sampler.steps, "Sampler": sampler}
    if request.sampler.karras:
        settings["Schedule type"] = "Karras"
    settings |= {
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
    }
    if service.digest:
        settings["Model hash"] = service.digest[:10]
    settings["Model"] = service.loaded.name
    if request.image is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    settings["Version"] = "sdjax"
    lines = [service.loaded.adapters.written(request.prompt, request.adapters)]
    if request.negative_prompt:
        lines.append(f"{_NEGATIVE}{request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def parsed(text: str) -> dict[str, str]:
    """Return the prompts and settings that a text of `infotext` names."""
    *prompts, last = text.strip().split("\n")
    if len(_SETTING.findall(last)) < 3:  # no settings
        prompts, last = [*prompts, last], ""
    words: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    name = "Prompt"
    for line in prompts:
        if line.startswith(_NEGATIVE):
            name, line = "Negative prompt", line.removeprefix(_NEGATIVE)
        words[name].append(line)
    found = {name: "\n".join(lines) for name, lines in words.items()}
    for name, value in _SETTING.findall(last):
        found[name.strip()] = _unquoted(value.strip())
    return found


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text
