"""Pictures of captions while training, drawn as `config.sample` says."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from sdjax.diffusion.guidance import SkipLayers
from sdjax.families.conditioning import encode_text
from sdjax.methods.method import Examples, Pictures, Setup
from sdjax.sampling.control import Control
from sdjax.sampling.generate import Drawing, draw, latent_shape, make_generator

_NO_CONTROLS: Mapping[str, Control] = {}


class DrawCaptions(Protocol):
    """Draws captions, as `config.sample` says."""

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        examples: Examples,
        seed: int,
        *,
        guided: bool,
        picture: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """Return uint8 [N, H, W, 3]; picture: see `sampling.start`."""


def make_drawing(setup: Setup, controls: Sequence[Control] = ()) -> DrawCaptions:
    """Return what draws captions with the networks of a setup, steered by ControlNets."""
    sample, model, side = setup.sample, setup.model, setup.data.resolution

    @functools.cache
    def generator(guided: bool):
        drawing = Drawing(
            sample.sampler,
            sample.guidance if guided else 1.0,
            sample.guidance_rescale,
            embedded_guidance=sample.embedded_guidance,
            skip=sample.skip if guided else SkipLayers(),
            image_guidance=sample.image_guidance if guided else 1.0,
        )
        return make_generator(model, drawing, dtype=setup.dtype, controls=controls)

    generator(True)  # a sampler that does not fit is an error now
    shape = latent_shape(model, side, side)
    tokens = encode_text(model.tokenizers, [sample.negative_prompt])
    negative = {field: rows[0] for field, rows in tokens.items()}

    def drawn(
        params: Mapping[str, jax.Array],
        examples: Examples,
        seed: int,
        *,
        guided: bool,
        picture: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        images, _ = draw(
            generator(guided),
            params,
            examples.tokens,
            examples.negative or negative,
            shape=shape,
            seed=seed,
            batch_size=64,
            picture=picture,
        )
        return images

    return drawn


def caption_pictures(setup: Setup, controls: Mapping[str, Control] = _NO_CONTROLS) -> Pictures:
    """Return what draws captions.

    Args:
        controls: {named picture: the ControlNet that sees it}.
    """
    drawn = make_drawing(setup, tuple(controls.values()))

    def pictures(
        params: Mapping[str, jax.Array], examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        picture = {one.name: examples.named[field] for field, one in controls.items()}
        return drawn(params, examples, seed, guided=guided, picture=picture)

    return pictures
