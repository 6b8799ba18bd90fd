"""The channels that a denoiser reads beside the noisy latents: a mask, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.families.family import Context, Networks, Reading
from sdjax.families.registry import FAMILIES
from sdjax.methods.method import Batch, Setup
from sdjax.models.params import Params
from sdjax.sampling.start import counts


class MakeInputs(Protocol):
    """Makes what a denoiser reads beside the noisy latents."""

    def __call__(
        self, networks: Networks, every: Params, batch: Batch, keys: jax.Array
    ) -> jax.Array:
        """Return channels [b, h, w, K], on the grid of the latents; keys [b] of the examples."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The picture that a denoiser reads besides the noisy latents.

    reading: how it does.
    make: see `MakeInputs`.
    drop: (channels, keys) -> channels as training takes them, those of some examples being zero.
    """

    reading: Reading
    make: MakeInputs
    drop: Callable[[jax.Array, jax.Array], jax.Array] = lambda channels, keys: channels

    def beside(
        self, xt: jax.Array, context: Context, channels: jax.Array
    ) -> tuple[jax.Array, Context]:
        """Return noisy latents [b, h, w, C] and a context, one of which carries the channels."""
        if not self.reading.field:
            return jnp.concatenate([xt, channels], axis=-1), context
        assert isinstance(context, dict)
        return xt, {**context, self.reading.field: channels}


def reading_for(setup: Setup, task: str) -> Reading:
    """Return how the family's denoisers read a picture for a task.

    Raises:
        UserError: they do not, a setting says that this one does not, or `sample.fidelity` would
            read back what shows more than the result.
    """
    family, method = setup.model.family, setup.config.name
    reading = family.readings.get(task)
    if reading is None:
        able = [each.title for each in FAMILIES.values() if task in each.readings]
        raise UserError(
            f"method {method!r} is for {', '.join(able)}; model.family is {family.name!r}, "
            f"whose {family.denoiser} reads no picture for that"
        )
    if reading.setting and not setup.model.settings.get(reading.setting):
        raise UserError(
            f"model.{reading.setting} is False, but method {method!r} shows a picture to the "
            f"{family.denoiser}; set it to True, which init_from brings about"
        )
    if setup.sample.fidelity:
        raise UserError(
            f"sample.fidelity is {setup.sample.fidelity}, but method {method!r} draws from "
            "pictures, and not from prompts alone; set it to 0"
        )
    return reading


def check_channels(setup: Setup, inputs: Inputs | None) -> None:
    """Check that the denoiser reads latents and the channels that a method gives it.

    Raises:
        UserError: it reads others.
    """
    model = setup.model
    channels = model.family.latent_channels(model.denoiser)
    latent = model.vae.latent_channels
    added = inputs.reading.count(latent, model.vae.downscale) if inputs else 0
    if channels == latent + added:
        return
    hint = "" if setup.adopted else "; the VAE of the recipe may be one that vae_from names"
    name, method = model.family.denoiser, setup.config.name
    if not added and (other := counts(model).get(channels - latent)):
        hint = f"; method.name={other}, or {other}_adapters, trains such networks"
    wanted = f"{latent} + {added}" if added else f"{latent}"
    raise UserError(
        f"model.{name}.in_channels is {model.denoiser.in_channels}, for {channels} channels of "
        f"latents and what is beside them, and model.vae.latent_channels is {latent}: method "
        f"{method!r} takes {wanted}{hint}"
    )
