"""Where the sampler begins, and what of a picture it keeps: img2img, inpainting, handed latents.

The pipelines of diffusers begin on the sampler's grid too: `first_step` is their `get_timesteps`.
A picture reaches the generator as a mapping of arrays:

- "start" [B, h, w, C]: clean latents that get the noise of the first step.
- "state" [B, h, w, C]: latents as another denoiser left them.
- "known" [B, h, w, C] and "mask" [B, h, w, 1]: after each step what is black in the mask becomes
  `known` with the noise of that level.
- "channels" [B, h, w, K]: what the denoiser reads besides the noisy latents, as channels of its
  input or as further tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.diffusion.samplers import leave
from sdjax.diffusion.solvers import SolverPlan
from sdjax.errors import UserError
from sdjax.families.family import Context, Model, Reading, said_task

Picture = Mapping[str, jax.Array]


def first_step(steps: int, strength: float, *, flow: bool) -> int:
    """Return the step that img2img begins with: `strength` of all steps are left.

    The pipelines of SD and SDXL round the number of steps down, those of SD3 and FLUX.1 the first.

    Raises:
        UserError: strength is out of its range, or no step is left.
    """
    if not 0.0 < strength <= 1.0:
        raise UserError(f"--strength={strength}; expected above 0, at most 1")
    left = min(steps * strength, steps)
    first = int(steps - left) if flow else steps - int(left)
    if first >= steps:
        raise UserError(
            f"--strength={strength} of {steps} steps leaves none; give more --steps, or a higher "
            "--strength"
        )
    return first


def reads_picture(model: Model) -> str:
    """Return what the denoiser does with a picture that it reads, as `EDITS`, or "" for none.

    Raises:
        UserError: it reads channels that drawing does not know.
    """
    latent, family = model.vae.latent_channels, model.family
    added = family.latent_channels(model.denoiser) - latent
    if not added:
        return said_task(model)
    known = counts(model)
    if added not in known:
        takes = " or ".join(f"{number} to {task}" for number, task in known.items())
        raise UserError(
            f"the {family.denoiser} reads {added} channels besides {latent} of noisy latents; of "
            f"{family.title}, drawing knows {takes or 'none'}; take a model that reads those, or "
            "noisy latents alone"
        )
    return known[added]


def counts(model: Model) -> dict[int, str]:
    """Return {channels besides the noisy latents: the task for which a denoiser reads so many}."""
    size = model.vae.latent_channels, model.vae.downscale
    every = {reading.count(*size): task for task, reading in model.family.readings.items()}
    return {count: task for count, task in every.items() if count}


def reading_of(model: Model) -> Reading | None:
    """Return how the denoiser reads a picture; None if it reads none. See `reads_picture`."""
    return model.family.readings.get(reads_picture(model))


def initial_state(picture: Picture, noise: jax.Array, plan: SolverPlan) -> tuple[jax.Array, bool]:
    """Return what the sampler gets, and whether that is a state and not noise."""
    if "state" in picture:
        return picture["state"], True
    if "start" in picture:
        alpha, sigma = jnp.float32(plan.alpha[0]), jnp.float32(plan.sigma[0])
        return alpha * picture["start"] + sigma * noise, True
    return noise, False


def constraint(picture: Picture, noise: jax.Array) -> Callable[..., jax.Array]:
    """Return (x, alpha, sigma) -> x with the known part of the picture in its place."""
    if "known" not in picture:
        return leave
    known, mask = picture["known"], picture["mask"]

    def constrain(x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        return (1.0 - mask) * (alpha * known + sigma * noise) + mask * x

    return constrain


def with_channels(
    denoiser: Any, reading: Reading | None, picture: Picture
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return a denoiser that reads the picture's channels, and what puts them beside a context.

    The context carries them because guidance repeats it for both of its halves.
    """
    if "channels" not in picture:
        return denoiser, lambda context: context
    if reading is not None and reading.field:
        field = reading.field
        return denoiser, lambda context: {**context, field: picture["channels"]}

    def denoise(xt: jax.Array, t: jax.Array, context: tuple[Context, jax.Array], **kw: Any) -> Any:
        text, channels = context
        return denoiser(jnp.concatenate([xt, channels], axis=-1), t, text, **kw)

    return denoise, lambda context: (context, picture["channels"])
