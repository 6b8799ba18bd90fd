"""The fields of a batch that methods ask for: pictures, those that are named, numbers, a weight.

Pictures are [b, *frames, h, w, c], channels last; `frames` is absent for pictures that stand still.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sdjax.data import named_images, numbers
from sdjax.data.config import DataConfig, is_encoded, is_weighted
from sdjax.errors import UserError
from sdjax.methods.method import Setup

Fields = dict[str, jax.ShapeDtypeStruct]
_NONE: Mapping[str, str] = {}


def picture_fields(
    setup: Setup, *, required: Mapping[str, str] = _NONE, optional: Mapping[str, str] = _NONE
) -> Fields:
    """Return the fields of one example's pictures: float32 [H, W, 3], and of masks [H, W, 1].

    Datasets that are encoded ahead have "moments" [h, w, 2C] for "image", and NAME_moments for a
    named picture of the kind "picture".

    Args:
        required: {name: kind} of data.images that the method takes, besides the main picture.
        optional: the same, of those that it can do without.

    Raises:
        UserError: data.images has others, lacks one, or one is of another kind.
    """
    data, vae = setup.data, setup.model.vae
    kinds = named_images.kinds_of(data.images)
    check_images(kinds, setup.config.name, required=required, optional=optional)
    side = data.resolution
    pixels = {"image": 3, **{image.name: image.channels for image in data.images}}
    latent: Fields = {}
    if is_encoded(data):
        small = side // vae.downscale
        moments = jax.ShapeDtypeStruct((small, small, 2 * vae.latent_channels), jnp.float32)
        pictures = [name for name, kind in kinds.items() if kind == "picture"]
        latent = dict.fromkeys(named_images.moment_fields(pictures), moments)
        pixels = {name: pixels[name] for name, kind in kinds.items() if kind != "picture"}
    return latent | {
        name: jax.ShapeDtypeStruct((side, side, channels), jnp.float32)
        for name, channels in pixels.items()
    }


def check_images(
    kinds: Mapping[str, str], method: str, *, required: Mapping[str, str],
    optional: Mapping[str, str],
) -> None:  # fmt: skip
    """Raise a UserError unless a method takes the named pictures, see `picture_fields`."""
    known = {**required, **optional}
    wrong = [
        *(f"{name!r} is missing" for name in required if name not in kinds),
        *(f"{name!r} is not read" for name in kinds if name not in known),
        *(
            f"{name!r} is of the kind {kind!r}, not {known[name]!r}"
            for name, kind in kinds.items()
            if name in known and kind != known[name]
        ),
    ]
    if wrong:
        raise UserError(
            f"data.images does not suit method {method!r}: {'; '.join(wrong)}; it takes "
            f"{named_images.described(required)}, and may take {named_images.described(optional)}"
        )


def number_fields(shapes: numbers.Shapes) -> Fields:
    """Return the fields of one example's numbers."""
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), numbers.dtype(name))
        for name, shape in shapes.items()
    }


def weight_field(data: DataConfig) -> Fields:
    """Return the field of one example's weight, if it has any."""
    return {"weight": jax.ShapeDtypeStruct((), jnp.float32)} if is_weighted(data) else {}
