"""Which denoisers are steered from beside."""

from __future__ import annotations

from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.models.unet_config import UNetConfig


def plain_unet(model: Model, name: str) -> UNetConfig:
    """Return the config of a model's UNet that reads latents and words alone.

    Args:
        name: of what steers it, for messages.

    Raises:
        UserError: the denoiser is no UNet, or reads a mask or another picture too.
    """
    unet = model.denoiser
    if not isinstance(unet, UNetConfig):
        raise UserError(
            f"{name} is for UNets, of SD1, SD2 and SDXL; the model is of the family "
            f"{model.family.name!r}, which has none"
        )
    if unet.in_channels != model.vae.latent_channels:
        raise UserError(
            f"{name} is for UNets that read latents alone; the model's reads {unet.in_channels} "
            f"channels, {model.vae.latent_channels} of them latents"
        )
    return unet
