"""Pictures between pictures: from one prompt to the next, or from one seed to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdjax.errors import UserError
from sdjax.families.conditioning import Conditioner, make_conditioner
from sdjax.sampling.animation import animated, save_animation
from sdjax.sampling.grids import grid, save_png
from sdjax.sampling.request import SamplingRequest
from sdjax.system import paths


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """The point at weight w of the way from a to b along the great circle, float32.

    (sin((1 - w) omega) a + sin(w omega) b) / sin(omega), where omega is the angle between a and b
    as vectors (Shoemake 1985, "Animating Rotation with Quaternion Curves"). Normal noise lies near
    a sphere; halfway along a straight line between two draws it would be too weak, and the picture
    flat (White 2016, "Sampling Generative Networks", arXiv:1609.04468). a and b are not brought to
    one length first, so both ends are met. Parallel vectors, where omega says nothing, go along the
    line.
    """
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    cosine = x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-300)
    omega = np.arccos(np.clip(cosine, -1.0, 1.0))
    if np.sin(omega) < 1e-6:
        mixed = (1 - weight) * x + weight * y
    else:
        mixed = (np.sin((1 - weight) * omega) * x + np.sin(weight * omega) * y) / np.sin(omega)
    return mixed.astype(np.float32).reshape(a.shape)


@dataclasses.dataclass(frozen=True)
class Between:
    """A picture at `weight` of the way from number `first` to number `last`; from one seed to
    another both are the same number."""

    first: int
    last: int
    weight: float


def plan_ways(request: SamplingRequest, count: int, other_seed: int | None) -> list[list[Between]]:
    """`count` pictures on each way: from each picture of the order to the next, or, given another
    seed, from each picture to the same with that seed.

    Raises:
        UserError: there is no way, or the sampler's own noise would tear it.
    """
    pictures = len(request.texts)
    if count < 1:
        raise UserError(f"--interpolate={count}; expected 1 or more pictures on each way")
    if other_seed is None and pictures < 2:
        raise UserError(
            "--interpolate goes from prompt to prompt and there is one alone; give another, or "
            "--interpolate_seeds=SEED2 to go from seed to seed"
        )
    if other_seed is not None and (request.latents is not None or other_seed < 0):
        raise UserError(
            f"--interpolate_seeds={other_seed}; expected a seed of 0 or more, and no --latents"
        )
    same = other_seed is None and len(set(request.positions.tolist())) == 1
    if request.plan.stochastic and not same:
        remedy = "" if other_seed is not None else ", or --same_noise"
        raise UserError(
            f"sampler {request.drawing.sampler.name!r} adds noise at every step, which does not "
            f"change from one picture to the next by degrees; for --interpolate take another "
            f"--sampler, as ddim with --eta=0 or dpmpp_2m{remedy}"
        )
    ends = [(i, i + (other_seed is None)) for i in range(pictures - (other_seed is None))]
    weights = [k / (count + 1) for k in range(1, count + 1)]
    return [[Between(first, last, weight) for weight in weights] for first, last in ends]


def draw_between(
    request: SamplingRequest, ways: Sequence[Sequence[Between]], other_seed: int | None
) -> np.ndarray:
    """The pictures on all ways, uint8 [ways * count, H, W, 3].

    Linear in what the text encoders make of the prompts, spherical in the noise.
    """
    steps = [step for way in ways for step in way]
    first = np.array([step.first for step in steps])
    prompts = {field: rows[first] for field, rows in request.prompts.items()}
    negative = dict(request.negative)
    start = end = request.noise()
    if other_seed is not None:
        end = dataclasses.replace(request, seed=other_seed).noise()
    else:
        negative = {}
        conditioner = make_conditioner(request.model, request.model.tokenizers, dtype=request.dtype)
        tokens = {
            field: np.concatenate([request.prompts[field], request.negative[field][None]])
            for field in request.model.tokenizers
        }
        prompts = {field: rows for field, rows in prompts.items() if field not in tokens}
        for field, x in embed(conditioner, request.params, tokens, request.batch_size).items():
            negative[field] = x[-1]
            mixed = [(1 - s.weight) * x[s.first] + s.weight * x[s.last] for s in steps]
            prompts[field] = np.stack(mixed)
    between = dataclasses.replace(
        request,
        texts=[request.texts[i] for i in first],
        prompts=prompts,
        negative=negative,
        latents=np.stack([slerp(start[s.first], end[s.last], s.weight) for s in steps]),
        positions=request.positions[first],
    )
    return between.draw()[0]


def embed(
    conditioner: Conditioner,
    params: Mapping[str, jax.Array],
    tokens: Mapping[str, np.ndarray],
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Return texts as the network is told of them: "context" [N, L, D], ..."""
    encode = jax.jit(conditioner.embed)
    parts = []
    for i in range(0, len(next(iter(tokens.values()))), batch_size):
        text = encode(params, {field: rows[i : i + batch_size] for field, rows in tokens.items()})
        parts.append({field: np.asarray(x, np.float32) for field, x in text.items()})
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}


def write_ways(
    folder: paths.Path,
    ways: Sequence[Sequence[Between]],
    between: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    settings: Mapping[str, Any],
    *,
    animation: str = "webp",
) -> None:
    """For the way from picture N: NNNNN-between-KK.png, NNNNN-way.png, all in a row with both ends,
    and the same as an animation.

    Args:
        between: of `draw_between`, uint8 [ways * count, H, W, 3].
        starts, ends: the pictures by number, uint8 [N, H, W, 3].
        animation: "webp", or "png" for NNNNN-way-animated.png.
    """
    images = iter(between)
    for way in ways:
        first, last = way[0].first, way[0].last
        row = [starts[first]]
        for k, step in enumerate(way, 1):
            row.append(next(images))
            about = {**settings, "from": first, "to": last, "weight": f"{step.weight:.6g}"}
            save_png(folder / f"{first:05d}-between-{k:02d}.png", row[-1], about)
        row.append(ends[last])
        captions = [f"{weight:.2f}" for weight in (0.0, *(step.weight for step in way), 1.0)]
        name = f"{first:05d}-way"
        sheet = grid(np.stack(row), captions, columns=len(row))
        save_png(folder / f"{name}.png", sheet, {**settings, "from": first, "to": last})
        save_animation(folder / animated(name, animation), row)


def draw_ways(
    folder: paths.Path,
    request: SamplingRequest,
    ways: Sequence[Sequence[Between]],
    images: np.ndarray,
    other_seed: int | None,
    settings: Mapping[str, Any],
    animation: str,
) -> None:
    """Draw and write the pictures between those that have been drawn, `images` by number.

    With another seed its pictures too, as NNNNN-seed-SEED2.png. Both ends of every way are drawn as
    they would be alone, and so are the same to the bit.
    """
    ends = images
    if other_seed is not None:
        ends = dataclasses.replace(request, seed=other_seed).draw()[0]
        for number, (image, text) in enumerate(zip(ends, request.texts, strict=True)):
            about = {"prompt": text, "number": number, **settings, "seed": other_seed}
            save_png(folder / f"{number:05d}-seed-{other_seed}.png", image, about)
    between = draw_between(request, ways, other_seed)
    about = dict(settings)
    if other_seed is not None:
        about["to_seed"] = other_seed
    write_ways(folder, ways, between, images, ends, about, animation=animation)
