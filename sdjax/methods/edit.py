"""Editing by an instruction: a denoiser that reads a picture beside the noisy latents.

InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): the latents of the picture "before" are
channels beside the noisy latents of the main one, which shows it as the caption asks. They are the
mode of the VAE's distribution and not scaled, as the released weights have it
(timothybrooks/instruct-pix2pix#36).

FLUX.1-Kontext (arXiv 2506.15742, and train_dreambooth_lora_flux_kontext.py of diffusers): they are
tokens after the noisy ones, scaled, and no loss is taken of what the network says of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.config import is_encoded
from sdjax.diffusion.losses import caption_draws
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import EDITS, Networks
from sdjax.methods.denoise import MASK, DenoiseConfig, bound, latent_diffusion
from sdjax.methods.drawings import make_drawing
from sdjax.methods.fields import picture_fields
from sdjax.methods.inputs import Inputs, reading_for
from sdjax.methods.method import Batch, Examples, Kind, Method, Setup
from sdjax.models.params import Params
from sdjax.models.vae import scale_latents
from sdjax.parallel.sharding import to_host
from sdjax.sampling.generate import to_uint8

BEFORE = "before"  # the picture of data.images that is edited


@dataclasses.dataclass(frozen=True)
class EditConfig(DenoiseConfig):
    """Training of a denoiser that reads the picture to be edited.

    Of UNets, half of objective.caption_dropout is the share of examples that lose their caption
    alone, and the same share loses both, or the picture alone.
    """

    name: str = "edit"


def original(networks: Networks, every: Params, batch: Batch, keys: jax.Array) -> jax.Array:
    """Return the latents of the picture before, [b, h, w, C]; see `MakeInputs`."""
    vae = networks.module("vae", every)
    mode = jnp.split(vae.encode(batch[BEFORE]), 2, axis=-1)[0]
    return scale_latents(mode, vae.config) if networks.family.readings[EDITS].scaled else mode


def dropped(rate: float, channels: jax.Array, keys: jax.Array) -> jax.Array:
    """Return channels [b, h, w, C] that are zero in p <= u < 3 p.

    u is the number that takes the caption where u < 2 p (diffusers
    train_instruct_pix2pix.py, conditioning_dropout_prob).

    Args:
        rate: of captions that are dropped, 2 p.
    """
    u, p = caption_draws(keys), rate / 2
    gone = (u >= p) & (u < 3 * p)
    return jnp.where(gone[:, None, None, None], 0.0, channels)


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: the denoiser reads no such picture, the data has no pixels or no picture before,
            or the share of dropped captions leaves none for the pictures.
    """
    reading = reading_for(setup, EDITS)
    if is_encoded(setup.data):
        raise UserError(
            "data.name is 'encoded', but method 'edit' shows pictures before and after, which an "
            "encoded dataset does not have; train on the pictures"
        )
    inputs = Inputs(reading, original)
    if reading.guided:
        inputs = Inputs(reading, original, _dropping(setup.objective.caption_dropout))
    images = picture_fields(setup, required={BEFORE: "picture"}, optional={MASK: "mask"})
    diffusion = latent_diffusion(setup, inputs=inputs)
    return bound(diffusion, images=images, pictures=_pictures(setup), gallery=True)


def _dropping(rate: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return `Inputs.drop` for a rate of captions that are dropped."""
    if not 0.0 <= rate <= 2 / 3:
        raise UserError(
            f"objective.caption_dropout is {rate}; method 'edit' drops the caption alone, both, "
            "and the picture alone with half of that each: expected 0 to 2/3"
        )
    return lambda channels, keys: dropped(rate, channels, keys)


def _pictures(setup: Setup) -> Callable[..., np.ndarray]:
    """Drawing that shows the picture before on the left, and the result on the right."""
    drawn = make_drawing(setup)
    networks = bind(setup.model, ("vae",), dtype=setup.dtype)

    @jax.jit
    def prepared(params: Params, before: jax.Array) -> jax.Array:
        return original(networks, params, {BEFORE: before}, jnp.zeros(0))

    def pictures(
        params: Mapping[str, jax.Array], examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        before = examples.named[BEFORE]
        own = {path: value for path, value in params.items() if path.startswith("vae.")}
        channels = to_host(prepared(own, before))
        images = drawn(params, examples, seed, guided=guided, picture={"channels": channels})
        return np.concatenate([to_uint8(before / 2 + 0.5), images], axis=2)

    return pictures


EDIT = Kind(
    config=EditConfig,
    make=make,
    networks=tuple,
    draws=True,
    task=EDITS,
    sample="--init_image=FILE",
)
