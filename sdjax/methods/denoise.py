"""Latent diffusion: the denoiser is trained, the text encoders may be, the VAE is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.losses import (
    CALLER_STREAM,
    ObjectiveConfig,
    area_mean,
    denoising_loss,
    fold_keys,
    normal_like,
)
from sdjax.diffusion.prediction import add_noise, target
from sdjax.diffusion.schedules import Schedule, make_schedule, schedule_at
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.conditioning import Conditioner, make_conditioner
from sdjax.families.family import GUIDANCE, Context, Model, Networks
from sdjax.methods.drawings import caption_pictures
from sdjax.methods.fields import Fields, number_fields, picture_fields, weight_field
from sdjax.methods.inputs import Inputs, check_channels
from sdjax.methods.memory import memory_of
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Kind,
    Method,
    MethodConfig,
    Phase,
    Pictures,
    Setup,
)
from sdjax.models import capture
from sdjax.models.params import Params, component
from sdjax.models.vae import sample_moments, scale_latents

# Streams of randomness; from STRATA on one for each stratum of the validation.
LATENTS, DROPOUT, STRATA = CALLER_STREAM, CALLER_STREAM + 1, CALLER_STREAM + 2
CONFUSED = ("epsilon", "v_prediction")  # types of prediction that files leave open
MASK = "mask"  # the picture of data.images that multiplies the loss at each position


@dataclasses.dataclass(frozen=True)
class DenoiseConfig(MethodConfig):
    """Training of the denoiser, whole; the group `objective` says by which loss."""

    name: str = "denoise"


class Denoiser(Protocol):
    """Predicts from noisy latents: the network that denoises, and what works beside it."""

    def __call__(
        self, xt: jax.Array, t: jax.Array, context: Context, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Return the prediction, of the shape of xt [b, *frames, h, w, c], for timesteps t [b].

        Args:
            key: of dropout; None switches it off.
        """


class MakeDenoiser(Protocol):
    """Gives the denoiser of a batch."""

    def __call__(self, every: Params, batch: Batch) -> Denoiser:
        """Return the denoiser that has these parameters of every network."""


