"""Denoisers that are given something more to read: channels beside latents, the guidance scale."""

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
