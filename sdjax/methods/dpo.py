"""Diffusion-DPO: of two pictures of a caption, the denoiser learns to prefer the chosen one.

Wallace et al. 2023, arXiv 2311.12908. For the errors d = mean |out - target|^2 of a picture, with w
the chosen and l the rejected one, the same noise and timestep for both, and the denoiser as it was
at the start as the reference:

    logit = -beta / 2 * ((d_w - d_w_ref) - (d_l - d_l_ref)),    L = -log sigmoid(logit).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.losses import NOISE, fold_keys, normal_like, sample_timesteps
from sdjax.diffusion.prediction import add_noise, target
from sdjax.diffusion.schedules import schedule_at
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.methods.adapter_rules import without_adapters
from sdjax.methods.denoise import (
    STRATA,
    DenoiseConfig,
    Denoiser,
    LatentDiffusion,
    MakeDenoiser,
    bound,
    latent_diffusion,
)
from sdjax.methods.drawings import caption_pictures
from sdjax.methods.fields import picture_fields
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Kind,
    Method,
    Phase,
    Setup,
)
from sdjax.models.params import Params, component, prefixed

REJECTED = "rejected"  # the picture of data.images that the main one is preferred to
REFERENCE = "reference"  # the denoiser as it was at the start, among frozen networks
LOSSES = ("sigmoid", "hinge", "ipo")


@dataclasses.dataclass(frozen=True)
class DPOConfig(DenoiseConfig):
    """Training on pairs of a chosen and a rejected picture.

    Raises ValueError where a field is out of its range.
    """

    name: str = "dpo"
    # The paper's beta, which has a factor 1/2 beside it. The SD1.5 script of diffusers leaves that
    # out: its 2500 is 5000 here.
    beta: float = 5000.0
    # Of the difference x of (reference - model) errors, with b = beta / 2: "sigmoid" is
    # -log sigmoid(b x), "hinge" max(0, 1 - b x), "ipo" (x - 1 / (2 b))^2.
    loss: str = "sigmoid"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"method.loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")
        if not self.beta > 0:
            raise ValueError(f"method.beta is {self.beta}; expected more than 0")


def preference_loss(difference: jax.Array, config: DPOConfig) -> jax.Array:
    """Return the loss [b] of (d_w_ref - d_w) - (d_l_ref - d_l), float32 [b]."""
    half = config.beta / 2
    if config.loss == "hinge":
        return jax.nn.relu(1.0 - half * difference)
    if config.loss == "ipo":
        return jnp.square(difference - 1.0 / (2.0 * half))
    return -jax.nn.log_sigmoid(half * difference)


def preferred(difference: jax.Array) -> jax.Array:
    """Return whether the model prefers the chosen picture more than the reference does, [b].

    A tie counts half, as at the start, where all are.
    """
    return jnp.where(difference == 0, 0.5, (difference > 0).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """The loss of pairs.

    reference: gives the denoiser that the model's is compared with.
    """

    config: DPOConfig
    diffusion: LatentDiffusion
    reference: MakeDenoiser

    def loss(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`."""
        every = {**frozen, **trained}
        setup, schedule = self.diffusion.setup, self.diffusion.schedule
        rate = setup.objective.caption_dropout
        captions = self.diffusion.conditioner.drop(
            every, batch, draw.keys, rate, encoder_rate=setup.objective.encoder_dropout
        )
        t = sample_timesteps(
            draw.keys, draw.positions, draw.batch_size, schedule, setup.objective, draw.key
        )
        return self._per_example(every, {**batch, **captions}, draw.keys, t, NOISE)

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, n] at n timesteps; see `Method.validate`."""
        batch = self.diffusion.captions(every, batch, keys)

        def at(stratum: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, t = stratum
            t = jnp.full(len(keys), t)
            return self._per_example(every, batch, keys, t, STRATA + number)[0]

        return jax.lax.map(at, (jnp.arange(len(timesteps)), jnp.asarray(timesteps))).T

    def _per_example(
        self, every: Params, batch: Batch, keys: jax.Array, t: jax.Array, stream: Any
    ) -> tuple[jax.Array, Aux]:
        """The loss of each pair [b] and what is logged; the stream is that of the noise."""
        diffusion, kind = self.diffusion, self.diffusion.setup.objective.prediction_type
        pair = [diffusion.latents(every, one, keys) for one in (batch, _rejected(batch))]
        x0 = jax.lax.stop_gradient(jnp.concatenate(pair))  # [2b, h, w, c], chosen and rejected
        eps = normal_like(fold_keys(keys, stream), pair[0])
        eps, t2 = jnp.concatenate([eps] * 2), jnp.concatenate([t] * 2)
        alpha, sigma = schedule_at(diffusion.schedule, t2)
        context = diffusion.context(every, batch, pair[0])
        context = jax.tree.map(lambda value: jnp.concatenate([value] * 2), context)
        xt, wanted = add_noise(x0, eps, alpha, sigma), target(kind, x0, eps, alpha, sigma)

        def errors(denoiser: Denoiser) -> tuple[jax.Array, jax.Array]:
            out = denoiser(xt, t2, context).astype(jnp.float32)
            both = jnp.square(out - wanted).mean(axis=tuple(range(1, out.ndim)))  # [2b]
            win, lose = jnp.split(both, 2)
            return win, lose

        win, lose = errors(diffusion.denoiser(every, batch))
        win_ref, lose_ref = jax.lax.stop_gradient(errors(self.reference(every, batch)))
        difference = (win_ref - win) - (lose_ref - lose)
        loss = preference_loss(difference, self.config)
        return loss, {
            "loss": loss,
            "timesteps": t,
            "win_loss": win,
            "lose_loss": lose,
            "accuracy": preferred(difference),
        }


def _rejected(batch: Batch) -> Batch:
    """The rejected pictures in the place of the chosen ones."""
    if REJECTED in batch:
        return {"image": batch[REJECTED]}
    return {"moments": batch[f"{REJECTED}_moments"]}


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model; the reference is a copy of the denoiser.

    Raises:
        UserError: see `_bound`.
    """
    diffusion = latent_diffusion(setup)
    name = setup.model.family.denoiser

    def reference(every: Params, batch: Batch) -> Denoiser:
        return diffusion.denoiser(prefixed(component(every, REFERENCE), name), batch)

    method = _bound(diffusion, reference)

    def renamed(fields: dict) -> dict:
        return prefixed(component(fields, name), REFERENCE)

    return dataclasses.replace(
        method,
        abstract=method.abstract | renamed(method.abstract),
        start=lambda loaded: renamed(dict(loaded)),
        copies={REFERENCE: name},
        dtypes={**method.dtypes, **renamed(dict(method.dtypes))},
    )


