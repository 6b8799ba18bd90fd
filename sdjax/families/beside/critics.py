"""Networks beside an autoencoder that judge its pictures: LPIPS and a PatchGAN critic."""

from __future__ import annotations

import dataclasses

from sdjax.families.family import Model, Part
from sdjax.models.critics.patchgan import PatchGAN, PatchGANConfig
from sdjax.models.lpips.network import LPIPS, LPIPSConfig

LPIPS_NETWORK = "lpips"  # names of networks, and the first words of their parameters' paths
CRITIC = "critic"
LPIPS_PART = Part(LPIPS, LPIPSConfig, "")
CRITIC_PART = Part(PatchGAN, PatchGANConfig, "")


def with_critics(
    model: Model, *, lpips: LPIPSConfig | None, critic: PatchGANConfig | None
) -> Model:
    """Return a model that has LPIPS as well, or a critic, or both."""
    parts, networks = dict(model.family.parts), dict(model.networks)
    if lpips is not None:
        parts[LPIPS_NETWORK], networks[LPIPS_NETWORK] = LPIPS_PART, lpips
    if critic is not None:
        parts[CRITIC], networks[CRITIC] = CRITIC_PART, critic
    family = dataclasses.replace(model.family, parts=parts)
    return dataclasses.replace(model, family=family, networks=networks)
