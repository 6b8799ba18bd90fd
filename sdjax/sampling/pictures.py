"""Pictures to begin with and masks: from files, through the VAE's encoder, to latents.

They are prepared as the pipelines of diffusers prepare them: resized by Lanczos' filter to the size
that is drawn, and encoded to a sample of the VAE's distribution, not to its mean.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax.data.image_files import ImageError, read_image
from sdjax.data.transforms import to_rgb, upright
from sdjax.diffusion.losses import example_keys
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import EDITS, FILLS, FOLLOWS, Model
from sdjax.models.params import Params
from sdjax.models.vae import sample_moments, scale_latents
from sdjax.sampling.denoising import Drawing
from sdjax.sampling.request import SamplingRequest
from sdjax.sampling.start import first_step, reading_of, reads_picture

VAE_STREAM = 2  # added to the seed: the noise and the sampler take 0 and 1


def with_pictures(
    request: SamplingRequest, images: Sequence[str], masks: Sequence[str], strength: float | None
) -> SamplingRequest:
    """Return a request that begins with pictures of files, and keeps what is black in the masks.

    Raises:
        UserError: options do not go together, or do not fit the model.
    """
    model, count = request.model, len(request.texts)
    _check(model, images, masks, strength)
    if not images:
        return request
    size = request.shape[0] * model.vae.downscale, request.shape[1] * model.vae.downscale
    if reads_picture(model) == EDITS:
        return shown(request, read_pictures(images, count, size))
    encoder = PictureEncoder(model, request.params, request.dtype)
    strength = _strength(masks, strength)
    drawing = begun_at(request.drawing, strength)
    picture = picture_of(
        encoder,
        read_pictures(images, count, size),
        read_masks(masks, count, size) if masks else None,
        vae_noise(request.seed, request.positions, request.shape),
        pure=bool(masks) and strength == 1.0,
    )
    return dataclasses.replace(request, drawing=drawing, picture=picture)


def begun_at(drawing: Drawing, strength: float) -> Drawing:
    """Return a drawing of the last steps alone, `strength` of all.

    Raises:
        UserError: no step is left, or the sampler cannot begin amid the steps.
    """
    sampler = drawing.sampler
    first = first_step(sampler.steps, strength, flow=sampler.name == "flow_euler")
    if first and sampler.name == "pndm":
        raise UserError(
            f"--strength={strength} begins amid the steps, where 'pndm' knows nothing of those "
            "before; take another --sampler, as ddim or dpmpp_2m"
        )
    return dataclasses.replace(drawing, window=(first, sampler.steps))


def shown(request: SamplingRequest, images: np.ndarray) -> SamplingRequest:
    """Return a request whose denoiser reads pictures [N, H, W, 3] in [-1, 1] beside its latents."""
    encoder = PictureEncoder(request.model, request.params, request.dtype)
    made = encoder.read(images, vae_noise(request.seed, request.positions, request.shape))
    return dataclasses.replace(request, picture={**request.picture, "channels": made})


def _check(
    model: Model, images: Sequence[str], masks: Sequence[str], strength: float | None
) -> None:
    task, reading = reads_picture(model), reading_of(model)
    for option, given in (("--mask_image", masks), ("--strength", strength is not None)):
        if given and not images:
            raise UserError(f"{option} is for --init_image=FILE; give that too, or leave it out")
    needed = reading is not None and not reading.setting
    if task == EDITS and ((needed and not images) or masks or strength is not None):
        raise UserError(
            f"the {model.family.denoiser} edits a picture; give --init_image=FILE, and neither "
            "--mask_image nor --strength"
        )
    if task == FOLLOWS and images:
        raise UserError(
            f"the {model.family.denoiser} follows a picture, which --control_image=FILE names; "
            "leave --init_image out"
        )
    if task == FILLS and not masks:
        raise UserError(
            f"the {model.family.denoiser} reads a picture and a mask; give --init_image=FILE and "
            "--mask_image=FILE, or take a model that is not for inpainting"
        )


def _strength(masks: Sequence[str], strength: float | None) -> float:
    if strength is not None:
        return strength
    return 1.0 if masks else 0.8


def picture_settings(
    model: Model,
    images: Sequence[str],
    masks: Sequence[str],
    strength: float | None,
    number: int,
) -> dict[str, object]:
    """Return the settings that a picture's file carries of these options."""
    if not images:
        return {}
    found: dict[str, object] = {"init_image": images[number % len(images)]}
    if reads_picture(model) == EDITS:
        return found
    if masks:
        found["mask_image"] = masks[number % len(masks)]
    return {**found, "strength": _strength(masks, strength)}


def read_pictures(
    files: Sequence[str], count: int, size: tuple[int, int], option: str = "--init_image"
) -> np.ndarray:
    """Return the pictures of an option, float32 [count, H, W, 3] in [-1, 1].

    Raises:
        UserError: a file is no picture, or there are not one or `count` of them.
    """
    pictures = [read_picture(option, file, size) for file in files]
    made = [np.asarray(picture, np.float32) / 255 * 2 - 1 for picture in pictures]
    return _one_each(option, made, count)


