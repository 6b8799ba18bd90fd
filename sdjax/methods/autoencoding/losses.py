"""The losses of an autoencoder: of what it makes of pictures, and of the critic that judges that.

LDM's `LPIPSWithDiscriminator` (ldm/modules/losses/contperceptual.py). The gradients of the
likelihood and of the critic's verdict by the made picture are computed one after the other, and
their mixture goes backwards through the autoencoder once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import autoencoding as terms
from sdjax.diffusion.losses import fold_keys, normal_like
from sdjax.families.beside.critics import CRITIC, LPIPS_NETWORK
from sdjax.families.family import Networks
from sdjax.methods.autoencoding import equivariance
from sdjax.methods.autoencoding.config import AutoencoderConfig
from sdjax.methods.autoencoding.equivariance import Variant
from sdjax.methods.denoise import LATENTS
from sdjax.methods.method import Aux, Averages, Batch, Draw
from sdjax.models.params import Params
from sdjax.models.vae import sample_moments

LOGVAR = "loss.logvar"  # the path of a learned log-variance, as in files of LDM
Loss = Callable[[Params], tuple[jax.Array, Aux]]
still = jax.lax.stop_gradient


class Seen(NamedTuple):
    """A batch after the autoencoder, but for its last layer.

    images: [b, H, W, 3], what the decoder should make.
    moments: [b, h, w, 2C] of the latents, see `VAE.encode`.
    features: see `VAE.features`.
    """

    vae: Any
    images: jax.Array
    moments: jax.Array
    features: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a VAE and of its critic, by the networks of a run."""

    config: AutoencoderConfig
    networks: Networks

    def main(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`; of the autoencoder, for which the critic stands still."""
        own, others = _apart(trained, lambda path: not path.startswith(f"{CRITIC}."))
        weights = _weights(batch)

        def look(variant: Variant, turns: jax.Array) -> Loss:
            def loss(own: Params) -> tuple[jax.Array, Aux]:
                every = {**frozen, **others, **own}
                seen = self._seen(every, batch["image"], draw.keys, variant, turns)
                values, aux = self._judged(every, seen, weights, draw.step)
                return self._with_kl(values, aux, seen.moments)

            return loss

        return self._of_a_variant(look, own, weights, draw.key)

    def critic(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """See `LossFn`; of the critic, for which the autoencoder stands still."""
        own, others = _apart(trained, lambda path: path.startswith(f"{CRITIC}."))

        def look(variant: Variant, turns: jax.Array) -> Loss:
            def loss(own: Params) -> tuple[jax.Array, Aux]:
                every = {**still(frozen), **still(others)}
                seen = self._seen(every, batch["image"], draw.keys, variant, turns)
                critic = self.networks.module(CRITIC, own)
                # Apart, as in the reference: each half has batch norm's statistics of its own.
                real = critic(seen.images)
                made = critic(still(seen.vae.painted(seen.features)))
                loss = terms.critic_loss(self.config.critic_loss, real, made)
                means = [jnp.mean(logits, axis=(1, 2)) for logits in (real, made)]
                return loss, {"loss": loss, "logits_real": means[0], "logits_made": means[1]}

            return loss

        return self._of_a_variant(look, own, _weights(batch), draw.key)

    def validate(
        self, every: Params, batch: Batch, keys: jax.Array, timesteps: np.ndarray
    ) -> jax.Array:
        """Losses [b, 1] without the critic; see `Method.validate`."""
        seen = self._seen(every, batch["image"], keys, Variant(), jnp.asarray(1))
        made = seen.vae.painted(seen.features)
        values, aux = self._likelihood(every, seen.images, made, self._logvar(every))
        return self._with_kl(values, aux, seen.moments)[0][:, None]

    def _seen(
        self, every: Params, images: jax.Array, keys: jax.Array, variant: Variant, turns: jax.Array
    ) -> Seen:
        """Pictures after the autoencoder, as a variant looks at them."""
        vae = self.networks.module("vae", every)
        factor = vae.config.downscale
        whole = images.shape[1] // factor, images.shape[2] // factor
        if variant.pictures != 1.0:
            _, size = equivariance.scaled_sizes(whole, variant.pictures, factor)
            images = equivariance.resized(images, size)
        moments = vae.encode(images)
        mean = moments[..., : moments.shape[-1] // 2]
        z = sample_moments(moments, normal_like(fold_keys(keys, LATENTS), mean))
        if variant.latents != 1.0:
            small, size = equivariance.scaled_sizes(whole, variant.latents, factor)
            z = equivariance.turned(equivariance.resized(z, small), turns)
            images = equivariance.turned(equivariance.resized(images, size), turns)
        return Seen(vae, images, moments, vae.features(z))

    def _likelihood(
        self, every: Params, images: jax.Array, made: jax.Array, logvar: jax.Array | float
    ) -> tuple[jax.Array, Aux]:
        """(-log p of pictures [b] but for constants, its parts), with LPIPS if it counts."""
        error = made - images
        error = jnp.abs(error) if self.config.loss == "l1" else jnp.square(error)
        error = jnp.mean(error, axis=(1, 2, 3))
        aux = {"reconstruction": error}
        if self.config.lpips_weight:
            lpips = self.networks.module(LPIPS_NETWORK, still(every))(made, still(images))
            aux["lpips"] = lpips
            error = error + self.config.lpips_weight * lpips
        nll = terms.negative_likelihood(error, logvar)
        if self.config.reduction == "sum":  # over pixels, to each of which LPIPS is added
            nll = nll * np.prod(images.shape[1:])
        return nll, aux

    def _judged(
        self, every: Params, seen: Seen, weights: jax.Array, step: jax.Array | int
    ) -> tuple[jax.Array, Aux]:
        """(likelihood [b], its parts), with the gradient of the critic's verdict too.

        The value leaves the verdict out. That has no scale of its own, and would look like a spike
        of the loss when it begins to count.
        """
        made, logvar = seen.vae.painted(seen.features), self._logvar(every)
        if not self.config.critic_weight:
            return self._likelihood(every, seen.images, made, logvar)
        fixed, images = still(made), still(seen.images)
        share = weights / len(weights)
        nll, pull, aux = jax.vjp(
            lambda made, logvar: self._likelihood(still(every), images, made, logvar),
            fixed, still(jnp.asarray(logvar)), has_aux=True,
        )  # fmt: skip
        slope, logvar_slope = pull(share)
        by_kernel = _by_last_kernel(seen)

        def judged() -> tuple[jax.Array, jax.Array, jax.Array]:
            critic = self.networks.module(CRITIC, still(every))
            verdict, pull = jax.vjp(lambda made: terms.generator_loss(critic(made)), fixed)
            (own,) = pull(share)
            weight = terms.adaptive_weight(by_kernel(slope), by_kernel(own))
            return verdict, weight, slope + self.config.critic_weight * weight * own

        def unjudged() -> tuple[jax.Array, jax.Array, jax.Array]:
            return jnp.zeros_like(nll), jnp.zeros(()), slope

        entered = jnp.asarray(step) >= self.config.critic_loss_start
        verdict, weight, slope = jax.lax.cond(entered, judged, unjudged)
        aux |= {"generator": verdict, "adaptive_weight": jnp.broadcast_to(weight, nll.shape)}
        at = (made, jnp.asarray(logvar))
        return terms.with_gradient(nll, weights, at, (slope, logvar_slope)), aux

    def _with_kl(self, values: jax.Array, aux: Aux, moments: jax.Array) -> tuple[jax.Array, Aux]:
        kl = terms.kl_divergence(moments)
        mean = moments[..., : moments.shape[-1] // 2]
        aux = {**aux, "kl": kl, "latent_std": jnp.std(mean, axis=(1, 2, 3))}
        return values + self.config.kl_weight * kl, aux

    def _logvar(self, every: Params) -> jax.Array | float:
        return every[LOGVAR] if self.config.learn_logvar else self.config.logvar

    def _of_a_variant(
        self,
        look: Callable[[Variant, jax.Array], Loss],
        own: Params,
        weights: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        """The loss of a batch by the variant that its step draws.

        Pictures have another size in each. So each has a program of its own, which computes the
        gradient too: JAX would otherwise keep what the gradients of all of them need.
        """
        config = self.config
        options = (config.equivariance, config.smaller_pictures)
        ways = equivariance.variants(*options, config.equivariance_scales)
        index, turns = equivariance.drawn(key, *options, len(config.equivariance_scales))
        if len(ways) == 1:
            return look(ways[0], turns)(own)

        def program(variant: Variant) -> Callable[[Params, jax.Array], Any]:
            def run(own: Params, turns: jax.Array) -> Any:
                def mean(own: Params) -> tuple[jax.Array, Any]:
                    values, aux = look(variant, turns)(own)
                    return jnp.mean(weights * values), (values, aux)

                gradient, (values, aux) = jax.grad(mean, has_aux=True)(own)
                return values, aux, gradient

            return run

        programs = [program(variant) for variant in ways]
        values, aux, gradient = jax.lax.switch(index, programs, still(own), turns)
        return terms.with_gradient(values, weights, own, gradient), aux


def _by_last_kernel(seen: Seen) -> Callable[[jax.Array], jax.Array]:
    """Return (gradient by made pictures) -> gradient by the kernel of the decoder's last layer."""
    layer, features = seen.vae.decoder.conv_out, still(seen.features)

    def made(kernel: jax.Array) -> jax.Array:
        return layer.product(features, kernel).astype(jnp.float32)

    pull = jax.vjp(made, still(layer.kernel[...]))[1]
    return lambda slope: pull(slope)[0]


def _apart(params: Params, own: Callable[[str], bool]) -> tuple[Params, Params]:
    """Return those whose path is `own`, and the others."""
    return (
        {path: value for path, value in params.items() if own(path)},
        {path: value for path, value in params.items() if not own(path)},
    )


def _weights(batch: Mapping[str, jax.Array]) -> jax.Array:
    """The weight of each example, [b]."""
    return batch.get("weight", jnp.ones(len(batch["image"])))
