"""What a run optimises: networks, their parameters, a loss and a way to look at the result.

Two tasks share the loop and the step. A new objective is a function in `diffusion/losses.py` and a
config field; only a new kind of network needs a new task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.config import Config
from sdjax.data.config import is_encoded
from sdjax.diffusion.losses import (
    fold_keys,
    normal_like,
)
from sdjax.diffusion.schedules import make_schedule
from sdjax.errors import UserError
from sdjax.families.conditioning import Encoder, encode_text, make_conditioner
from sdjax.methods.denoise import LATENTS, LatentDiffusion
from sdjax.models import weights
from sdjax.models.clip import CLIPText
from sdjax.models.params import component, prefixed
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE, sample_moments
from sdjax.parallel.sharding import to_host
from sdjax.sampling.generate import (
    Drawing,
    check_finite,
    draw,
    latent_shape,
    make_generator,
    to_uint8,
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Fixed examples to look at while training."""

    captions: tuple[str, ...]
    images: np.ndarray  # [N, H, W, 3] float32 in [-1, 1]
    tokens: Mapping[str, np.ndarray]  # {field: [N, L] int32}


@dataclasses.dataclass(frozen=True)
class Task:
    """One objective, bound to its networks.

    abstract: {path: ShapeDtypeStruct} of every network; paths start with the network's name.
    loss: see `sdjax.train.step.LossFn`.
    validate: (params of every network, batch, keys [b], timesteps [n]) -> losses [b, n] float32, a
      column for each timestep, of the plain objective: nothing is dropped, weighed or perturbed.
      An autoencoder has no timesteps, and one column.
    maxima: the same arguments -> {path: scalar}, the largest activations and attention logits of
      what is trained; None where that is not offered.
    timesteps: n -> the middles of n equal parts of the range that is trained, float32 [n].
    pictures: (params of every network, examples, seed, guided=) -> uint8 [N, H, W, 3].
    init: key -> parameters of every network, untrained (jittable).
    example: {name: ShapeDtypeStruct} of one example of a batch.
    """

    abstract: dict[str, jax.ShapeDtypeStruct]
    loss: Callable[..., Any]
    validate: Callable[..., jax.Array]
    maxima: Callable[..., dict[str, jax.Array]] | None
    timesteps: Callable[[int], np.ndarray]
    pictures: Callable[..., np.ndarray]
    init: Callable[[jax.Array], dict[str, jax.Array]]
    example: dict[str, jax.ShapeDtypeStruct]


def make_task(config: Config, tokenizers: Mapping[str, Encoder]) -> Task:
    """The task that `config.task` names.

    Args:
        tokenizers: by the field of the batch that each fills, one for each text encoder.
    """
    if config.task == "autoencoder":
        return _autoencoder(config)
    return _text_to_image(config, tokenizers)


def _network(config: Config, name: str) -> tuple[Any, Any]:
    """Class and config of a network."""
    classes = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText, "text_encoder_2": CLIPText}
    return classes[name], getattr(config.model, name)


def trainable_networks(config: Config) -> tuple[str, ...]:
    """Whose parameters the loss of `config.task` may train."""
    return ("vae",) if config.task == "autoencoder" else ("unet", *config.model.text_encoders)


def abstract_networks(config: Config, names: tuple[str, ...]) -> tuple[dict, dict, Callable]:
    """Graphs by name, {path: ShapeDtypeStruct} of all, and a function key -> fresh parameters."""
    graphs: dict[str, Any] = {}
    abstract: dict[str, jax.ShapeDtypeStruct] = {}
    for name in names:
        cls, net = _network(config, name)
        graphs[name], params = weights.abstract(
            cls, net, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat
        )
        abstract |= prefixed(params, name)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params: dict[str, jax.Array] = {}
        for i, name in enumerate(names):
            cls, net = _network(config, name)
            params |= prefixed(weights.init(cls, net, jax.random.fold_in(key, i)), name)
        return params

    return graphs, abstract, init


