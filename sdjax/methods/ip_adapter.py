"""IP-Adapter: a frozen UNet learns to see a picture beside the words, by attention of its own.

Ye et al. 2023 (arXiv:2308.06721), and tutorial_train.py of its authors. A frozen CLIP image tower
gives features of the picture; what is trained makes words of them, and keys and values for each
cross-attention, which start as those of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.clip_pixels import ClipPreprocess, clip_pixels
from sdjax.data.config import is_encoded
from sdjax.diffusion.losses import caption_draws
from sdjax.errors import UserError
from sdjax.families.beside.ip_adapter import (
    IMAGE_ENCODER,
    IP_ADAPTER,
    check_encoder,
    crossings,
    features,
    no_features,
    with_ip_adapter,
)
from sdjax.families.beside.unets import plain_unet
from sdjax.families.family import Context, Model, Networks
from sdjax.methods.beside import exporting, of_network, read_start
from sdjax.methods.denoise import (
    MASK,
    Denoiser,
    LatentDiffusion,
    MakeDenoiser,
    Watched,
    bound,
    latent_diffusion,
)
from sdjax.methods.drawings import make_drawing
from sdjax.methods.fields import picture_fields
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Examples,
    Kind,
    Method,
    MethodConfig,
    Pictures,
    Setup,
)
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.params import Params, prefixed
from sdjax.parallel.sharding import to_host
from sdjax.sampling.control import Control, nothing_of
from sdjax.sampling.generate import to_uint8
from sdjax.system import paths

REFERENCE = "reference"  # the picture of data.images that is seen, instead of the main one
FEATURES = "image_features"  # of a batch, [b, (N,) embedding_dim]
FOLDER = "ip_adapter"  # in the workdir, at the end


@dataclasses.dataclass(frozen=True)
class IPAdapterMethodConfig(MethodConfig):
    """Training of an IP-Adapter.

    objective.caption_dropout is the share of examples that lose their caption, alone or with the
    picture.
    """

    name: str = "ip_adapter"
    image_encoder_from: str = ""  # the folder of a CLIP image tower, which is not trained
    # Its projection_dim: 1024 of ViT-H/14, 1280 of ViT-bigG/14. With a resampler its hidden_size.
    embedding_dim: int = 1024
    image_tokens: int = 4  # words that a picture becomes; published Plus has 16
    resampler_layers: int = 0  # of IP-Adapter Plus, which sees patches: 4; 0 is the plain form
    resampler_width: int = 0  # of these, a multiple of 64; 0 is the width of the text features
    image_dropout: float = 0.05  # share of examples that lose their picture alone
    both_dropout: float = 0.05  # share of those that lose picture and caption
    adapter_from: str = ""  # a file to go on with; "" starts with the UNet's own keys and values

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "image_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("image_dropout", "both_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected 0 to 1")


def network_config(model: Model, config: IPAdapterMethodConfig) -> IPAdapterConfig:
    """Return the shape of the IP-Adapter that a run trains.

    Raises:
        UserError: the model has no UNet that reads latents and words alone.
    """
    unet = plain_unet(model, "method 'ip_adapter'")
    widths = tuple(width for _, width in crossings(unet))
    layers, width = config.resampler_layers, config.resampler_width
    try:
        return IPAdapterConfig(
            config.embedding_dim,
            unet.cross_attention_dim,
            config.image_tokens,
            widths,
            resampler_layers=layers,
            resampler_width=width or (unet.cross_attention_dim if layers else 0),
        )
    except ValueError as error:
        raise UserError(f"method: {error}") from error


def steered(networks: Networks) -> MakeDenoiser:
    """Return what gives the UNet of a batch, to which the batch's pictures are shown."""

    def make_denoiser(every: Params, batch: Batch) -> Denoiser:
        unet = networks.module(networks.family.denoiser, every)
        shown = networks.module(IP_ADAPTER, every)(batch[FEATURES])
        images = tuple((pair,) for pair in shown)

        def denoise(
            xt: jax.Array, t: jax.Array, context: Context, *, key: jax.Array | None = None
        ) -> jax.Array:
            return unet(xt, t, context, key=key, images=images)

        return denoise

    return make_denoiser


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """The features of a batch's pictures, by the frozen tower."""

    networks: Networks
    preprocess: ClipPreprocess

    def __call__(self, every: Params, batch: Batch) -> Batch:
        """Return a batch that has FEATURES."""
        side = self.networks.configs[IMAGE_ENCODER].image_size
        # The main picture is in [-1, 1], a condition in [0, 1].
        images = batch[REFERENCE] if REFERENCE in batch else batch["image"] / 2 + 0.5
        pixels = clip_pixels(images, side, mean=self.preprocess.mean, std=self.preprocess.std)
        tower = self.networks.module(IMAGE_ENCODER, every)
        made = features(self.networks.configs[IP_ADAPTER], tower, pixels)
        return {**batch, FEATURES: jax.lax.stop_gradient(made)}

    def nothing(self, every: Params) -> jax.Array:
        """Return the features of no picture, [1, ...]."""
        tower = self.networks.module(IMAGE_ENCODER, every)
        return jax.lax.stop_gradient(no_features(self.networks.configs[IP_ADAPTER], tower))


