"""Prompts -> pictures: text encoder, guided sampler, VAE decoder, as one jitted function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdjax.diffusion.losses import example_keys
from sdjax.diffusion.samplers import SamplerConfig, sample
from sdjax.diffusion.schedules import make_schedule
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.models import capture
from sdjax.models.vae import VAE, unscale_latents
from sdjax.parallel.batches import batch_sharding
from sdjax.parallel.sharding import to_host
from sdjax.sampling.control import Control
from sdjax.sampling.denoising import Drawing, by_level, make_member, mean_of, of_member
from sdjax.sampling.settings import SampleConfig
from sdjax.sampling.start import Picture, constraint, initial_state, reading_of
from sdjax.system import progress

# Of a picture; the sampler's noise and the VAE's take the next two, and a word has 32 bits.
MOST_SEED = 2**32 - 3


def settings_of(model: Model) -> SampleConfig:
    """Return how a model is drawn, where no run says it: as its family, or without guidance.

    Models that were distilled to few steps draw guided pictures as they are.
    """
    group = "sample."
    family = model.family.defaults.items()
    own = {k.removeprefix(group): v for k, v in family if k.startswith(group)}
    settings = SampleConfig(**{name: value for name, value in own.items() if "." not in name})
    if model.sampler is not None and model.sampler.few_steps:
        return dataclasses.replace(settings, guidance=1.0)
    return settings


def drawing_of(own: SampleConfig, sampler: SamplerConfig, changes: Mapping[str, Any]) -> Drawing:
    """Return a drawing as `own` has it, but for the changes.

    Args:
        changes: "guidance", "image_guidance", "guidance_rescale", "embedded_guidance",
            "skip_layers", "skip_scale".
    """
    kept = ("guidance", "image_guidance", "guidance_rescale", "embedded_guidance")
    values = {name: changes.get(name, getattr(own, name)) for name in kept}
    layers = tuple(changes.get("skip_layers", own.skip.layers))
    scale = changes.get("skip_scale", own.skip.scale)
    skip = dataclasses.replace(own.skip, layers=layers, scale=scale)
    return Drawing(sampler, **values, skip=skip)


def check_guidance(model: Model, changes: Mapping[str, Any], name: str) -> None:
    """Check that a model reads the guidances that are changed.

    Args:
        changes: see `drawing_of`; name: of the model, for messages.

    Raises:
        UserError: it does not.
    """
    if "embedded_guidance" in changes and not model.family.reads_guidance(model.networks):
        raise UserError(
            f"--embedded_guidance is for FLUX.1-dev, latent consistency models and their kin; "
            f"{name} reads no guidance, --guidance is what it takes"
        )
    reading = reading_of(model)
    if "image_guidance" in changes and not (reading and reading.guided):
        raise UserError(
            f"--image_guidance is for models that edit a picture, as InstructPix2Pix; {name} has "
            "no guidance of that kind, leave it out"
        )


class Callback(Protocol):
    """Sees pictures being drawn, within the jitted loop, and keeps what it wants of them."""

    def wants(self, path: str) -> bool:
        """Whether the attention layer at this path is to be seen; see `models.capture`."""

    def start(self, shape: tuple[int, ...], length: int) -> Any:
        """Return the state before the first step, arrays [B, ...], for latents of `shape`
        [B, h, w, C] and a context of `length` tokens."""

    def see(
        self, state: Any, i: jax.Array, x0: jax.Array, probabilities: Mapping[str, jax.Array]
    ) -> Any:
        """Return the state after evaluation i of the network, which estimates x0 [B, h, w, C] with
        the attention {path: [B, heads, L, M]}, of the prompts and not of the negative ones."""


class Generate(Protocol):
    """Draws a batch of pictures."""

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        prompts: Mapping[str, jax.Array],
        negative: Mapping[str, jax.Array],
        latents: jax.Array,
        keys: jax.Array,
        picture: Picture | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Return float32 images [B, H, W, 3] in [0, 1], and the last state of each callback.

        Args:
            params: {path: array} of all networks of the model.
            prompts: {field: [B, ...]}, the tokens of each text encoder and, where the family takes
                them, its numbers.
            negative: {field: [B, L]}, tokens.
            latents: standard normal [B, h, w, C] float32.
            keys: [B], for the samplers that add noise.
            picture: what to begin with and to keep; see `sampling.start`.
        """


