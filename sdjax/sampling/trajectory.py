"""How a picture comes out of the noise: what the network takes it for, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.sampling.animation import animated, save_animation
from sdjax.sampling.generate import to_images, to_uint8
from sdjax.sampling.grids import grid, save_png
from sdjax.sampling.request import SamplingRequest
from sdjax.system import paths

DEFAULT_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A `Callback` that keeps x0 as the network estimates it.

    Its state is [B, F, h, w, C] float32, one for each of the F evaluations in `kept`.
    """

    kept: tuple[int, ...]
    evaluations: int

    def wants(self, path: str) -> bool:
        """No attention."""
        return False

    def start(self, shape: tuple[int, ...], length: int) -> jax.Array:
        """Nothing seen yet; see `Callback`."""
        return jnp.zeros((shape[0], len(self.kept), *shape[1:]))

    def see(
        self, state: jax.Array, i: jax.Array, x0: jax.Array, probabilities: Mapping[str, Any]
    ) -> jax.Array:
        """Keeps x0 [B, h, w, C] if evaluation i is one of `kept`."""
        slots = np.full(self.evaluations, len(self.kept))  # past the end: dropped
        slots[list(self.kept)] = np.arange(len(self.kept))
        return state.at[:, jnp.asarray(slots)[i]].set(x0, mode="drop")


def choose_frames(count: int | None, evaluations: int) -> Trajectory:
    """`count` frames, evenly spread from the first evaluation of the network to the picture.

    The last frame is the picture itself, so one estimate less is kept.

    Args:
        count: None for DEFAULT_FRAMES, or as many as there are evaluations.

    Raises:
        UserError: there are fewer evaluations than frames, or less than two frames.
    """
    if count is None:
        count = min(DEFAULT_FRAMES, evaluations)
    if not 2 <= count <= evaluations:
        raise UserError(
            f"--trajectory={count}, and the network is evaluated {evaluations} times; expected 2 "
            f"to {evaluations} frames, or more --steps"
        )
    spread = np.linspace(0, evaluations - 1, count).round().astype(int)
    return Trajectory(tuple(int(i) for i in spread[:-1]), evaluations)


def make_decoder(model: Model, dtype: str) -> Callable[..., np.ndarray]:
    """Return `decode(params, latents [N, h, w, C]) -> uint8 [N, H, W, 3]`, one at a time to spare
    memory; params are flat, of all networks."""
    networks = bind(model, ("vae",), dtype=dtype)

    @jax.jit
    def one(params: Mapping[str, jax.Array], latents: jax.Array) -> jax.Array:
        return to_images(networks.module("vae", params), latents[None])[0]

    def decode(params: Mapping[str, jax.Array], latents: np.ndarray) -> np.ndarray:
        own = {path: params[path] for path in networks.abstract}
        return np.stack([to_uint8(np.asarray(one(own, x))) for x in latents])

    return decode


class Steps:
    """`sample --trajectory`: which callback to draw with, and what to write of it.

    Args:
        count: of frames; None for the default.
        animation: see `write_steps`.

    Raises:
        UserError: the sampler has not so many steps.
    """

    def __init__(self, request: SamplingRequest, count: int | None, animation: str):
        self.callback = choose_frames(count, len(request.plan.timesteps))
        self.timesteps = request.plan.timesteps[list(self.callback.kept)]
        self.decode = make_decoder(request.model, request.dtype)
        self.params, self.animation = request.params, animation

    def write(
        self,
        folder: paths.Path,
        number: int,
        image: np.ndarray,
        states: np.ndarray,
        settings: Mapping[str, Any],
    ) -> None:
        """See `write_steps`; states: of all pictures."""
        frames = [*self.decode(self.params, states[number]), image]
        write_steps(folder, number, frames, self.timesteps, settings, animation=self.animation)


def write_steps(
    folder: paths.Path,
    number: int,
    frames: Sequence[np.ndarray],
    timesteps: np.ndarray,
    settings: Mapping[str, Any],
    *,
    animation: str = "webp",
) -> None:
    """NNNNN-steps.png, the frames side by side, and the same as an animation.

    Args:
        frames: uint8 [H, W, 3]; the last is the picture.
        timesteps: of all frames but the last, [F].
        animation: "webp", or "png" for NNNNN-steps-animated.png.
    """
    captions = [*(f"t = {t:g}" for t in timesteps), "picture"]
    name = f"{number:05d}-steps"
    save_png(
        folder / f"{name}.png", grid(np.stack(frames), captions, columns=len(frames)), settings
    )
    save_animation(folder / animated(name, animation), frames)
