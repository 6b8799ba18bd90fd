"""Pictures, masks and conditions of a split, for models that read more than prompts.

The picture of a caption is drawn with the pictures of the example that the caption is of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data import named_images
from sdjax.data.batches import as_floats
from sdjax.data.config import DataConfig
from sdjax.data.named_images import NamedImage
from sdjax.data.pictures import Pictures, SplitPictures, has_pictures, open_split
from sdjax.diffusion.losses import example_keys
from sdjax.errors import UserError
from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.families.family import EDITS, FILLS, FOLLOWS, Model
from sdjax.methods.control import CONDITION
from sdjax.methods.edit import BEFORE
from sdjax.methods.inpaint import MASK, InpaintConfig, Inpainting
from sdjax.methods.ip_adapter import REFERENCE
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.sampling.control import Control, nothing_of
from sdjax.sampling.ip_options import Sight
from sdjax.sampling.pictures import PictureEncoder, picture_of, vae_noise
from sdjax.sampling.start import reads_picture

MADE = "made"  # the kind, in --named_image, of a condition that is made of the main picture
MASK_SEED = 0  # of masks that are drawn: the same ones whatever --seed is
_STRETCH = 64  # pictures whose errors are computed at once


@dataclasses.dataclass(frozen=True)
class Needs:
    """The named pictures that a model reads of an example, {name: kind}."""

    required: Mapping[str, str]
    optional: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.required or self.optional)


def needs(model: Model, controls: Sequence[Control]) -> Needs:
    """Return what a model and the networks that steer it read besides prompts.

    Raises:
        UserError: the denoiser reads channels that drawing does not know.
    """
    task = reads_picture(model) if model.family.denoiser in model.networks else ""
    required = {}
    if task == EDITS:
        required[BEFORE] = "picture"
    elif task == FOLLOWS:
        required[CONDITION] = "condition"
    optional = {MASK: "mask"} if task == FILLS else {}
    for control in controls:
        if isinstance(control.config, IPAdapterConfig):
            optional[REFERENCE] = "condition"
        else:
            required[CONDITION] = "condition"
    return Needs(required, optional)


def with_images(
    data: DataConfig, own: DataConfig | None, wanted: Needs, options: Sequence[str]
) -> DataConfig:
    """Return data whose examples have the named pictures that are wanted.

    Args:
        data: of the evaluation; own: what the run was trained on, whose fields say where required
            pictures are read in other data too.
        options: of --named_image.

    Raises:
        UserError: an option names another picture, or one of another kind.
    """
    known = {**wanted.required, **wanted.optional}
    given = {image.name: image for image in map(parse, options)}
    wrong = [name for name, image in given.items() if known.get(name) != image.kind]
    if wrong:
        image = given[wrong[0]]
        raise UserError(
            f"--named_image={image.name} ({image.kind}) is not read here; the model takes "
            f"{named_images.described(known)} besides prompts"
        )
    theirs = {image.name: image for image in own.images} if own else {}
    found = {image.name: image for image in data.images}
    for name, kind in wanted.required.items():
        found.setdefault(name, theirs.get(name) or NamedImage(name, kind=kind))
    return dataclasses.replace(data, images=tuple((found | given).values()))


def parse(text: str) -> NamedImage:
    """Return the picture of NAME=KEY:KIND; the kind "made" makes it of the main picture.

    Raises:
        UserError: a word is none that is known.
    """
    try:
        rest, _, kind = text.rpartition(":")
        if kind != MADE:
            return named_images.parse(text)
        name, _, made = rest.partition("=")
        return NamedImage(name, kind="condition", made=made)
    except UserError as error:
        raise UserError(f"--named_image={text}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """The pictures of a split, as a model reads them.

    pictures: all of the split, of the size that is drawn.
    per_prompt: how many pictures are drawn of each example.
    controls: the networks that steer; sights: {name of an IP-Adapter: what it sees}.
    masks: of which shapes masks are, where the data have none.
    """

    model: Model
    pictures: SplitPictures
    per_prompt: int
    controls: tuple[Control, ...]
    sights: Mapping[str, Sight]
    masks: InpaintConfig
    kinds: Mapping[str, str]
    dtype: str

    def bound(self, params: Mapping[str, Any]) -> Shown:
        """Return what the model reads, its pictures encoded by the VAE among parameters."""
        return Shown(self, PictureEncoder(self.model, params, self.dtype))

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the examples that pictures are of."""
        return numbers // self.per_prompt % len(self.pictures)

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the pictures of examples, float32 [n, H, W, C], as batches of training."""
        return as_floats(self.pictures.named([int(row) for row in rows]), self.kinds)

    def masked(self, rows: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the masks of examples, [n, H, W, 1] of zeros and ones.

        They are those of the data, or drawn: each example has one that never changes.
        """
        keys = example_keys(jax.random.key(MASK_SEED), jnp.asarray(rows))
        own = {name: jnp.asarray(value) for name, value in batch.items()}
        return np.asarray(Inpainting(self.masks).shapes(own, keys))

    def about(self) -> dict[str, Any]:
        """Return what decides about them, JSON-able."""
        images = [dataclasses.asdict(image) for image in self.pictures.images]
        found: dict[str, Any] = {"images": images}
        if self.fills and MASK not in self.kinds:
            found["masks"] = self.masks.shares
        if self.controls:
            found["controls"] = [
                [c.name, c.weight, c.start, c.stop, c.guess] for c in self.controls
            ]
        return found

    @property
    def fills(self) -> bool:
        """Whether the model fills masks."""
        return reads_picture(self.model) == FILLS


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """The pictures of a split as a model reads them; see `sampling.drawing.Reads`."""

    conditions: Conditions
    encoder: PictureEncoder

    def __call__(
        self, numbers: np.ndarray, *, seed: int, shape: tuple[int, int, int]
    ) -> dict[str, np.ndarray]:
        """Return {field: [B, ...]} of `sampling.start`, for pictures of these numbers."""
        own, task = self.conditions, reads_picture(self.conditions.model)
        rows = own.rows(numbers)
        batch = own.batch(rows)
        found: dict[str, np.ndarray] = {}
        noise = vae_noise(seed, numbers, shape)
        if task == EDITS:
            found["channels"] = self.encoder.read(batch[BEFORE], noise)
        elif task == FOLLOWS:
            found["channels"] = self.encoder.read(2.0 * batch[CONDITION] - 1.0, noise)
        elif task == FILLS:
            masks = own.masked(rows, batch)
            found |= picture_of(self.encoder, batch["image"], masks, noise, pure=True)
        for control in own.controls:
            if sight := own.sights.get(control.name):
                made, none = sight(list(self._seen(rows)))
                found[control.name] = made
                found[nothing_of(control.name)] = np.repeat(none, len(made), axis=0)
            else:
                found[control.name] = batch[CONDITION]
        return found

    def _seen(self, rows: np.ndarray) -> np.ndarray:
        """The pictures that IP-Adapters see, uint8 [n, H, W, 3]."""
        named = self.conditions.pictures.named([int(row) for row in rows])
        return named.get(REFERENCE, named["image"])


