"""The settings that the file of a picture carries, from the options of a command line."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sdjax.data.numbers import of_geometry
from sdjax.families.family import Model
from sdjax.sampling.denoising import Drawing
from sdjax.sampling.request import SamplingRequest
from sdjax.sampling.start import reading_of


def settings_of_request(args: argparse.Namespace, request: SamplingRequest) -> dict[str, Any]:
    """Return the settings that the file of every picture carries; args: of `sdjax.sample`."""
    drawing = request.drawing
    size = {"original_size": args.original_size, "crop": args.crop}
    return {
        "negative_prompt": args.negative_prompt or "",
        "prompt_syntax": args.prompt_syntax,
        "seed": args.seed,
        "same_noise": args.same_noise,
        "model": args.model[0],
        **({"averaged_with": args.model[1:]} if args.model[1:] else {}),
        **({"experts": args.expert} if args.expert else {}),
        **({"lora": args.lora} if args.lora else {}),
        **refining(args),
        "weights": args.weights,
        "latents": args.latents or "",
        **({"embedding": args.embedding} if args.embedding else {}),
        "guidance": drawing.guidance,
        "guidance_rescale": drawing.guidance_rescale,
        **_special(request.model, drawing),
        **(size if of_geometry(request.model.family.numbers, (0, 0)) else {}),
        **{f"sampler.{k}": v for k, v in dataclasses.asdict(drawing.sampler).items()},
    }


def refining(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the model that takes the last steps, if there is one."""
    start = 0.8 if args.refiner_start is None else args.refiner_start
    return {"refiner": args.refiner, "refiner_start": start} if args.refiner else {}


def _special(model: Model, drawing: Drawing) -> dict[str, Any]:
    """The settings that few families have."""
    found: dict[str, Any] = {}
    reading = reading_of(model)
    if reading is not None and reading.guided:
        found["image_guidance"] = drawing.image_guidance
    if model.family.reads_guidance(model.networks):
        found["embedded_guidance"] = drawing.embedded_guidance
    if "max_sequence_length" in model.settings:
        found["max_sequence_length"] = model.settings["max_sequence_length"]
    if drawing.skip.layers:
        found |= {"skip_layers": list(drawing.skip.layers), "skip_scale": drawing.skip.scale}
    return found
