"""Inpainting: a denoiser that reads latents, a mask and the masked picture's latents.

RunwayML's stable-diffusion-inpainting, the inpainting models of SD2 and SDXL, FLUX.1-Fill, and the
pipelines of diffusers, have the order that the family's `Reading` has. A mask is 1 where the
picture is drawn anew.

A dataset that was encoded ahead has the moments of the masked picture, for masks of the data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.config import DataConfig, is_encoded
from sdjax.data.named_images import MASK, MASKED, NamedImage, kinds_of
from sdjax.diffusion.losses import example_keys, fold_keys
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import FILLS, Networks
from sdjax.methods.denoise import DenoiseConfig, bound, latent_diffusion
from sdjax.methods.drawings import make_drawing
from sdjax.methods.fields import picture_fields
from sdjax.methods.inputs import Inputs, reading_for
from sdjax.methods.masks import SHAPES, are_whole, draw_masks, whole_masks
from sdjax.methods.method import Batch, Examples, Kind, Method, Setup
from sdjax.models.params import Params
from sdjax.models.vae import scale_latents
from sdjax.parallel.sharding import to_host
from sdjax.sampling.generate import to_images, to_uint8

MOMENTS = f"{MASKED}_moments"  # of a batch that was encoded ahead
# Streams of randomness, beyond those of the validation's strata.
SHAPE, WHOLE = 2**15, 2**15 + 1


@dataclasses.dataclass(frozen=True)
class InpaintConfig(DenoiseConfig):
    """Training of a denoiser that reads a mask and a masked picture.

    Raises ValueError where a share is out of its range.
    """

    name: str = "inpaint"
    # Share of examples whose whole picture is masked, 25 % as RunwayML's model card has it.
    whole: float = 0.25
    # Shares of the shapes among other masks, any scale; a mask of data.images replaces all four.
    boxes: float = 1.0
    ellipses: float = 1.0
    polygons: float = 1.0
    strokes: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.whole <= 1.0:
            raise ValueError(f"method.whole is {self.whole}; expected 0 to 1")
        if min(self.shares.values()) < 0 or not sum(self.shares.values()) > 0:
            raise ValueError(
                f"method has the shares {self.shares}; expected 0 or more, and one above 0"
            )

    @property
    def shares(self) -> dict[str, float]:
        """{shape: share}."""
        return {name: getattr(self, name) for name in SHAPES}


@dataclasses.dataclass(frozen=True, eq=False)
class Inpainting:
    """The mask and the masked picture of an example."""

    config: InpaintConfig

    def channels(
        self, networks: Networks, every: Params, batch: Batch, keys: jax.Array
    ) -> jax.Array:
        """Mask and masked latents [b, h, w, K]; see `MakeInputs`."""
        masks = self.masks(batch, keys)
        if MOMENTS not in batch:
            return beside(networks, every, batch["image"], masks)
        mean, _ = jnp.split(batch[MOMENTS], 2, axis=-1)
        if self.config.whole:
            blank = jnp.zeros((1, *masks.shape[1:3], 3))
            grey, _ = jnp.split(networks.module("vae", every).encode(blank), 2, axis=-1)
            mean = jnp.where(are_whole(fold_keys(keys, WHOLE), self.config.whole), grey, mean)
        return joined(networks, masks, mean)

    def masks(self, batch: Batch, keys: jax.Array) -> jax.Array:
        """The masks of a batch, [b, H, W, 1] of zeros and ones."""
        return whole_masks(fold_keys(keys, WHOLE), self.shapes(batch, keys), self.config.whole)

    def shapes(self, batch: Batch, keys: jax.Array) -> jax.Array:
        """The masks of the data, else drawn, before some cover the whole picture."""
        if MASK in batch:
            return (batch[MASK] >= 0.5).astype(jnp.float32)
        _, height, width, _ = batch["image"].shape
        return draw_masks(fold_keys(keys, SHAPE), (height, width), self.config.shares)


def beside(networks: Networks, every: Params, images: jax.Array, masks: jax.Array) -> jax.Array:
    """Return what a denoiser for inpainting reads besides the noisy latents, [b, h, w, K].

    The VAE sees grey where the mask is; the latents are its mode.

    Args:
        images: [b, H, W, 3] in [-1, 1]; masks: [b, H, W, 1] of zeros and ones.
    """
    moments = networks.module("vae", every).encode(images * (1.0 - masks))
    return joined(networks, masks, jnp.split(moments, 2, axis=-1)[0])


def joined(networks: Networks, masks: jax.Array, mean: jax.Array) -> jax.Array:
    """Return what the denoiser reads of masks and the means of masked pictures, [b, h, w, K].

    Args:
        masks: [b, H, W, 1] of zeros and ones; mean: [b, h, w, C], not scaled.
    """
    return networks.family.readings[FILLS].make(masks, scale_latents(mean, networks.configs["vae"]))


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model; see `Inpainting`.

    Raises:
        UserError: the denoiser reads other channels, or the data were encoded ahead without masks.
    """
    reading = reading_for(setup, FILLS)
    task = Inpainting(setup.config)
    inputs = Inputs(reading, task.channels)
    if is_encoded(setup.data):
        encoded(setup.config, kinds_of(setup.data.images))  # an error without masks
        images = picture_fields(setup, required={MASK: "mask", MASKED: "picture"})
    else:
        images = picture_fields(setup, optional={MASK: "mask"})
    # The mask is the task: it does not multiply the loss.
    diffusion = latent_diffusion(setup, inputs=inputs, mask="")
    return bound(diffusion, images=images, pictures=_pictures(setup, task), gallery=True)


