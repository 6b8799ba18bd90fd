"""Many pictures into a folder, in batches over all devices, so that it can be stopped and go on.

Picture i shows prompt i // per_prompt (from the first again after the last) and depends on i, the
seed and the settings alone. Batches are always of the same numbers: whoever goes on after a stop
computes what was being computed, and has the same pictures to the bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sdjax.data.numbers import of_geometry
from sdjax.data.pictures import Folder, open_folder
from sdjax.errors import UserError
from sdjax.families.conditioning import encode_text
from sdjax.families.family import Model
from sdjax.parallel.sharding import placed, state_shardings
from sdjax.sampling.control import Control
from sdjax.sampling.denoising import named_of_member
from sdjax.sampling.generate import (
    Drawing,
    Generate,
    draw,
    initial_latents,
    latent_shape,
    make_generator,
)
from sdjax.sampling.grids import save_png
from sdjax.sampling.inputs import write_metadata
from sdjax.system import paths, progress, text_files
from sdjax.system.untrusted import brief, listed, plain

SETTINGS = "settings.json"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts: each of `texts` `per_prompt` times, and then from the first again."""

    texts: tuple[str, ...]
    per_prompt: int = 1

    def text(self, number: int) -> str:
        """The prompt of a picture."""
        return self.texts[number // self.per_prompt % len(self.texts)]


class Reads(Protocol):
    """Gives what a model reads besides prompts."""

    def __call__(
        self, numbers: np.ndarray, *, seed: int, shape: tuple[int, int, int]
    ) -> Mapping[str, np.ndarray]:
        """Return {field: [B, ...]} of `sampling.start` and of networks that steer.

        Args:
            numbers: of the pictures, [B]; seed: of their noise; shape: (h, w, C) of the latents.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Artist:
    """A model that draws.

    params: what `generate` takes, on the devices of `mesh`.
    reads: see `Reads`; None for a model that reads prompts alone.
    negative: {field: tokens [L]}.
    size: (height, width) in pixels; shape: (h, w, C) of the latents.
    turn: radians on the sphere of noise from a picture's own towards another, pi / 2 away.
    others: models that draw with it; see `SamplingRequest`.
    """

    model: Model
    generate: Generate
    params: Mapping[str, jax.Array]
    mesh: Mesh
    negative: Mapping[str, np.ndarray]
    size: tuple[int, int]
    shape: tuple[int, int, int]
    reads: Reads | None = None
    turn: float = 0.0
    others: Sequence[Model] = ()

    def draw(self, texts: Sequence[str], numbers: np.ndarray, *, seed: int) -> np.ndarray:
        """Draw pictures with these prompts and numbers [B], B a multiple of the devices.

        On several hosts all must call it, and all get the pictures.

        Returns:
            uint8 [B, H, W, 3].

        Raises:
            FloatingPointError: a picture has NaN pixels.
        """
        batch = _tokens(self.model, self.others, texts)
        for field, value in of_geometry(self.model.family.numbers, self.size).items():
            batch[field] = np.tile(value, (len(texts), 1))
        images, _ = draw(
            self.generate,
            self.params,
            batch,
            self.negative,
            shape=self.shape,
            seed=seed,
            batch_size=len(texts),
            latents=self._turned(numbers, seed) if self.turn else None,
            positions=numbers,
            texts=texts,
            picture=self.reads(numbers, seed=seed, shape=self.shape) if self.reads else None,
        )
        return images

    def _turned(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """The noise of pictures, turned: standard normal again, [B, h, w, C]."""
        own, other = (  # seed + 1 is the samplers'
            np.asarray(initial_latents(each, jnp.asarray(numbers), self.shape))
            for each in (seed, seed + 2)
        )
        turn = np.float32(self.turn)
        return np.cos(turn) * own + np.sin(turn) * other


def make_artist(
    model: Model,
    *,
    drawing: Drawing,
    mesh: Mesh,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
    dtype: str = "float32",
    controls: Sequence[Control] = (),
    others: Sequence[Model] = (),
    bounds: Sequence[float] | None = None,
) -> Artist:
    """Return the artist that a model is; what it reads besides prompts is still to be given.

    Args:
        size: (height, width); by default what the denoiser was made for.
        controls: networks that steer it, whose parameters are among the model's.
        others, bounds: models that draw with it, likewise; see `SamplingRequest`.

    Raises:
        UserError: networks are missing, or sampler or size do not fit.
    """
    if missing := model.missing():
        raise UserError(
            f"the model has {', '.join(model.networks) or 'no network'} only; drawing takes "
            f"{', '.join(missing)} too"
        )
    size = size or model.native_size
    negative = _tokens(model, others, [negative_prompt])
    generate = make_generator(
        model, drawing, dtype=dtype, controls=controls, others=others, bounds=bounds
    )
    return Artist(
        model=model,
        generate=generate,
        params=on_mesh(model.params, mesh),
        mesh=mesh,
        negative={field: rows[0] for field, rows in negative.items()},
        size=size,
        shape=latent_shape(model, *size),
        others=others,
    )


def _tokens(model: Model, others: Sequence[Model], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The tokens of texts for each model, {field: [B, L]}."""
    batch = encode_text(model.tokenizers, texts)
    for i, other in enumerate(others, 1):
        batch |= named_of_member(i, encode_text(other.tokenizers, texts))
    return batch


def on_mesh(params: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Parameters that every host has, placed as training places them."""
    abstract = {p: jax.ShapeDtypeStruct(np.shape(v), np.float32) for p, v in params.items()}
    targets = placed(abstract, state_shardings(abstract, abstract, mesh))
    return {
        path: jax.make_array_from_callback(
            target.shape, target.sharding, np.asarray(params[path]).__getitem__
        )
        for path, target in targets.items()
    }


def draw_folder(
    artist: Artist,
    prompts: Prompts,
    folder: paths.PathLike,
    *,
    count: int,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
) -> Folder:
    """`count` pictures as PNG files of a folder; those that are there already are kept.

    Args:
        batch_size: drawn at once; rounded up to a multiple of the devices.
        settings: whatever decides about the pictures, JSON-able; kept in the folder.

    Raises:
        UserError: the folder was begun with other settings (they are named).
        FloatingPointError: a picture has NaN pixels.
    """
    folder = paths.to_path(folder)
    ways = artist.mesh.shape["data"] * artist.mesh.shape["fsdp"]
    batch_size = -(-batch_size // ways) * ways
    settings = {**settings, "seed": seed, "batch_size": batch_size}
    first = jax.process_index() == 0
    if first:
        _begin(folder, settings)
        _write_metadata(folder, prompts, count)
    starts = _missing(folder, count, batch_size)
    todo = sum(min(batch_size, count - start) for start in starts)
    with progress.work("drawing", todo, unit="pictures") as work:
        for start in starts:
            numbers = np.arange(start, start + batch_size, dtype=np.int32)
            texts = [prompts.text(int(number)) for number in numbers]
            images = artist.draw(texts, numbers, seed=seed)
            for number, text, image in zip(numbers[: count - start], texts, images, strict=False):
                if first:
                    about = {"prompt": text, "number": int(number), "seed": seed}
                    save_png(folder / file_name(int(number)), image, about)
            work.advance(min(batch_size, count - start))
    multihost_utils.sync_global_devices("pictures are written")
    return open_folder(folder, size=artist.size, count=count)


def file_name(number: int) -> str:
    """Return the name of a picture's file."""
    return f"{number:06d}.png"


def _begin(folder: paths.Path, settings: Mapping[str, Any]) -> None:
    """Note the settings, or compare them with those noted."""
    file = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    paths.make_folder(folder)
    if not file.exists():
        paths.write_text(file, json.dumps(wanted, indent=2) + "\n")
        return
    try:
        noted = text_files.read_object(file)
    except text_files.TextError as error:
        raise UserError(f"{error}; delete {folder} to begin anew") from error
    different = [
        f"{plain(name)}: {brief(noted.get(name))} there, {brief(wanted.get(name))} here"
        for name in sorted({*noted, *wanted})
        if noted.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"the pictures in {folder} were begun with other settings:\n  "
            + listed(different)
            + "\ngive the same settings to go on, another --output, or delete the folder"
        )


def _write_metadata(folder: paths.Path, prompts: Prompts, count: int) -> None:
    numbers = range(count)
    write_metadata(folder, [file_name(i) for i in numbers], [prompts.text(i) for i in numbers])


def _missing(folder: paths.Path, count: int, batch_size: int) -> list[int]:
    """First numbers of the batches with a picture that is not there, as process 0 sees it."""
    starts = list(range(0, count, batch_size))
    absent = np.zeros(len(starts), bool)
    if jax.process_index() == 0:
        there = {file.name for file in folder.iterdir()}
        for i, start in enumerate(starts):
            numbers = range(start, min(start + batch_size, count))
            absent[i] = any(file_name(number) not in there for number in numbers)
    if jax.process_count() > 1:
        absent = multihost_utils.broadcast_one_to_all(absent)
    return [start for start, gone in zip(starts, absent, strict=True) if gone]
