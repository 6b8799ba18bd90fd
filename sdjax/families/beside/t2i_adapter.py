"""T2I-Adapters beside a model: their place among its networks, and which UNets they are for."""

from __future__ import annotations

import dataclasses

from sdjax.errors import UserError
from sdjax.families.beside.unets import plain_unet
from sdjax.families.family import Family, Model, Part
from sdjax.families.sd import SD
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.t2i_adapter.network import T2IAdapter
from sdjax.models.unet_config import DOWN_TYPES, UNetConfig

T2I_ADAPTER = "t2i_adapter"  # the name of the network, and the first word of its parameters' paths
PART = Part(T2IAdapter, T2IAdapterConfig, "T2IAdapter")


def with_t2i_adapter(model: Model, config: T2IAdapterConfig) -> Model:
    """Return a model that has a T2I-Adapter as well.

    Raises:
        UserError: its denoiser is no UNet, or another than the adapter was made for.
    """
    check(model, config, "the T2I-Adapter")
    networks = {**model.networks, T2I_ADAPTER: config}
    return dataclasses.replace(model, family=family_with(model.family), networks=networks)


def family_with(family: Family) -> Family:
    """Return a family whose parts include a T2I-Adapter."""
    return dataclasses.replace(family, parts={**family.parts, T2I_ADAPTER: PART})


ALONE = family_with(SD)  # of an adapter without a model: its part is the same in every family


def places(unet: UNetConfig, downscale: int) -> tuple[tuple[int, int], ...]:
    """Return (channels, pixels along its side) of each map of a UNet that one is added to.

    They are the outputs of the levels on the way down, then of the middle; see `UNet.__call__`.

    Args:
        downscale: pixels along the side of a latent.
    """
    widths, last = unet.block_out_channels, len(unet.block_out_channels) - 1
    found = []
    for i, (width, kind) in enumerate(zip(widths, unet.down_block_types, strict=True)):
        after = kind != DOWN_TYPES[0] and i < last  # a plain level has halved it by then
        found.append((width, downscale * 2 ** (i + after)))
    return (*found, (widths[-1], downscale * 2**last))


def check(model: Model, config: T2IAdapterConfig, name: str) -> None:
    """Check that a T2I-Adapter steers a model's denoiser.

    Args:
        name: of the adapter, for messages.

    Raises:
        UserError: naming the maps that differ.
    """
    unet = plain_unet(model, name)
    wanted = places(unet, model.vae.downscale)
    if config.maps != wanted[: len(config.maps)]:
        raise UserError(
            f"{name} is not for this model: of {config.adapter_type!r}, channels "
            f"{list(config.channels)} and downscale_factor {config.downscale_factor} it makes maps "
            f"of {_described(config.maps)}; the UNet has {_described(wanted)}, the last in its "
            "middle"
        )


def check_size(config: T2IAdapterConfig, sides: tuple[int, ...], name: str) -> None:
    """Raise a UserError, naming the adapter, unless it reads conditions with these sides."""
    factor = config.downscale_factor
    if any(side % factor for side in sides):
        said = " x ".join(map(str, sides))
        raise UserError(f"{name} reads patches of {factor} pixels; expected multiples, got {said}")


def _described(maps: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{channels} at 1/{factor}" for channels, factor in maps)
