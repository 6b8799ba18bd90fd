"""Denoisers that read latents alone, given channels beside them for another task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from sdjax.families.family import Model
from sdjax.models.config import ConfigError
from sdjax.models.unet_config import UNetConfig


def widened(model: Model, beside: Callable[[int], int], *, name: str) -> tuple[Model, str]:
    """Return a model whose UNet reads channels beside latents, and a line for the log.

    New channels of conv_in are zero, and its bias is kept: the UNet predicts what it did, whatever
    these channels hold. A UNet that reads as many already stays as it is.

    Args:
        model: with or without parameters.
        beside: channels of latents -> how many more the UNet is to read.
        name: where it was read, for messages.

    Raises:
        ConfigError: the UNet reads channels for another task.
    """
    config = model.networks.get(model.family.denoiser)
    if not isinstance(config, UNetConfig):
        return model, ""
    latent, own = config.out_channels, config.in_channels
    added = beside(latent)
    if not added or own == latent + added:
        return model, ""
    denoiser = model.family.denoiser
    if own != latent:
        raise ConfigError(
            f"{name}: the {denoiser} has in_channels {own}, for another task; expected {latent}, "
            f"to be given {added} more, or {latent + added}"
        )
    networks = {**model.networks, denoiser: dataclasses.replace(config, in_channels=latent + added)}
    path = f"{denoiser}.conv_in.kernel"
    params = dict(model.params)
    if path in params:
        zeros = [(0, 0), (0, 0), (0, added), (0, 0)]  # [kh, kw, in, out]
        params[path] = np.pad(params[path], zeros)
    note = f"{name}: {denoiser}.conv_in is given {added} channels of zeros beside {latent}"
    return dataclasses.replace(model, networks=networks, params=params), note
