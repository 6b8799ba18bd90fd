"""The VAE: reconstruction and KL (LDM's `LPIPSWithDiscriminator` without its networks)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.losses import fold_keys, normal_like
from sdjax.families.bind import bind
from sdjax.families.config import ModelConfig
from sdjax.families.family import Networks
from sdjax.methods.denoise import LATENTS
from sdjax.methods.fields import picture_fields, weight_field
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Examples,
    Kind,
    Method,
    MethodConfig,
    Phase,
    Setup,
)
from sdjax.models.params import Params
from sdjax.models.vae import sample_moments
from sdjax.parallel.sharding import to_host
from sdjax.sampling.generate import check_finite, to_uint8


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(MethodConfig):
    """Training of the VAE."""

    name: str = "autoencoder"
    loss: str = "l1"  # "l1" or "l2", mean over pixels
    kl_weight: float = 1e-6  # times KL(q(z|x) || N(0, 1)), summed over the latent

    def __post_init__(self):
        if self.loss not in ("l1", "l2"):
            raise ValueError(f"method.loss is {self.loss!r}; expected 'l1' or 'l2'")


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """The loss of a VAE, and its pictures."""

    config: AutoencoderConfig
    networks: Networks

    def loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`."""
        return self._per_example({**frozen, **trained}, batch, draw.keys)

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, 1]; see `Method.validate`."""
        return self._per_example(every, batch, keys)[0][:, None]

    def _per_example(self, every: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, Aux]:
        vae = self.networks.module("vae", every)
        images = batch["image"]
        moments = vae.encode(images)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        z = sample_moments(moments, normal_like(fold_keys(keys, LATENTS), mean))
        error = vae.decode(z) - images
        error = jnp.abs(error) if self.config.loss == "l1" else jnp.square(error)
        reconstruction = jnp.mean(error, axis=(1, 2, 3))
        # KL(N(mean, var) || N(0, 1)), summed over the latent (LDM distributions.py).
        kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
        aux = {
            "reconstruction": reconstruction,
            "kl": kl,
            "latent_std": jnp.std(mean, axis=(1, 2, 3)),
        }
        return reconstruction + self.config.kl_weight * kl, aux

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
    """Bind the method to the VAE of a model; see `Reconstruction`."""
    networks = bind(setup.model, ("vae",), dtype=setup.dtype, remat=setup.remat)
    vae = Reconstruction(setup.config, networks)
    example = picture_fields(setup) | weight_field(setup.data)
    return Method(
        abstract=networks.abstract,
        init=networks.init,
        phases=(Phase("main", vae.loss, lambda path: path.startswith("vae.")),),
        example=example,
        validate=vae.validate,
        maxima=None,
        timesteps=lambda count: np.zeros(0, np.float32),
        pictures=vae.pictures,
        adjust=vae.adjust,
        dtypes=networks.dtypes,
    )


AUTOENCODER = Kind(
    config=AutoencoderConfig,
    make=make,
    networks=lambda there: ("vae",),
    draws=False,
    used_by="vae_from",
)