def open_conditions(
    model: Model,
    data: DataConfig,
    split: str,
    *,
    size: tuple[int, int],
    per_prompt: int,
    controls: tuple[Control, ...],
    sights: Mapping[str, Sight],
    method: Any,
    dtype: str,
) -> Conditions:
    """Return the pictures of a split, as a model reads them.

    Args:
        size: (height, width) of what is drawn.
        method: the group of the run, whose masks are drawn if it is of inpainting.

    Raises:
        UserError: the data have no pixels, or the first example lacks a picture.
    """
    if not has_pictures(data):
        raise UserError(
            "the model reads pictures besides prompts, and data that are encoded ahead have no "
            "pixels; give --dataset=PATH of pictures"
        )
    masks = method if isinstance(method, InpaintConfig) else InpaintConfig()
    kinds = {"image": "picture", **named_images.kinds_of(data.images)}
    made = Conditions(
        model, open_split(data, split, size=size), per_prompt, controls, sights, masks, kinds, dtype
    )
    made.batch(np.zeros(1, int))  # what cannot be read is an error now
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """The pictures that a model for inpainting has been given parts of."""

    conditions: Conditions

    def errors(self, pictures: Pictures, start: int, stop: int) -> np.ndarray:
        """Return how far pictures start..stop-1 are from those of the split, [n, 2].

        That is the mean absolute difference of their pixels, from 0 to 1, inside of the mask and
        outside; NaN where there is no such pixel.
        """
        own, numbers = self.conditions, np.arange(start, stop)
        rows = own.rows(numbers)
        batch = own.batch(rows)
        masks = own.masked(rows, batch)
        real = batch["image"] / 2 + 0.5
        apart = np.abs(pictures.read(start, stop) / 255 - real).mean(axis=-1, keepdims=True)
        axes = (1, 2, 3)
        with np.errstate(invalid="ignore"):
            parts = [(apart * m).sum(axes) / m.sum(axes) for m in (masks, 1 - masks)]
        return np.stack(parts, axis=1)


def masked_errors(
    masked: Masked, pictures: Pictures, captions: Sequence[str], **options: Any
) -> dict[str, Estimate]:
    """Return the estimates inside_error and outside_error; see `Masked.errors`.

    Intervals resample prompts with all their pictures. Pictures without such a pixel do not count.
    """
    bounds = range(0, len(pictures), _STRETCH)
    stretches = [(start, min(start + _STRETCH, len(pictures))) for start in bounds]
    errors = np.concatenate([masked.errors(pictures, *stretch) for stretch in stretches])
    found = {}
    for name, values in zip(("inside_error", "outside_error"), errors.T, strict=True):
        kept = ~np.isnan(values)
        if kept.any():
            groups = np.asarray(captions)[kept]
            found[name] = bootstrap.mean(
                values[kept], groups=groups, higher_is_better=False, **options
            )
    return found
