"""ControlNet: a copy of the UNet's way down learns to steer it by a picture; the UNet is frozen.

Zhang et al. 2023, and train_controlnet.py of diffusers. The copy starts with the UNet's weights and
speaks through convolutions that start at zero, so that training starts with what the UNet draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside.controlnet import CONTROLNET, PART, differences, with_controlnet
from sdjax.families.bind import abstract_params
from sdjax.families.family import Context, Model, Networks
from sdjax.methods.beside import CONDITION, exporting, of_network, read_start
from sdjax.methods.denoise import MASK, Denoiser, MakeDenoiser, Watched, bound, latent_diffusion
from sdjax.methods.drawings import caption_pictures
from sdjax.methods.fields import picture_fields
from sdjax.methods.method import Batch, Kind, Method, MethodConfig, Setup
from sdjax.models.controlnet.config import CHANNEL_ORDERS, ControlNetConfig
from sdjax.models.params import Params, component, prefixed
from sdjax.models.unet_config import UNetConfig
from sdjax.sampling.control import Control
from sdjax.system import paths

FOLDER = "controlnet"  # in the workdir, at the end


@dataclasses.dataclass(frozen=True)
class ControlConfig(MethodConfig):
    """Training of a ControlNet, whose other settings are the UNet's."""

    name: str = "control"
    # Widths of the condition's embedding; between them it is halved, as often as by the VAE.
    widths: tuple[int, ...] = (16, 32, 96, 256)
    channel_order: str = "rgb"  # or "bgr", in which the network reads the condition
    pooled: bool = False  # what it says is the same everywhere: style, not places
    controlnet_from: str = ""  # a ControlNet to go on with; "" starts with a copy of the UNet

    def __post_init__(self) -> None:
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(
                f"method.channel_order is {self.channel_order!r}; expected one of {CHANNEL_ORDERS}"
            )
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"method.widths is {self.widths}; expected numbers of channels")


def network_config(unet: UNetConfig, config: ControlConfig) -> ControlNetConfig:
    """Return the shape of the ControlNet that a run trains.

    Raises:
        UserError: naming the field that is out of its range.
    """
    try:
        return ControlNetConfig.of_unet(
            unet,
            controlnet_conditioning_channel_order=config.channel_order,
            conditioning_embedding_out_channels=config.widths,
            global_pool_conditions=config.pooled,
        )
    except ValueError as error:
        raise UserError(f"method: {error}") from error


def steered(networks: Networks) -> MakeDenoiser:
    """Return what gives the UNet of a batch, steered by the batch's conditions."""

    def make_denoiser(every: Params, batch: Batch) -> Denoiser:
        unet = networks.module(networks.family.denoiser, every)
        control = networks.module(CONTROLNET, every)

        def denoise(
            xt: jax.Array, t: jax.Array, context: Context, *, key: jax.Array | None = None
        ) -> jax.Array:
            residuals = control(xt, t, context, batch[CONDITION])
            return unet(xt, t, context, key=key, residuals=residuals)

        return denoise

    return make_denoiser


def first_values(
    config: ControlConfig, network: ControlNetConfig, model: Model, loaded: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what a ControlNet starts with: the UNet's weights, or those of another ControlNet.

    What neither has is drawn: of a copy, the condition's embedding and the convolutions at zero.

    Args:
        loaded: {path: array} of the networks of the model.

    Raises:
        UserError: `controlnet_from` is not of the shape that the recipe says.
    """
    if not config.controlnet_from:
        unet = component(loaded, model.family.denoiser)
        own = abstract_params(PART, network)
        return prefixed({path: unet[path] for path in own if path in unet}, CONTROLNET)
    from sdjax.formats.controlnet import read_controlnet_files

    return read_start(
        CONTROLNET, "method.controlnet_from", config.controlnet_from, read_controlnet_files,
        network,
        differences=differences,
        hint="Its conditioning_embedding_out_channels, controlnet_conditioning_channel_order and "
        "global_pool_conditions are method.widths, channel_order and pooled",
    )  # fmt: skip


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: the model has no UNet, the widths do not suit the VAE, or data.images has no
            condition.
    """
    config, model = setup.config, setup.model
    unet = model.denoiser
    if not isinstance(unet, UNetConfig):
        raise UserError(
            f"method 'control' is for UNets, of SD1, SD2 and SDXL; model.family is "
            f"{model.family.name!r}"
        )
    network = network_config(unet, config)
    if network.downscale != model.vae.downscale:
        factor = model.vae.downscale
        raise UserError(
            f"method.widths is {config.widths}, between which the condition is halved "
            f"{len(config.widths) - 1} times; the VAE brings a picture to 1/{factor}: expected "
            f"{factor.bit_length()} widths"
        )
    whole = with_controlnet(model, network)
    watched = Watched(CONTROLNET, (CONDITION,))
    method = bound(
        latent_diffusion(setup, whole, denoiser=steered, watched=watched),
        images=picture_fields(setup, required={CONDITION: "condition"}, optional={MASK: "mask"}),
        pictures=caption_pictures(setup, {CONDITION: Control(CONTROLNET, network)}),
        trains=of_network(CONTROLNET),
    )

    def write(folder: paths.Path, params: Mapping[str, np.ndarray]) -> paths.Path:
        """The folder that diffusers loads."""
        from sdjax.formats.controlnet import write_controlnet

        return write_controlnet(folder, network, params)

    return dataclasses.replace(
        method,
        start=lambda loaded: first_values(config, network, whole, loaded),
        export=exporting(CONTROLNET, FOLDER, write),
    )


CONTROL = Kind(
    config=ControlConfig,
    make=make,
    networks=tuple,
    draws=True,
    steers={"--controlnet": "", "--control_image": "FILE"},
)