def _text_to_image(config: Config, tokenizers: Mapping[str, Encoder]) -> Task:
    """See `LatentDiffusion`."""
    model, vae_config = config.model, config.model.vae
    if model.unet.in_channels != vae_config.latent_channels:
        adopted = config.vae_from or config.init_from
        hint = "" if adopted else "; the VAE of the recipe may be one that vae_from names"
        raise UserError(
            f"model.unet.in_channels is {model.unet.in_channels} and model.vae.latent_channels is "
            f"{vae_config.latent_channels}: training takes equal numbers (an inpainting UNet of 9 "
            f"can be loaded and converted, not trained){hint}"
        )
    conditioner = make_conditioner(model, tokenizers, remat=model.remat)
    graphs, abstract, init = abstract_networks(config, ("unet", *model.text_encoders, "vae"))
    networks = LatentDiffusion(config, graphs, conditioner, make_schedule(config.schedule))
    example = _moments(config) if is_encoded(config.data) else {"image": _image(config)}
    if config.data.text_embeddings:
        example |= conditioner.embedding()
    else:
        for field, tokenizer in tokenizers.items():
            example[field] = jax.ShapeDtypeStruct((tokenizer.context_length,), jnp.int32)
    if model.unet.is_xl:
        example["size"] = jax.ShapeDtypeStruct((4,), jnp.int32)
    return Task(
        abstract=abstract,
        loss=networks.loss,
        validate=networks.validate,
        maxima=networks.maxima,
        timesteps=networks.timesteps,
        pictures=_pictures(config, tokenizers),
        init=init,
        example=example,
    )


def _pictures(config: Config, tokenizers: Mapping[str, Encoder]) -> Callable[..., np.ndarray]:
    """Drawing of captions, as `config.sample` says."""
    sample, model, side = config.sample, config.model, config.data.resolution

    @functools.cache
    def generator(guided: bool):
        guidance = sample.guidance if guided else 1.0
        return make_generator(
            model=model,
            tokenizers=tokenizers,
            schedule=config.schedule,
            prediction_type=config.objective.prediction_type,
            drawing=Drawing(sample.sampler, guidance, sample.guidance_rescale),
        )

    generator(True)  # a sampler that does not fit is an error now
    shape = latent_shape(model.unet, model.vae, side, side)
    tokens = encode_text(tokenizers, [sample.negative_prompt])
    negative = {field: rows[0] for field, rows in tokens.items()}

    def pictures(params, examples: Examples, seed: int, guided: bool = True) -> np.ndarray:
        return draw(
            generator(guided),
            params,
            examples.tokens,
            negative,
            shape=shape,
            seed=seed,
            batch_size=64,
        )

    return pictures


def _image(config: Config) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.data.resolution, config.data.resolution, 3), jnp.float32)


def _moments(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Of datasets that were encoded ahead."""
    vae, side = config.model.vae, config.data.resolution // config.model.vae.downscale
    shape = (side, side, 2 * vae.latent_channels)
    return {"moments": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _autoencoder(config: Config) -> Task:
    """VAE: reconstruction plus KL divergence, mean over examples."""
    graphs, abstract, init = abstract_networks(config, ("vae",))

    def loss(params, frozen, batch, *, key, keys, positions, batch_size):
        return per_example({**frozen, **params}, batch, keys)

    def per_example(every, batch, keys):
        vae = weights.merge(graphs["vae"], component(every, "vae"))
        images = batch["image"]
        moments = vae.encode(images)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        z = sample_moments(moments, normal_like(fold_keys(keys, LATENTS), mean))
        error = vae.decode(z) - images
        error = jnp.abs(error) if config.autoencoder.loss == "l1" else jnp.square(error)
        reconstruction = jnp.mean(error, axis=(1, 2, 3))
        # KL(N(mean, var) || N(0, 1)), summed over the latent (LDM distributions.py).
        kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
        aux = {
            "reconstruction": reconstruction,
            "kl": kl,
            "latent_std": jnp.std(mean, axis=(1, 2, 3)),
        }
        return reconstruction + config.autoencoder.kl_weight * kl, aux

    @jax.jit
    def reconstruct(params, images):
        vae = weights.merge(graphs["vae"], component(params, "vae"))
        mean, _ = jnp.split(vae.encode(images), 2, axis=-1)
        return jnp.clip(vae.decode(mean) / 2 + 0.5, 0.0, 1.0)

    def pictures(params, examples: Examples, seed: int, guided: bool = False) -> np.ndarray:
        """Originals on the left, reconstructions on the right."""
        made = to_host(reconstruct(params, examples.images))
        check_finite(made)
        return to_uint8(np.concatenate([examples.images / 2 + 0.5, made], axis=2))

    def validate(every, batch, keys, timesteps):
        return per_example(every, batch, keys)[0][:, None]

    return Task(
        abstract=abstract,
        loss=loss,
        validate=validate,
        maxima=None,
        timesteps=lambda count: np.zeros(0, np.float32),
        pictures=pictures,
        init=init,
        example={"image": _image(config)},
    )