def beside_base(setup: Setup) -> Method:
    """Bind the method to networks with adapters; the reference is the denoiser without them.

    Raises:
        UserError: see `_bound`.
    """
    name = setup.model.family.denoiser
    model = without_adapters(setup.model)
    plain = bind(model, (name,), dtype=setup.dtype, remat=setup.remat)

    def reference(every: Params, batch: Batch) -> Denoiser:
        return plain.module(name, {path: every[path] for path in plain.abstract})

    return _bound(latent_diffusion(setup), reference)


def _bound(diffusion: LatentDiffusion, reference: MakeDenoiser) -> Method:
    """The method whose model is compared with a reference, and whose denoiser alone is trained.

    Raises:
        UserError: the data has no rejected pictures, or the objective asks for another loss.
    """
    setup = diffusion.setup
    _check_objective(setup)
    images = picture_fields(setup, required={REJECTED: "picture"})
    pairs = Preference(setup.config, diffusion, reference)
    method = bound(diffusion, images=images, pictures=caption_pictures(setup))
    name = setup.model.family.denoiser
    phase = Phase("main", pairs.loss, lambda path: path.startswith(f"{name}."))
    return dataclasses.replace(method, phases=(phase,), validate=pairs.validate)


def _check_objective(setup: Setup) -> None:
    objective = setup.objective
    expected = {"weighting": "uniform", "loss": "l2", "offset_noise": 0, "input_perturbation": 0}
    for field, value in expected.items():
        if getattr(objective, field) != value:
            raise UserError(
                f"objective.{field} is {getattr(objective, field)!r}, but method "
                f"{setup.config.name!r} compares plain squared errors; set it to {value!r}"
            )


DPO = Kind(config=DPOConfig, make=make, networks=tuple, draws=True)