def dropped(config: IPAdapterMethodConfig, captions: float, keys: jax.Array) -> jax.Array:
    """Return which examples lose their picture, bool [b].

    They are those of c - b <= u < c + i, where u takes the caption if u < c: b lose both, i the
    picture alone, c - b the caption alone.

    Args:
        captions: c, the share that loses its caption.
    """
    u = caption_draws(keys)
    return (u >= captions - config.both_dropout) & (u < captions + config.image_dropout)


def first_values(
    config: IPAdapterMethodConfig, network: IPAdapterConfig, model: Model,
    loaded: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return what an IP-Adapter starts with: the UNet's keys and values, or another adapter.

    Args:
        loaded: {path: array} of the networks of the model.

    Raises:
        UserError: `adapter_from` is not of the shape that the recipe says.
    """
    if not config.adapter_from:
        found = {}
        unet = plain_unet(model, "method 'ip_adapter'")
        for i, (path, _) in enumerate(crossings(unet)):
            for ours, theirs in (("to_k_ip", "to_k"), ("to_v_ip", "to_v")):
                kernel = loaded.get(f"{model.family.denoiser}.{path}.{theirs}.kernel")
                if kernel is not None:
                    found[f"{IP_ADAPTER}.ip_adapter.{i}.{ours}.kernel"] = kernel
        return found
    from sdjax.formats.ip_adapter import read_ip_adapter_file

    return read_start(
        IP_ADAPTER, "method.adapter_from", config.adapter_from, read_ip_adapter_file, network,
        hint="tokens is method.image_tokens, and embedding_dim and those of the resampler are "
        "fields of the method too",
    )  # fmt: skip


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: the model has no such UNet, no image tower is named or it has other features,
            shares of dropped examples do not go together, or the data has no pixels to see.
    """
    from sdjax.formats.image_encoder import read_image_encoder

    config, model = setup.config, setup.model
    network = network_config(model, config)
    _check(setup)
    folder = paths.to_path(config.image_encoder_from)
    encoder, preprocess, _ = read_image_encoder(folder, with_weights=False)
    check_encoder(network, encoder, "method.embedding_dim: the IP-Adapter")
    whole = with_ip_adapter(model, network, encoder)
    diffusion = latent_diffusion(
        setup, whole, denoiser=steered, watched=Watched(IP_ADAPTER, (FEATURES,), alone=True)
    )
    seen = Seen(diffusion.networks, preprocess)
    images = picture_fields(setup, optional={REFERENCE: "condition", MASK: "mask"})
    trains = of_network(IP_ADAPTER)
    pictures = _pictures(setup, network, seen)
    method = bound(diffusion, images=images, pictures=pictures, gallery=True, trains=trains)

    def start(loaded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tower = prefixed(read_image_encoder(folder).params, IMAGE_ENCODER)
        return tower | first_values(config, network, model, loaded)

    def write(folder: paths.Path, params: Mapping[str, np.ndarray]) -> paths.Path:
        """The file that diffusers' `load_ip_adapter` reads."""
        from sdjax.formats.ip_adapter import write_ip_adapter

        return write_ip_adapter(folder, params)

    def sees(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda every, batch, *rest: function(every, seen(every, batch), *rest)

    return dataclasses.replace(
        method,
        phases=(dataclasses.replace(method.phases[0], loss=_loss(diffusion, seen)),),
        validate=sees(diffusion.validate),
        maxima=sees(diffusion.maxima),
        predictions=method.predictions and sees(diffusion.predictions),
        start=start,
        brought={IMAGE_ENCODER: ("method.image_encoder_from", config.image_encoder_from)},
        export=exporting(IP_ADAPTER, FOLDER, write),
    )


def _check(setup: Setup) -> None:
    config, captions = setup.config, setup.objective.caption_dropout
    if not config.image_encoder_from:
        raise UserError(
            "method.image_encoder_from is empty; name the folder of a CLIP image tower "
            "(CLIPVisionModelWithProjection), as models/image_encoder beside the IP-Adapters on "
            "huggingface.co"
        )
    if config.both_dropout > captions or captions + config.image_dropout > 1:
        raise UserError(
            f"objective.caption_dropout is {captions}, method.both_dropout {config.both_dropout} "
            f"and method.image_dropout {config.image_dropout}; expected both_dropout to be a part "
            "of caption_dropout, and caption_dropout + image_dropout to be at most 1"
        )
    if is_encoded(setup.data) and REFERENCE not in {one.name for one in setup.data.images}:
        raise UserError(
            "data.name is 'encoded', which has no pixels of the main picture for the image tower; "
            f"encode the data with a condition {REFERENCE!r} among data.images, or train on the "
            "pictures"
        )


def _loss(diffusion: LatentDiffusion, seen: Seen) -> Callable[..., tuple[jax.Array, Aux]]:
    """Return the loss, for which some examples lose their picture; see `LossFn`."""
    config, captions = diffusion.setup.config, diffusion.setup.objective.caption_dropout

    def loss(
        trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        every = {**frozen, **trained}
        shown = dict(seen(every, batch))
        gone = dropped(config, captions, draw.keys)
        gone = gone.reshape(-1, *[1] * (shown[FEATURES].ndim - 1))  # [b, 1, ...]
        shown[FEATURES] = jnp.where(gone, seen.nothing(every), shown[FEATURES])
        return diffusion.loss(trained, frozen, averages, shown, draw)

    return loss


def _pictures(setup: Setup, network: IPAdapterConfig, seen: Seen) -> Pictures:
    """Drawing that shows what is seen on the left, and the result on the right."""
    drawn = make_drawing(setup, (Control(IP_ADAPTER, network),))
    read = jax.jit(lambda params, batch: (seen(params, batch)[FEATURES], seen.nothing(params)))

    def pictures(
        params: Mapping[str, jax.Array], examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        named = examples.named.get(REFERENCE)
        batch = {"image": examples.images} if named is None else {REFERENCE: named}
        own = {path: v for path, v in params.items() if path.startswith(f"{IMAGE_ENCODER}.")}
        made, none = map(to_host, read(own, batch))
        none = np.repeat(none, len(made), axis=0)
        picture = {IP_ADAPTER: made, nothing_of(IP_ADAPTER): none}
        images = drawn(params, examples, seed, guided=guided, picture=picture)
        left = examples.images / 2 + 0.5 if named is None else named
        return np.concatenate([to_uint8(left), images], axis=2)

    return pictures


IP = Kind(
    config=IPAdapterMethodConfig,
    make=make,
    networks=tuple,
    draws=True,
    steers={"--ip_adapter": "", "--ip_image": "FILE", "--image_encoder": "DIR"},
)
