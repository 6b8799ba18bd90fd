"""CLIP image towers in folders of transformers, alone or in a whole CLIPModel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sdjax.data.clip_pixels import ClipPreprocess
from sdjax.families.beside.ip_adapter import ENCODER_PART
from sdjax.families.bind import abstract_params
from sdjax.formats.folders import ModelError, read_json
from sdjax.formats.weight_files import find_weights
from sdjax.models.clip_vision import CLIPVisionConfig, read_clip_config
from sdjax.models.config import ConfigError
from sdjax.models.weight_checks import quantised_config
from sdjax.models.weights import WeightsError, from_diffusers, load_file
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained

_PREFIX, _PROJECTION = "vision_model.", "visual_projection.weight"


class ImageEncoder(NamedTuple):
    """A CLIP image tower, and how pictures are prepared for it.

    params: {path: float32 array}; empty if they were not asked for.
    """

    config: CLIPVisionConfig
    preprocess: ClipPreprocess
    params: dict[str, np.ndarray]


def read_image_encoder(folder: paths.Path, *, with_weights: bool = True) -> ImageEncoder:
    """Return the `CLIPVisionModelWithProjection` of a folder, or that of a CLIPModel.

    A folder without preprocessor_config.json, as those beside IP-Adapters, has the preprocessing of
    CLIPImageProcessor for its size.

    Raises:
        ModelError: it is none, or damaged.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no such folder; expected that of a CLIP image tower, with config.json and "
            "model.safetensors, as models/image_encoder beside the IP-Adapters on huggingface.co"
        )
    try:
        with explained(folder, "a CLIP image tower", error=ModelError):
            return _read(folder, with_weights)
    except (ConfigError, WeightsError) as error:
        raise ModelError(str(error)) from error


def _read(folder: paths.Path, with_weights: bool) -> ImageEncoder:
    file = folder / "config.json"
    content = read_json(file)
    if problem := quantised_config(content):
        raise ModelError(f"{file}: {problem}")
    kind = content.get("model_type")
    if kind == "clip":
        config = read_clip_config(content, str(file))[1]
    elif kind == ENCODER_PART.kind:
        config = CLIPVisionConfig.from_json(content, where=str(file))[0]
    else:
        raise ModelError(
            f"{file}: model_type is {brief(kind)}; expected {ENCODER_PART.kind!r}, or 'clip' of a "
            "whole CLIPModel"
        )
    side = config.image_size
    said = folder / "preprocessor_config.json"
    preprocess = ClipPreprocess(size=side, crop=(side, side))
    if said.is_file():
        preprocess = ClipPreprocess.from_json(read_json(said), str(said))
    preprocess.check(side, str(folder))
    if not with_weights:
        return ImageEncoder(config, preprocess, {})
    found = find_weights(folder)

    def wanted(name: str) -> bool:
        return name.startswith(_PREFIX) or name == _PROJECTION

    tensors = {n.removeprefix(_PREFIX): v for n, v in load_file(found, wanted=wanted).items()}

    def spell(name: str) -> str:
        return name if name == _PROJECTION else _PREFIX + name

    wanted_params = abstract_params(ENCODER_PART, config)
    try:
        return ImageEncoder(config, preprocess, from_diffusers(tensors, wanted_params, spell=spell))
    except WeightsError as error:
        raise WeightsError(f"{found}: {error}") from error
