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
from sdjax.sampling.generate import to_images, to_uint8

BEFORE = "before"  # the picture of data.images that is edited
MOMENTS = f"{BEFORE}_moments"  # of a batch that was encoded ahead


@dataclasses.dataclass(frozen=True)
class EditConfig(DenoiseConfig):
    """Training of a denoiser that reads the picture to be edited.

    Of UNets, half of objective.caption_dropout is the share of examples that lose their caption
    alone, and the same share loses both, or the picture alone.
    """

    name: str = "edit"


def original(networks: Networks, every: Params, batch: Batch, keys: jax.Array) -> jax.Array:
    """Return the latents of the picture before, [b, h, w, C]; see `MakeInputs`."""
    if MOMENTS in batch:
        moments = batch[MOMENTS]
    else:
        moments = networks.module("vae", every).encode(batch[BEFORE])
    mode = jnp.split(moments, 2, axis=-1)[0]
    scaled = networks.family.readings[EDITS].scaled
    return scale_latents(mode, networks.configs["vae"]) if scaled else mode


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
        UserError: the denoiser reads no such picture, the data has no picture before, or the share
            of dropped captions leaves none for the pictures.
    """
    reading = reading_for(setup, EDITS)
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
    def prepared(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        channels = original(networks, params, batch, jnp.zeros(0))
        if BEFORE in batch:
            return channels, batch[BEFORE] / 2 + 0.5
        vae, scaled = networks.module("vae", params), networks.family.readings[EDITS].scaled
        latents = channels if scaled else scale_latents(channels, vae.config)
        return channels, to_images(vae, latents)

    def pictures(
        params: Mapping[str, jax.Array], examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        batch = {k: v for k, v in examples.named.items() if k in (BEFORE, MOMENTS)}
        own = {path: value for path, value in params.items() if path.startswith("vae.")}
        channels, before = map(to_host, prepared(own, batch))
        images = drawn(params, examples, seed, guided=guided, picture={"channels": channels})
        return np.concatenate([to_uint8(before), images], axis=2)

    return pictures


EDIT = Kind(
    config=EditConfig,
    make=make,
    networks=tuple,
    draws=True,
    task=EDITS,
    sample="--init_image=FILE",
)
