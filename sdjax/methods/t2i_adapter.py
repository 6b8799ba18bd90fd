"""T2I-Adapter: a small network reads a condition and adds to a frozen UNet's way down.

Mou et al. 2023 (arXiv:2302.08453), and train_t2i_adapter_sdxl.py of diffusers. The adapter has a
fifth of a ControlNet's parameters and sees neither noise nor timestep, so that drawing runs it
once. Nothing of it starts at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside.t2i_adapter import T2I_ADAPTER, check, check_size, with_t2i_adapter
from sdjax.families.beside.unets import plain_unet
from sdjax.families.family import Context, Model, Networks
from sdjax.methods.beside import CONDITION, exporting, of_network, read_start
from sdjax.methods.denoise import MASK, Denoiser, MakeDenoiser, Watched, bound, latent_diffusion
from sdjax.methods.drawings import caption_pictures
from sdjax.methods.fields import picture_fields
from sdjax.methods.method import Batch, Kind, Method, MethodConfig, Setup
from sdjax.models.params import Params
from sdjax.models.t2i_adapter.config import FULL, FULL_XL, KINDS, LIGHT, T2IAdapterConfig
from sdjax.models.unet_config import DOWN_TYPES
from sdjax.sampling.control import Control
from sdjax.system import paths

FOLDER = "t2i_adapter"  # in the workdir, at the end


@dataclasses.dataclass(frozen=True)
class T2IAdapterMethodConfig(MethodConfig):
    """Training of a T2I-Adapter, whose widths are the UNet's."""

    name: str = "t2i_adapter"
    # full_adapter, full_adapter_xl or light_adapter; "" is full_adapter_xl for UNets as SDXL's,
    # whose first level has no attention, and full_adapter for others.
    kind: str = ""
    res_blocks: int = 2  # residual blocks of each map; published light adapters have 4
    grey: bool = False  # it reads the condition's luma alone, as published ones for sketches
    adapter_from: str = ""  # a folder of a T2I-Adapter to go on with; "" draws a new one

    def __post_init__(self) -> None:
        if self.kind not in ("", *KINDS):
            raise ValueError(f"method.kind is {self.kind!r}; expected '' or one of {KINDS}")
        if not 1 <= self.res_blocks <= 32:
            raise ValueError(f"method.res_blocks is {self.res_blocks}; expected 1 to 32")


def network_config(model: Model, config: T2IAdapterMethodConfig) -> T2IAdapterConfig:
    """Return the shape of the T2I-Adapter that a run trains.

    Raises:
        UserError: the model has no UNet, or none that such an adapter is for.
    """
    unet = plain_unet(model, "method 't2i_adapter'")
    widths, plain = unet.block_out_channels, unet.down_block_types[0] != DOWN_TYPES[0]
    kind = config.kind or (FULL_XL if plain and len(widths) == 3 else FULL)
    # One map for each level; of SDXL one for the middle too. A light one ends in two of a width.
    channels = {FULL: widths, FULL_XL: (*widths, widths[-1]), LIGHT: widths[:-1]}[kind]
    try:
        made = T2IAdapterConfig(
            in_channels=1 if config.grey else 3,
            channels=channels,
            num_res_blocks=config.res_blocks,
            downscale_factor=model.vae.downscale * (2 if kind == FULL_XL else 1),
            adapter_type=kind,
        )
    except ValueError as error:
        raise UserError(f"method.kind={kind}: {error}") from error
    check(model, made, f"method.kind={kind}")
    return made


def steered(networks: Networks) -> MakeDenoiser:
    """Return what gives the UNet of a batch, steered by the batch's conditions."""

    def make_denoiser(every: Params, batch: Batch) -> Denoiser:
        unet = networks.module(networks.family.denoiser, every)
        maps = networks.module(T2I_ADAPTER, every)(batch[CONDITION])

        def denoise(
            xt: jax.Array, t: jax.Array, context: Context, *, key: jax.Array | None = None
        ) -> jax.Array:
            return unet(xt, t, context, key=key, maps=maps)

        return denoise

    return make_denoiser


def first_values(
    config: T2IAdapterMethodConfig, network: T2IAdapterConfig
) -> dict[str, np.ndarray]:
    """Return the weights of the adapter to go on with; {} for a new one.

    Raises:
        UserError: `adapter_from` is not of the shape that the recipe says.
    """
    if not config.adapter_from:
        return {}
    from sdjax.formats.t2i_adapter import read_t2i_adapter_files

    return read_start(
        T2I_ADAPTER, "method.adapter_from", config.adapter_from, read_t2i_adapter_files, network,
        hint="Its adapter_type, num_res_blocks and in_channels are method.kind, res_blocks and "
        "grey",
    )  # fmt: skip


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: the model has no UNet, or none for such an adapter; pictures have sides that it
            cannot read; data.images has no condition.
    """
    config, data = setup.config, setup.data
    network = network_config(setup.model, config)
    check_size(network, (data.resolution,), "data.resolution: the T2I-Adapter")
    check_size(network, (data.buckets.step,), "data.buckets.step: the T2I-Adapter")
    whole = with_t2i_adapter(setup.model, network)
    method = bound(
        latent_diffusion(
            setup, whole, denoiser=steered, watched=Watched(T2I_ADAPTER, (CONDITION,), alone=True)
        ),
        images=picture_fields(setup, required={CONDITION: "condition"}, optional={MASK: "mask"}),
        pictures=caption_pictures(setup, {CONDITION: Control(T2I_ADAPTER, network)}),
        trains=of_network(T2I_ADAPTER),
    )

    def write(folder: paths.Path, params: Mapping[str, np.ndarray]) -> paths.Path:
        """The folder that diffusers loads."""
        from sdjax.formats.t2i_adapter import write_t2i_adapter

        return write_t2i_adapter(folder, network, params)

    return dataclasses.replace(
        method,
        start=lambda loaded: first_values(config, network),
        export=exporting(T2I_ADAPTER, FOLDER, write),
    )


T2I = Kind(
    config=T2IAdapterMethodConfig,
    make=make,
    networks=tuple,
    draws=True,
    steers={"--t2i_adapter": "", "--control_image": "FILE"},
)