def read_masks(files: Sequence[str], count: int, size: tuple[int, int]) -> np.ndarray:
    """Return the masks of --mask_image, float32 [count, H, W, 1], 1 where a picture is redrawn.

    Raises:
        UserError: as `read_pictures`.
    """
    grey = [read_picture("--mask_image", file, size).convert("L") for file in files]
    made = [
        (np.asarray(mask, np.float32)[..., None] / 255 >= 0.5).astype(np.float32) for mask in grey
    ]
    return _one_each("--mask_image", made, count)


def read_picture(option: str, file: str, size: tuple[int, int] | None) -> Image.Image:
    """Return the picture of a file, upright, in RGB, resized to (height, width) if that is given.

    Raises:
        UserError: naming the option and the file, if that is no picture.
    """
    try:
        picture = to_rgb(upright(read_image(file)))
    except ImageError as error:
        raise UserError(f"{option}={file} cannot be used: {error}; give a PNG or JPEG") from error
    return picture.resize(size[::-1], Image.Resampling.LANCZOS) if size else picture


def _one_each(option: str, made: Sequence[np.ndarray], count: int) -> np.ndarray:
    if len(made) not in (1, count):
        raise UserError(
            f"{option} is given {len(made)} times for {count} prompts; give one for all of them, "
            "or one for each"
        )
    return np.stack(list(made) * (count if len(made) == 1 else 1))


@dataclasses.dataclass(frozen=True, eq=False)
class PictureEncoder:
    """The encoder of a model's VAE; it takes pictures [N, H, W, 3] in [-1, 1], one at a time.

    params: {path: array} of the VAE, besides others.
    dtype: of products and convolutions.
    """

    model: Model
    params: Mapping[str, Any]
    dtype: str = "float32"

    def latents(self, images: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return latents [N, h, w, C], scaled.

        Args:
            noise: standard normal [N, h, w, C], which chooses the sample of the distribution.
        """
        encode = self._programs[0]
        pairs = zip(images, noise, strict=True)
        return np.concatenate([np.asarray(encode(i[None], n[None])) for i, n in pairs])

    def modes(self, images: np.ndarray, *, scaled: bool) -> np.ndarray:
        """Return the mode of the distribution, [N, h, w, C].

        Args:
            scaled: whether it is scaled as the latents that are drawn.
        """
        encode = self._programs[1]
        modes = [encode(image[None], scaled=scaled) for image in images]
        return np.concatenate([np.asarray(mode) for mode in modes])

    def read(self, images: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return latents as the denoiser reads those of a picture, [N, h, w, C].

        Args:
            noise: see `latents`.
        """
        reading = reading_of(self.model)
        assert reading is not None, "it reads pictures"
        if reading.sampled:
            return self.latents(images, noise)
        return self.modes(images, scaled=reading.scaled)

    @functools.cached_property
    def _programs(self) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        networks, vae = bind(self.model, ("vae",), dtype=self.dtype), self.model.vae

        @jax.jit
        def latents(params: Params, image: jax.Array, noise: jax.Array) -> jax.Array:
            moments = networks.module("vae", params).encode(image)
            return scale_latents(sample_moments(moments, noise), vae)

        @functools.partial(jax.jit, static_argnames="scaled")
        def modes(params: Params, image: jax.Array, *, scaled: bool) -> jax.Array:
            mode = jnp.split(networks.module("vae", params).encode(image), 2, axis=-1)[0]
            return scale_latents(mode, vae) if scaled else mode

        own = {path: jnp.asarray(self.params[path]) for path in networks.abstract}
        return functools.partial(latents, own), functools.partial(modes, own)


def vae_noise(seed: int, positions: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the noise of `PictureEncoder.latents`, [N, *shape], which follows from each number."""
    keys = example_keys(jax.random.key(seed + VAE_STREAM), jnp.asarray(positions))
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))


def picture_of(
    encoder: PictureEncoder,
    images: np.ndarray,
    masks: np.ndarray | None,
    noise: np.ndarray,
    *,
    pure: bool,
) -> dict[str, np.ndarray]:
    """Return what a generator takes of pictures and masks; see `sampling.start`.

    Args:
        images: [N, H, W, 3] in [-1, 1]; masks: [N, H, W, 1], 1 where redrawn.
        noise: see `PictureEncoder.latents`.
        pure: whether drawing begins with noise alone and not with the noisy picture.
    """
    model = encoder.model
    found = {}
    if not pure:
        found["start"] = encoder.latents(images, noise)
    if masks is None:
        return found
    side = model.vae.downscale
    small = masks[:, ::side, ::side]  # the nearest pixel, as torch's `interpolate` takes it
    reading = reading_of(model)
    if reading is None:
        clean = found["start"] if found else encoder.latents(images, noise)
        return {**found, "known": clean, "mask": small}
    hidden = encoder.latents(images * (masks < 0.5), noise)
    channels = reading.make(jnp.asarray(masks), jnp.asarray(hidden))
    return {**found, "channels": np.asarray(channels)}
