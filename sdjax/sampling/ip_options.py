"""IP-Adapters and the pictures that they show, from the options of a command line."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside.ip_adapter import IP_ADAPTER, check_encoder, features, no_features
from sdjax.families.family import Model
from sdjax.formats.image_encoder import ImageEncoder, read_image_encoder
from sdjax.models import weights
from sdjax.models.clip_vision import CLIPVision
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.params import prefixed
from sdjax.sampling.control import Control, check, nothing_of
from sdjax.sampling.control_options import Read, Steering, of_each, parse
from sdjax.sampling.pictures import read_picture
from sdjax.sampling.request import SamplingRequest
from sdjax.system import paths

_OPTIONS = ("--ip_image", "--ip_adapter")


def with_ip_adapters(
    request: SamplingRequest,
    options: Sequence[str],
    images: Sequence[str],
    encoder: str | None,
    read: Read,
) -> SamplingRequest:
    """Return a request whose pictures see others by IP-Adapters.

    Args:
        options, images, encoder: of --ip_adapter, --ip_image and --image_encoder.

    Raises:
        UserError: options do not go together, or an adapter is not for this model or this encoder.
    """
    _check(options, images, encoder)
    if not options or encoder is None:
        return request
    tower, count = read_image_encoder(paths.to_path(encoder)), len(request.texts)
    chosen = of_each(images, len(options), count, options=_OPTIONS)
    steering = read_ip_adapters(request.model, options, tower, read)
    picture = dict(request.picture)
    sights = sights_of(steering.controls, tower)
    for control, files in zip(steering.controls, chosen, strict=True):
        control.inside(request.plan.timesteps)  # a range without a step is an error now
        pictures = [np.asarray(read_picture("--ip_image", file, None)) for file in files]
        made, none = sights[control.name](pictures)
        picture[control.name] = made if len(made) == count else np.repeat(made, count, axis=0)
        picture[nothing_of(control.name)] = np.repeat(none, count, axis=0)
    params = {path: jnp.asarray(value) for path, value in steering.params.items()}
    return dataclasses.replace(
        request,
        controls=(*request.controls, *steering.controls),
        picture=picture,
        params={**request.params, **params},
    )


def read_ip_adapters(
    model: Model, options: Sequence[str], tower: ImageEncoder, read: Read
) -> Steering:
    """Return the networks of --ip_adapter.

    Raises:
        UserError: one is not for this model or this image tower.
    """
    controls: list[Control] = []
    params: dict[str, np.ndarray] = {}
    for i, option in enumerate(options):
        asked = parse(option, "--ip_adapter")
        config, own = read(asked.place)
        name, said = f"{IP_ADAPTER}{i}", f"--ip_adapter={asked.place}"
        if not isinstance(config, IPAdapterConfig):
            raise UserError(f"{said} is no IP-Adapter; a ControlNet is for --controlnet")
        check(model, config, said)
        check_encoder(config, tower.config, said)
        controls.append(Control(name, config, asked.weight, asked.start, asked.stop))
        params |= prefixed(own, name)
    return Steering(tuple(controls), params)


@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """The image tower of an IP-Adapter, from pictures to what the adapter reads of them."""

    config: IPAdapterConfig
    tower: ImageEncoder

    def __call__(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of pictures uint8 [H, W, 3], [N, ...], and of none, [1, ...]."""
        prepare = self.tower.preprocess.pixels
        pixels = np.stack([prepare(picture[None])[0] for picture in pictures])
        made, none = self._program(pixels)
        return np.asarray(made), np.asarray(none)

    @functools.cached_property
    def _program(self) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
        graph, _ = weights.abstract(CLIPVision, self.tower.config)

        @jax.jit
        def run(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
            network = weights.merge(graph, params)
            return features(self.config, network, x), no_features(self.config, network)

        own = {path: jnp.asarray(value) for path, value in self.tower.params.items()}
        return functools.partial(run, own)


def sights_of(controls: Sequence[Control], tower: ImageEncoder) -> dict[str, Sight]:
    """Return {name: what it sees} of IP-Adapters."""
    return {
        control.name: Sight(control.config, tower)
        for control in controls
        if isinstance(control.config, IPAdapterConfig)
    }


def _check(options: Sequence[str], images: Sequence[str], encoder: str | None) -> None:
    for option, given in (("--ip_image", images), ("--image_encoder", encoder)):
        if given and not options:
            raise UserError(f"{option} is for --ip_adapter=FILE; give that too, or leave it out")
        if options and not given:
            raise UserError(
                "--ip_adapter takes a picture and the image tower that it was trained with: give "
                "--ip_image=FILE and --image_encoder=DIR"
            )