def make_generator(
    model: Model,
    drawing: Drawing,
    *,
    dtype: str = "float32",
    callbacks: Sequence[Callback] = (),
    others: Sequence[Model] = (),
    bounds: Sequence[float] | None = None,
    controls: Sequence[Control] = (),
) -> Generate:
    """Return a jitted `Generate`.

    Args:
        model: with schedule, prediction type and tokenizers; dtype: of products and convolutions.
        others, bounds: models that predict with the first, or in its place: `SamplingRequest`.
        controls: ControlNets of all of them; their parameters are among `params`.

    Raises:
        UserError: the sampler does not fit the schedule, or the networks one another.
    """
    assert model.schedule is not None
    drawn_by = [*enumerate((model, *others))][bounds is not None :]
    members = {i: make_member(each, drawing, dtype, controls) for i, each in drawn_by}
    vae = bind(model, ("vae",), dtype=dtype)
    drawing.plan(tables := make_schedule(model.schedule))  # what does not fit is an error now
    predict = mean_of if bounds is None else partial(by_level, bounds=bounds)
    wanted = lambda path: any(each.wants(path) for each in callbacks)  # noqa: E731

    @jax.jit
    def generate(
        params: Mapping[str, jax.Array],
        prompts: Mapping[str, jax.Array],
        negative: Mapping[str, jax.Array],
        latents: jax.Array,
        keys: jax.Array,
        picture: Picture | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        picture, of = picture or {}, of_member
        made = [
            m.denoise(of(i, params), of(i, prompts), of(i, negative), picture, latents.shape)
            for i, m in members.items()
        ]
        state, begun = initial_state(picture, latents, drawing.plan(tables, latents.shape[1:3]))
        with capture.capturing(made[0].network, probabilities=wanted) as found:
            x0, seen = sample(
                predict([each.function for each in made]),
                state,
                schedule=tables,
                prediction_type=model.prediction_type,
                sampler=drawing.sampler,
                callback=_all_of(callbacks, found),
                state=tuple(each.start(latents.shape, made[0].length) for each in callbacks),
                keys=keys,
                window=drawing.window,
                begun=begun,
                constrain=constraint(picture, latents),
            )
        return x0 if drawing.hands_over else to_images(vae.module("vae", params), x0), seen

    return generate


def _all_of(callbacks: Sequence[Callback], found: Any) -> Callable[..., tuple[Any, ...]]:
    """Return the callback of the sampler that calls all of them with what was captured."""

    def see(states: tuple[Any, ...], i: jax.Array, x0: jax.Array) -> tuple[Any, ...]:
        # Guidance runs the prompts before the negative ones.
        seen = {path: p[: len(x0)] for path, p in found.take().items()}
        return tuple(c.see(s, i, x0, seen) for c, s in zip(callbacks, states, strict=True))

    return see


def to_images(vae: VAE, x0: jax.Array) -> jax.Array:
    """Latents [B, h, w, C] -> images [B, H, W, 3] in [0, 1]."""
    return jnp.clip(vae.decode(unscale_latents(x0, vae.config)) / 2 + 0.5, 0.0, 1.0)


def initial_latents(seed: int, positions: Any, shape: tuple[int, int, int]) -> jax.Array:
    """Return standard normal noise [B, h, w, C]; picture i has the same in whatever batch.

    Raises:
        UserError: the seed is below 0 or above `MOST_SEED`.
    """
    return _noise(_word(seed), positions, shape)


@partial(jax.jit, static_argnames=("shape",))
def _noise(seed: jax.Array, positions: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    keys = example_keys(jax.random.key(seed), positions)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@jax.jit
def _sampler_keys(seed: jax.Array, positions: jax.Array) -> jax.Array:
    return example_keys(jax.random.key(seed + 1), positions)


def _word(seed: int) -> np.uint32:
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"the seed is {seed}; expected 0 to {MOST_SEED}")
    return np.uint32(seed)


@partial(jax.jit, static_argnames=("shape",))
def randomness_of(seeds: jax.Array, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the noise [B, h, w, C] and the sampler's keys [B] of the first picture of each seed.

    Args:
        seeds: uint32 [B], 0 to `MOST_SEED`.
    """
    first = jnp.zeros(1, jnp.int32)
    each = jax.vmap(lambda seed: (_noise(seed, first, shape)[0], _sampler_keys(seed, first)[0]))
    return each(seeds)


def latent_shape(model: Model, height: int, width: int) -> tuple[int, int, int]:
    """Return (h, w, C) of the latents of a picture.

    Raises:
        UserError: the size is not a multiple of the VAE's downsampling factor.
    """
    factor = model.vae.downscale
    for name, size in (("height", height), ("width", width)):
        if size < factor or size % factor:
            raise UserError(
                f"{name} is {size}; expected a multiple of {factor}, the VAE's downsampling factor"
            )
    return height // factor, width // factor, model.vae.latent_channels


def draw(
    generate: Generate,
    params: Mapping[str, jax.Array],
    prompts: Mapping[str, np.ndarray],
    negative: Mapping[str, np.ndarray],
    *,
    shape: tuple[int, int, int],
    seed: int,
    batch_size: int,
    latents: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    texts: Sequence[str] = (),
    picture: Mapping[str, np.ndarray] | None = None,
    finish: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Draw any number of pictures in batches of one shape (one compilation).

    Where the parameters lie on a mesh the batches are spread over it; on several hosts all must
    call it, with the same arguments, and all get every picture.

    Args:
        prompts: {field: [N, ...]}; negative: {field: [...]}, of one prompt. Instead of tokens
            either may have what `Conditioner.embed` makes of them.
        shape: (h, w, C) of the latents; latents: [N, h, w, C] to start from instead of `seed`.
        positions: [N] numbers of the pictures, which decide their noise; 0 to N - 1 by default.
        texts: what the tokens say, for errors; picture: see `sampling.start`.

    Returns:
        uint8 images [N, H, W, 3], or what `finish` makes of the result; and the last state of each
        callback, [N, ...] as NumPy.

    Raises:
        UserError: the seed is below 0 or above `MOST_SEED`.
        FloatingPointError: a picture has NaN pixels, and would be black.
    """
    parts: list[tuple[np.ndarray, Any]] = []
    total = len(next(iter(prompts.values())))
    mesh = _mesh_of(params)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    batch_size = -(-min(batch_size, total) // ways) * ways
    with progress.work("drawing", total, unit="pictures") as work:
        for start in range(0, total, batch_size):
            # The last batch is filled up with its last example, which is then dropped.
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            numbers = _spread(rows if positions is None else positions[rows], mesh)
            out, seen = generate(
                params,
                _batch(prompts, rows, mesh),
                _repeated(negative, batch_size, mesh),
                initial_latents(seed, numbers, shape)
                if latents is None
                else _spread(latents[rows], mesh),
                _sampler_keys(_word(seed), numbers),
                _batch(picture or {}, rows, mesh),
            )
            found, kept = _first(total - start, (out, seen))
            check_finite(found, start, texts)
            parts.append(((finish or to_uint8)(found), kept))
            work.advance(len(found))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _mesh_of(params: Mapping[str, Any]) -> Mesh | None:
    """The mesh that parameters of a training run lie on; None for those of a file."""
    for value in params.values():
        if isinstance(value, jax.Array) and isinstance(value.sharding, NamedSharding):
            mesh = value.sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None


def _spread(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """The rows of an array that every host has, over the mesh."""
    if mesh is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), array.__getitem__)


def _repeated(
    fields: Mapping[str, np.ndarray], count: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """The row of each field `count` times, over the mesh."""
    rows = np.zeros(count, int)
    return _batch({field: row[None] for field, row in fields.items()}, rows, mesh)


def _batch(
    fields: Mapping[str, np.ndarray], rows: np.ndarray, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """The chosen rows of each field, over the mesh."""
    return {field: _spread(values[rows], mesh) for field, values in fields.items()}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0..255, rounded as diffusers' `numpy_to_pil` does."""
    return (np.asarray(images) * 255).round().astype(np.uint8)


def _first(count: int, arrays: Any) -> Any:
    """The first rows of a pytree of arrays, on the host."""
    return jax.tree.map(lambda x: to_host(x)[:count], arrays)


def check_finite(images: np.ndarray, start: int = 0, texts: Sequence[str] = ()) -> None:
    """Raise FloatingPointError if pictures [N, H, W, 3] have NaN; `start` numbers the first."""
    bad = [start + i for i, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        name = f" ({texts[bad[0]]!r})" if texts else ""
        raise FloatingPointError(
            f"pictures {bad}{name} have NaN pixels: the weights are broken, or overflow in this "
            "dtype; try float32"
        )
