"""Denoisers that are given something more to read: channels beside latents, the guidance scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sdjax.families.family import AUTOENCODER, Model
from sdjax.models.config import ConfigError
from sdjax.models.unet_config import UNetConfig


def widened(model: Model, task: str, *, name: str, vae: Any = None) -> tuple[Model, str]:
    """Return a model whose denoiser reads a picture for a task, and a line for the log.

    New channels of its first layer are zero, and its bias is kept: it predicts what it did,
    whatever these channels hold. One that reads as many already stays as it is. Where the picture
    is read as further tokens, no weight changes.

    Args:
        model: with or without parameters.
        task: as `sdjax.families.family.EDITS`; one that the family does not know, as "", changes
            nothing.
        name: where it was read, for messages.
        vae: the config of the autoencoder, where the model has none.

    Raises:
        ConfigError: the denoiser reads channels for another task.
    """
    family = model.family
    denoiser, reading = family.denoiser, family.readings.get(task)
    config, vae = model.networks.get(denoiser), model.networks.get(AUTOENCODER, vae)
    if reading is None or config is None or vae is None:
        return model, ""
    latent, reads = vae.latent_channels, family.latent_channels(config)
    count = reading.count(latent, vae.downscale)
    setting = reading.setting
    if reads == latent + count and (not setting or model.settings.get(setting)):
        return model, ""
    if reads != latent:
        raise ConfigError(
            f"{name}: the {denoiser} has in_channels {config.in_channels}, for another task; "
            f"expected {family.widened(config, latent - reads).in_channels}, to be given more, or "
            f"{family.widened(config, latent + count - reads).in_channels}"
        )
    if setting:
        told = {**model.settings, setting: True}
        note = f"{name}: the {denoiser} is to read a picture as tokens (model.{setting})"
        return dataclasses.replace(model, settings=told), note
    wide = family.widened(config, count)
    assert family.adapters is not None, "it names the layer that reads latents"
    layer, added = f"{denoiser}.{family.adapters.entrance}", wide.in_channels - config.in_channels
    params = dict(model.params)
    if (path := f"{layer}.kernel") in params:
        kernel = params[path]  # [..., in, out]
        params[path] = np.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, added), (0, 0)])
    note = f"{name}: {layer} is given {added} channels of zeros beside {config.in_channels}"
    networks = {**model.networks, denoiser: wide}
    return dataclasses.replace(model, networks=networks, params=params), note


def reading_guidance(model: Model, width: int | None, *, name: str) -> tuple[Model, str]:
    """Return a model whose UNet reads the guidance scale, and a line for the log.

    The layer that reads it is not there yet, and starts at zero: the UNet predicts what it did.

    Args:
        model: with or without parameters.
        width: of the sinusoids that it reads; None leaves the model as it is.
        name: where it was read, for messages.

    Raises:
        ConfigError: it reads the guidance already.
    """
    denoiser = model.family.denoiser
    config = model.networks.get(denoiser)
    if width is None or not isinstance(config, UNetConfig):
        return model, ""
    if config.time_cond_proj_dim is not None:
        raise ConfigError(
            f"{name}: the {denoiser} reads the guidance scale, so it was distilled already; "
            "expected the model it was distilled from"
        )
    networks = {**model.networks, denoiser: dataclasses.replace(config, time_cond_proj_dim=width)}
    note = f"{name}: {denoiser}.time_embedding is given a layer of zeros that reads the guidance"
    return dataclasses.replace(model, networks=networks), note
