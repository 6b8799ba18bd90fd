"""The VAE: reconstruction, LPIPS, KL and a PatchGAN critic (latent diffusion, appendix G)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside.critics import CRITIC, LPIPS_NETWORK, with_critics
from sdjax.families.bind import bind
from sdjax.families.config import ModelConfig
from sdjax.families.family import Networks
from sdjax.methods.autoencoding.config import AutoencoderConfig
from sdjax.methods.autoencoding.losses import LOGVAR, Losses
from sdjax.methods.fields import picture_fields, weight_field
from sdjax.methods.method import (
    Examples,
    Kind,
    Method,
    Phase,
    Setup,
)
from sdjax.models.critics.patchgan import PatchGANConfig
from sdjax.models.lpips.network import LEAST_SIDE, LPIPSConfig
from sdjax.models.params import Params
from sdjax.models.vae import sample_moments
from sdjax.parallel.sharding import to_host
from sdjax.sampling.generate import check_finite, to_uint8
from sdjax.system import paths

_DECODER = ("vae.decoder.", "vae.post_quant_conv.")


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstructions:
    """The pictures of a VAE, and what follows from its latents."""

    networks: Networks

    def pictures(
        self, params: Params, examples: Examples, seed: int, guided: bool = False
    ) -> np.ndarray:
        """Originals on the left, reconstructions on the right; see `Pictures`."""
        made = to_host(self._reconstruct(params, examples.images))
        check_finite(made)
        return to_uint8(np.concatenate([examples.images / 2 + 0.5, made], axis=2))

    @functools.cached_property
    def _reconstruct(self) -> Callable[[Params, np.ndarray], jax.Array]:
        @jax.jit
        def reconstruct(params: Params, images: jax.Array) -> jax.Array:
            vae = self.networks.module("vae", params)
            mean, _ = jnp.split(vae.encode(images), 2, axis=-1)
            return jnp.clip(vae.decode(mean) / 2 + 0.5, 0.0, 1.0)

        return reconstruct

    def adjust(
        self, group: ModelConfig, params: Params, images: Callable[[int], np.ndarray]
    ) -> ModelConfig:
        """Set scaling_factor, 1 / standard deviation of the latents (LDM, appendix G)."""

        @jax.jit
        def latents(params: Params, images: jax.Array) -> jax.Array:
            moments = self.networks.module("vae", params).encode(images)
            noise = jax.random.normal(jax.random.key(0), jnp.split(moments, 2, axis=-1)[0].shape)
            return sample_moments(moments, noise)

        shown = images(256)
        parts = [to_host(latents(params, shown[i : i + 32])) for i in range(0, len(shown), 32)]
        scale = float(f"{1 / np.std(np.concatenate(parts)):.5g}")
        vae = dataclasses.replace(group.vae, scaling_factor=scale)
        return dataclasses.replace(group, vae=vae)


def make(setup: Setup) -> Method:
    """Bind the method to the VAE of a model; see `Losses`.

    Raises:
        UserError: LPIPS counts and no file of VGG16 is named, or pictures are too small for it or
            for the critic.
    """
    config: AutoencoderConfig = setup.config
    critic = config.critic if config.critic_weight else None
    _check(setup, critic)
    lpips = LPIPSConfig() if config.lpips_weight else None
    model = with_critics(setup.model, lpips=lpips, critic=critic)
    names = ("vae", LPIPS_NETWORK, CRITIC)
    networks = bind(model, names, dtype=setup.dtype, remat=setup.remat)
    losses, shown = Losses(config, networks), Reconstructions(networks)
    own = _DECODER if config.decoder_only else ("vae.",)
    phases = [Phase("main", losses.main, lambda path: path.startswith((*own, LOGVAR)))]
    if critic:
        trains = lambda path: path.startswith(f"{CRITIC}.")  # noqa: E731
        rate = lambda path: config.critic_rate  # noqa: E731
        phases.append(Phase("critic", losses.critic, trains, rate=rate, first=config.critic_start))
    logvar = {LOGVAR: jax.ShapeDtypeStruct((), jnp.float32)} if config.learn_logvar else {}

    def init(key: jax.Array) -> Params:
        return networks.init(key) | {path: jnp.float32(config.logvar) for path in logvar}

    return Method(
        abstract=networks.abstract | logvar,
        init=init,
        phases=tuple(phases),
        example=picture_fields(setup) | weight_field(setup.data),
        validate=losses.validate,
        maxima=None,
        timesteps=lambda count: np.zeros(0, np.float32),
        pictures=shown.pictures,
        # Models that draw with the latents as they are have their scale.
        adjust=None if config.decoder_only else shown.adjust,
        start=functools.partial(_start, config),
        brought=_brought(config),
        whole_batch=_whole_batch(config),
        dtypes=networks.dtypes,
    )


def _start(config: AutoencoderConfig, loaded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network that the run reads besides its VAE, LPIPS, if it counts."""
    if not config.lpips_weight:
        return {}
    from sdjax.formats.vgg16 import read_lpips

    return read_lpips(LPIPS_NETWORK, paths.to_path(config.lpips_from))


def _brought(config: AutoencoderConfig) -> dict[str, tuple[str, str]]:
    used = config.lpips_weight > 0
    return {LPIPS_NETWORK: ("method.lpips_from", config.lpips_from)} if used else {}


def _whole_batch(config: AutoencoderConfig) -> str:
    if config.critic_weight:
        return (
            "the critic's batch norm and the adaptive weight (method.critic_weight) are of a whole "
            "batch; take a smaller data.batch_size, or model.remat"
        )
    return ""


def _check(setup: Setup, critic: PatchGANConfig | None) -> None:
    config, data = setup.config, setup.data
    if config.lpips_weight and not config.lpips_from:
        raise UserError(
            f"method.lpips_weight is {config.lpips_weight} and method.lpips_from is empty; name a "
            "file with the weights of VGG16, as torchvision's vgg16-397923af.pth "
            "(docs/autoencoders.md), or set method.lpips_weight=0"
        )
    least = {"method.lpips_weight": LEAST_SIDE} if config.lpips_weight else {}
    least |= {"method.critic_layers": critic.least_side} if critic else {}
    scales = config.equivariance_scales if config.changes_pictures else ()
    side = data.resolution * min((1.0, *scales))
    for field, wanted in least.items():
        if side < wanted:
            raise UserError(
                f"data.resolution is {data.resolution}, and the smallest pictures are {side:g} "
                f"pixels wide; {field} needs {wanted}: take larger pictures, larger "
                "method.equivariance_scales, or fewer method.critic_layers"
            )


AUTOENCODER = Kind(
    config=AutoencoderConfig,
    make=make,
    networks=lambda there: ("vae",),
    draws=False,
    used_by="vae_from",
)
