"""Latent diffusion: frozen VAE, text encoders (trained or frozen), UNet; and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import Config
from sdjax.diffusion.losses import (
    CALLER_STREAM,
    ObjectiveConfig,
    denoising_loss,
    fold_keys,
    normal_like,
)
from sdjax.diffusion.prediction import add_noise
from sdjax.diffusion.schedules import Schedule, schedule_at
from sdjax.families.conditioning import Conditioner, Context
from sdjax.models import capture, weights
from sdjax.models.params import component
from sdjax.models.unet import UNet
from sdjax.models.vae import sample_moments, scale_latents

# Streams of randomness; from STRATA on one for each stratum of the validation.
LATENTS, DROPOUT, STRATA = CALLER_STREAM, CALLER_STREAM + 1, CALLER_STREAM + 2

Params = Mapping[str, jax.Array]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The networks of a configuration. Parameters are those of all networks together.

    graphs: of the UNet and the VAE, by name.
    """

    config: Config
    graphs: Mapping[str, Any]
    conditioner: Conditioner
    schedule: Schedule

    def loss(self, params, frozen, batch, *, key, keys, positions, batch_size):
        """See `sdjax.train.step.LossFn`."""
        every = {**frozen, **params}
        dropout = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), positions[0])
        unet = weights.merge(self.graphs["unet"], component(every, "unet"))
        x0 = self._latents(every, batch, keys)
        rate = self.config.objective.caption_dropout
        captions = self.conditioner.drop(every, batch, keys, rate)
        context = self._context(
            every, {**batch, **captions}, x0, key=jax.random.fold_in(dropout, 0)
        )
        return denoising_loss(
            lambda xt, t: unet(xt, t, context, key=jax.random.fold_in(dropout, 1)),
            jax.lax.stop_gradient(x0),
            keys=keys,
            positions=positions,
            batch_size=batch_size,
            batch_key=key,
            schedule=self.schedule,
            objective=self.config.objective,
        )

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, n] at n timesteps, of the plain objective; see `Task.validate`."""
        unet = weights.merge(self.graphs["unet"], component(every, "unet"))
        x0 = self._latents(every, batch, keys)
        context = self._context(every, self._captions(every, batch, keys), x0)
        plain = plain_objective(self.config.objective)

        def at(stratum):
            number, t = stratum
            per_example, _ = denoising_loss(
                lambda xt, t: unet(xt, t, context),
                x0,
                keys=fold_keys(keys, STRATA + number),
                positions=jnp.zeros(len(x0), jnp.int32),
                batch_size=1,
                schedule=self.schedule,
                objective=plain,
                t=jnp.full(len(x0), t),
            )
            return per_example

        return jax.lax.map(at, (jnp.arange(len(timesteps)), jnp.asarray(timesteps))).T

    def maxima(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> dict[str, jax.Array]:
        """{path: scalar}, see `sdjax.models.capture.maxima`; example i at timestep i modulo n."""
        model = self.config.model
        graph = weights.abstract(UNet, model.unet, dtype=jnp.dtype(model.dtype))[0]
        x0 = self._latents(every, batch, keys)
        t = jnp.asarray(np.resize(timesteps, len(x0)))
        eps = normal_like(fold_keys(keys, STRATA), x0)
        xt = add_noise(x0, eps, *schedule_at(self.schedule, t))
        context = self._context(every, self._captions(every, batch, keys), x0)
        return capture.maxima(graph, component(every, "unet"), xt, t, context)

    def _latents(self, every: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        vae_config = self.config.model.vae
        vae = weights.merge(self.graphs["vae"], component(every, "vae"))
        moments = vae.encode(batch["image"]) if "image" in batch else batch["moments"]
        noise = normal_like(fold_keys(keys, LATENTS), moments[..., : vae_config.latent_channels])
        return scale_latents(sample_moments(moments, noise), vae_config)

    def _context(
        self, every: Params, batch: Batch, x0: jax.Array, key: jax.Array | None = None
    ) -> Context:
        """For pictures of the latents x0 [b, h, w, c]."""
        factor = self.config.model.vae.downscale
        target = x0.shape[1] * factor, x0.shape[2] * factor
        return self.conditioner(every, batch, target=target, key=key)

    def _captions(self, every: Params, batch: Batch, keys: jax.Array) -> Batch:
        """As they are, but for a model that has never seen one."""
        if self.config.objective.caption_dropout < 1.0:
            return batch
        return {**batch, **self.conditioner.drop(every, batch, keys, 1.0)}

    def timesteps(self, count: int) -> np.ndarray:
        """See `Task.timesteps`; whole ones, as a table schedule has them."""
        objective = self.config.objective
        low = objective.timestep_min
        high = objective.timestep_max or self.config.schedule.num_train_timesteps
        return np.floor(low + (np.arange(count) + 0.5) * (high - low) / count).astype(np.float32)


def plain_objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same prediction, judged by its plain mean squared error."""
    return dataclasses.replace(
        objective, weighting="uniform", loss="l2", offset_noise=0.0, input_perturbation=0.0
    )
