"""Single files of SD3 and FLUX.1: what both have in common.

A transformer has the names of its authors' code, alone without a prefix or, in a file of a whole
pipeline, after `model.diffusion_model.`. Text encoders have the names of transformers after those
that ComfyUI gives them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdjax.families import dit_configs, ldm_configs, ldm_files, ldm_names
from sdjax.families.single_file import FileNetwork, Place, Places, Shapes

TRANSFORMER = "model.diffusion_model."
CLIP_L = "text_encoders.clip_l.transformer."
CLIP_G = "text_encoders.clip_g.transformer."
T5 = "text_encoders.t5xxl.transformer."
T5_VOCABULARY = 32128  # google/t5-v1_1-xxl, config.json
SAMPLE_SIZE = 1024  # vae/config.json
# Scales that no program draws with, and the projection that ComfyUI writes beside an encoder.
_LEFTOVERS = re.compile(r"text_encoders\.\w+\.(logit_scale|text_projection)")


def leftover(name: str) -> str:
    """Return the label of a tensor that is of no network and does not matter, or ""."""
    return name if _LEFTOVERS.fullmatch(name) else ""


def tells(*names: str) -> Callable[[Shapes], bool]:
    """Return what tells a layout: these weights of its transformer are all there."""
    return lambda shapes: any(
        all(prefix + name in shapes for name in names) for prefix in (TRANSFORMER, "")
    )


def vae(*prefixes: str, scaling_factor: float, shift_factor: float) -> FileNetwork:
    """Return the autoencoder of a layout."""
    return ldm_files.vae(
        lambda shapes, _: ldm_configs.vae_config(
            shapes, scaling_factor=scaling_factor, shift_factor=shift_factor,
            sample_size=SAMPLE_SIZE,
        ),
        (*prefixes, ""),
    )  # fmt: skip


def t5() -> FileNetwork:
    """Return the T5 encoder, which has the names of transformers."""
    return FileNetwork((T5,), dit_configs.t5_config, vocabulary=T5_VOCABULARY)


def identity(shape: Sequence[int]) -> np.ndarray:
    """Return the projection that changes nothing."""
    return np.eye(*shape, dtype=np.float32)


def clip_places(config: Any) -> Places:
    """Return the places of CLIP-L's weights, whose projection programs take to be the identity."""
    places = ldm_names.clip_places(config)
    head = "text_projection.weight"
    return lambda name: Place(name, default=identity) if name == head else places(name)