@dataclasses.dataclass(frozen=True)
class Watched:
    """The network whose activations are measured, and the fields of a batch that it reads.

    fields: given to it after what the denoiser is called with; or alone.
    """

    name: str
    fields: tuple[str, ...] = ()
    alone: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """The losses of a model. Parameters are those of all its networks together.

    model: the one of the setup, or that with further networks.
    make_denoiser: see `MakeDenoiser`; watched: see `Watched`.
    inputs: what the denoiser reads beside the noisy latents; None for nothing.
    mask: the picture of a batch that multiplies the loss, if the batch has it.
    guidance: the strength that a denoiser reads which reads one; None for the family's.
    """

    setup: Setup
    model: Model
    networks: Networks
    conditioner: Conditioner
    schedule: Schedule
    make_denoiser: MakeDenoiser
    watched: Watched
    inputs: Inputs | None = None
    mask: str = MASK
    guidance: float | None = None

    def loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`."""
        every = {**frozen, **trained}
        key, keys, positions, batch_size, *_ = draw
        dropout = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), positions[0])
        beside = self.beside(every, batch, keys)
        if self.inputs is not None:
            beside = self.inputs.drop(beside, keys)
        denoiser = self.denoiser(every, batch, beside)
        x0 = self.latents(every, batch, keys)
        objective = self.setup.objective
        captions = self.conditioner.drop(
            every, batch, keys, objective.caption_dropout, encoder_rate=objective.encoder_dropout
        )
        context = self.context(every, {**batch, **captions}, x0, key=jax.random.fold_in(dropout, 0))
        return denoising_loss(
            lambda xt, t: denoiser(xt, t, context, key=jax.random.fold_in(dropout, 1)),
            jax.lax.stop_gradient(x0),
            keys=keys,
            positions=positions,
            batch_size=batch_size,
            batch_key=key,
            schedule=self.schedule,
            objective=self.setup.objective,
            mask=self._mask(batch),
            memory=draw.memory or None,
        )

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, n] at n timesteps, of the plain objective; see `Method.validate`."""
        denoiser = self.denoiser(every, batch, self.beside(every, batch, keys))
        x0 = self.latents(every, batch, keys)
        context = self.context(every, self.captions(every, batch, keys), x0)
        plain, mask = plain_objective(self.setup.objective), self._mask(batch)

        def at(stratum):
            number, t = stratum
            per_example, _ = denoising_loss(
                lambda xt, t: denoiser(xt, t, context),
                x0,
                keys=fold_keys(keys, STRATA + number),
                positions=jnp.zeros(len(x0), jnp.int32),
                batch_size=1,
                schedule=self.schedule,
                objective=plain,
                t=jnp.full(len(x0), t),
                mask=mask,
            )
            return per_example

        return jax.lax.map(at, (jnp.arange(len(timesteps)), jnp.asarray(timesteps))).T

    def predictions(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> dict[str, jax.Array]:
        """Return the error of the output as each type of prediction; see `Method.predictions`."""
        denoiser = self.denoiser(every, batch, self.beside(every, batch, keys))
        x0 = self.latents(every, batch, keys)
        context = self.context(every, self.captions(every, batch, keys), x0)

        def at(stratum):
            number, t = stratum
            eps = normal_like(fold_keys(keys, STRATA + number), x0)
            t = jnp.full(len(x0), t)
            alpha, sigma = schedule_at(self.schedule, t)
            out = denoiser(add_noise(x0, eps, alpha, sigma), t, context)
            return {
                kind: jnp.mean((out - target(kind, x0, eps, alpha, sigma)) ** 2)
                for kind in CONFUSED
            }

        found = jax.lax.map(at, (jnp.arange(len(timesteps)), jnp.asarray(timesteps)))
        return {kind: errors.mean() for kind, errors in found.items()}

    def maxima(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> dict[str, jax.Array]:
        """{path: scalar}, see `sdjax.models.capture.maxima`; example i at timestep i modulo n."""
        name, fields = self.watched.name, self.watched.fields
        # Rematerialised blocks show nothing.
        plain = bind(self.model, (name,), dtype=self.setup.dtype)
        x0 = self.latents(every, batch, keys)
        t = jnp.asarray(np.resize(timesteps, len(x0)))
        eps = normal_like(fold_keys(keys, STRATA), x0)
        xt = add_noise(x0, eps, *schedule_at(self.schedule, t))
        context = self.context(every, self.captions(every, batch, keys), x0)
        if self.inputs is not None:
            xt, context = self.inputs.beside(xt, context, self.beside(every, batch, keys))
        more = [batch[field] for field in fields]
        given = more if self.watched.alone else [xt, t, context, *more]
        return capture.maxima(plain.graphs[name], component(every, name), *given)

    def denoiser(self, every: Params, batch: Batch, beside: jax.Array | None = None) -> Denoiser:
        """Return the denoiser of a batch, with the channels of `inputs`."""
        denoiser, inputs = self.make_denoiser(every, batch), self.inputs
        if beside is None or inputs is None:
            return denoiser

        def denoise(
            xt: jax.Array, t: jax.Array, context: Context, *, key: jax.Array | None = None
        ) -> jax.Array:
            xt, context = inputs.beside(xt, context, beside)
            return denoiser(xt, t, context, key=key)

        return denoise

    def beside(self, every: Params, batch: Batch, keys: jax.Array) -> Any:
        """The channels of `inputs`, [b, h, w, K]; None for none."""
        if self.inputs is None:
            return None
        return jax.lax.stop_gradient(self.inputs.make(self.networks, every, batch, keys))

    def latents(self, every: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """Latents [b, *frames, h, w, c] of the main pictures, or of their moments."""
        vae_config = self.setup.model.vae
        vae = self.networks.module("vae", every)
        moments = vae.encode(batch["image"]) if "image" in batch else batch["moments"]
        noise = normal_like(fold_keys(keys, LATENTS), moments[..., : vae_config.latent_channels])
        return scale_latents(sample_moments(moments, noise), vae_config)

    def _mask(self, batch: Batch) -> jax.Array | None:
        """The mask on the grid of the latents, [b, h, w, 1]; None if the batch has none."""
        if self.mask not in batch:
            return None
        return area_mean(batch[self.mask], self.setup.model.vae.downscale)

    def context(
        self, every: Params, batch: Batch, x0: jax.Array, key: jax.Array | None = None
    ) -> Context:
        """For pictures of the latents x0 [b, *frames, h, w, c]."""
        factor = self.setup.model.vae.downscale
        target = x0.shape[-3] * factor, x0.shape[-2] * factor
        if self.guidance is not None:
            batch = {**batch, GUIDANCE: jnp.full(len(x0), self.guidance, jnp.float32)}
        return self.conditioner(every, batch, target=target, key=key)

    def captions(self, every: Params, batch: Batch, keys: jax.Array) -> Batch:
        """As they are, but for a model that has never seen one."""
        if self.setup.objective.caption_dropout < 1.0:
            return batch
        return {**batch, **self.conditioner.drop(every, batch, keys, 1.0)}

    def timesteps(self, count: int) -> np.ndarray:
        """See `Method.timesteps`; whole ones, as a table schedule has them."""
        objective = self.setup.objective
        low = objective.timestep_min
        high = objective.timestep_max or self.schedule.num_train_timesteps
        return np.floor(low + (np.arange(count) + 0.5) * (high - low) / count).astype(np.float32)


def plain_objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same prediction, judged by its plain mean squared error."""
    return dataclasses.replace(
        objective,
        weighting="uniform",
        loss="l2",
        resampling="none",
        offset_noise=0.0,
        input_perturbation=0.0,
        unmasked_probability=0.0,
    )


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model; see `latent_diffusion`."""
    return bound(
        latent_diffusion(setup),
        images=picture_fields(setup, optional={MASK: "mask"}),
        pictures=caption_pictures(setup),
    )


def latent_diffusion(
    setup: Setup,
    model: Model | None = None,
    *,
    denoiser: Callable[[Networks], MakeDenoiser] | None = None,
    watched: Watched | None = None,
    inputs: Inputs | None = None,
    mask: str = MASK,
    guidance: float | None = None,
) -> LatentDiffusion:
    """Return the losses of a model; see `LatentDiffusion` for `inputs`, `mask` and `guidance`.

    Args:
        model: the one of the setup, or that with further networks.
        denoiser: networks -> see `MakeDenoiser`; by default the family's alone.
        watched: by default the denoiser.

    Raises:
        UserError: the networks do not belong together, or the denoiser takes other channels.
    """
    model, data = model or setup.model, setup.data
    check_channels(setup, inputs)
    if data.text_embeddings and setup.objective.encoder_dropout:
        raise UserError(
            f"objective.encoder_dropout is {setup.objective.encoder_dropout} with "
            "data.text_embeddings, in which the encoders can no longer be told apart; set it to 0"
        )
    conditioner = make_conditioner(model, model.tokenizers, dtype=setup.dtype, remat=setup.remat)
    networks = bind(model, dtype=setup.dtype, remat=setup.remat)
    assert model.schedule is not None
    return LatentDiffusion(
        setup=setup,
        model=model,
        networks=networks,
        conditioner=conditioner,
        schedule=make_schedule(model.schedule),
        make_denoiser=(denoiser or alone)(networks),
        watched=watched or Watched(model.family.denoiser),
        inputs=inputs,
        mask=mask,
        guidance=guidance,
    )


def alone(networks: Networks) -> MakeDenoiser:
    """Return what gives the family's denoiser, as it is."""
    return lambda every, batch: networks.module(networks.family.denoiser, every)


def bound(
    diffusion: LatentDiffusion,
    *,
    images: Fields,
    pictures: Pictures,
    gallery: bool = False,
    trains: Callable[[str], bool] | None = None,
) -> Method:
    """Return the method that trains a denoiser by a loss.

    Args:
        images: the fields of one example's pictures, see `picture_fields`.
        pictures, gallery: see `Method.pictures` and `Method.reads_pictures`.
        trains: see `Phase`; by default the denoiser and the text encoders.
    """
    setup, networks = diffusion.setup, diffusion.networks
    model, data = setup.model, setup.data
    example = dict(images)
    if data.text_embeddings:
        example |= diffusion.conditioner.embedding()
    else:
        for field, tokens in diffusion.conditioner.null.items():
            example[field] = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
    example |= weight_field(data) | number_fields(model.family.numbers)
    assert model.schedule is not None
    memory = memory_of(setup.objective, model.schedule)
    networks_trained = (model.family.denoiser, *model.text_encoders)
    trains = trains or (lambda path: path.split(".")[0] in networks_trained)
    return Method(
        abstract=networks.abstract,
        init=networks.init,
        phases=(Phase("main", diffusion.loss, trains, memory=memory),),
        example=example,
        validate=diffusion.validate,
        maxima=diffusion.maxima,
        predictions=(
            diffusion.predictions if setup.objective.prediction_type in CONFUSED else None
        ),
        timesteps=diffusion.timesteps,
        pictures=pictures,
        reads_pictures=gallery,
        conditioner=diffusion.conditioner if data.text_embeddings else None,
        dtypes=networks.dtypes,
        numbers=model.family.numbers,
    )


DENOISE = Kind(
    config=DenoiseConfig,
    make=make,
    networks=tuple,
    draws=True,
)
