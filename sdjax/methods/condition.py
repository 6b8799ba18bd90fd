"""A denoiser that reads the latents of a picture that it follows: edges, depth, poses.

FLUX.1-Canny and -Depth read the condition as channels beside the noisy latents, and so does what
train_control_flux.py of diffusers trains from FLUX.1-dev. There is no further network, as a
ControlNet is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from sdjax.diffusion.losses import fold_keys, normal_like
from sdjax.families.bind import bind
from sdjax.families.family import FOLLOWS, Networks
from sdjax.methods.denoise import MASK, DenoiseConfig, bound, latent_diffusion
from sdjax.methods.drawings import make_drawing
from sdjax.methods.fields import picture_fields
from sdjax.methods.inputs import Inputs, reading_for
from sdjax.methods.method import Batch, Examples, Kind, Method, Pictures, Setup
from sdjax.models.params import Params
from sdjax.models.vae import sample_moments, scale_latents
from sdjax.parallel.sharding import to_host

FOLLOWED = "control"  # the picture of data.images that is followed, as for a ControlNet
# The stream of the noise that chooses a sample of the condition's latents, beyond those of the
# validation's strata.
LATENTS = 2**15 + 2


@dataclasses.dataclass(frozen=True)
class ConditionConfig(DenoiseConfig):
    """Training of a denoiser that reads the latents of a condition.

    Raises ValueError where a field is out of its range.
    """

    name: str = "condition"
    # The strength of guidance that the denoiser reads in training, if it reads one. FLUX.1-Canny
    # and -Depth draw with 30 and 10, and train_control_flux.py has 30.
    guidance: float = 30.0

    def __post_init__(self) -> None:
        if not self.guidance >= 0:
            raise ValueError(f"method.guidance is {self.guidance}; expected 0 or more")


def latents_of(networks: Networks, every: Params, batch: Batch, keys: jax.Array) -> jax.Array:
    """Return latents of the condition, [b, h, w, C], a sample each; see `MakeInputs`."""
    vae = networks.module("vae", every)
    moments = vae.encode(2.0 * batch[FOLLOWED] - 1.0)
    noise = normal_like(fold_keys(keys, LATENTS), moments[..., : vae.config.latent_channels])
    return scale_latents(sample_moments(moments, noise), vae.config)


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: the denoiser reads no such picture, or data.images has no condition.
    """
    inputs = Inputs(reading_for(setup, FOLLOWS), latents_of)
    images = picture_fields(setup, required={FOLLOWED: "condition"}, optional={MASK: "mask"})
    diffusion = latent_diffusion(setup, inputs=inputs, guidance=setup.config.guidance)
    return bound(diffusion, images=images, pictures=_pictures(setup), gallery=True)


def _pictures(setup: Setup) -> Pictures:
    """Drawing of what follows the conditions, which stand beside it (`gallery`)."""
    drawn = make_drawing(setup)
    networks = bind(setup.model, ("vae",), dtype=setup.dtype)

    @jax.jit
    def prepared(params: Params, condition: jax.Array, keys: jax.Array) -> jax.Array:
        return latents_of(networks, params, {FOLLOWED: condition}, keys)

    def pictures(
        params: Mapping[str, jax.Array], examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        condition = examples.named[FOLLOWED]
        own = {path: value for path, value in params.items() if path.startswith("vae.")}
        keys = jax.random.split(jax.random.key(seed), len(condition))
        channels = to_host(prepared(own, condition, keys))
        return drawn(params, examples, seed, guided=guided, picture={"channels": channels})

    return pictures


CONDITION = Kind(
    config=ConditionConfig,
    make=make,
    networks=tuple,
    draws=True,
    task=FOLLOWS,
    sample="--control_image=FILE",
)