def encoded(config: InpaintConfig, kinds: Mapping[str, str]) -> Mapping[str, str]:
    """Return the pictures that an encoding ahead keeps, {name: kind}; see `Kind.encodes`.

    Raises:
        UserError: masks are drawn.
    """
    if kinds.get(MASK) != "mask":
        raise UserError(
            f"method {config.name!r} draws masks anew at every step, and encodes the picture under "
            "each: that cannot be done ahead. Give masks, a picture 'mask' of the kind 'mask' in "
            "data.images, or train on the pictures"
        )
    return {**kinds, MASKED: "picture"}


def with_masked(config: InpaintConfig, data: DataConfig) -> DataConfig:
    """Return data that were encoded ahead with the masked pictures; see `Kind.data`."""
    kinds = kinds_of(data.images)
    if not is_encoded(data) or MASK not in kinds or MASKED in kinds:
        return data
    return dataclasses.replace(data, images=(*data.images, NamedImage(MASKED)))


def _pictures(setup: Setup, task: Inpainting) -> Callable[..., np.ndarray]:
    """Drawing that shows the masked picture on the left, and the result on the right."""
    drawn = make_drawing(setup)
    networks = bind(setup.model, ("vae",), dtype=setup.dtype)

    @functools.partial(jax.jit, static_argnames="seed")
    def prepared(params: Params, batch: Batch, seed: int) -> tuple[jax.Array, jax.Array]:
        keys = example_keys(jax.random.key(seed), jnp.arange(len(batch["image"])))
        masks = task.shapes(batch, keys)
        if MOMENTS in batch:
            vae, mean = networks.module("vae", params), jnp.split(batch[MOMENTS], 2, axis=-1)[0]
            channels = joined(networks, masks, mean)
            return channels, to_images(vae, scale_latents(mean, vae.config))
        shown = batch["image"] * (1.0 - masks) / 2 + 0.5
        return beside(networks, params, batch["image"], masks), shown

    def pictures(
        params: Mapping[str, jax.Array], examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        batch = {"image": examples.images, **examples.named}
        own = {path: value for path, value in params.items() if path.startswith("vae.")}
        channels, masked = map(to_host, prepared(own, batch, seed))
        images = drawn(params, examples, seed, guided=guided, picture={"channels": channels})
        return np.concatenate([to_uint8(masked), images], axis=2)

    return pictures


INPAINT = Kind(
    config=InpaintConfig,
    make=make,
    networks=tuple,
    draws=True,
    task=FILLS,
    sample="--init_image=FILE --mask_image=FILE",
    data=with_masked,
    encodes=encoded,
)
