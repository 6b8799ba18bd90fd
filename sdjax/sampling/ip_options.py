"""IP-Adapters and the pictures that they show, from the options of a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside.ip_adapter import IP_ADAPTER, check_encoder, features, no_features
from sdjax.formats.image_encoder import ImageEncoder, read_image_encoder
from sdjax.models import weights
from sdjax.models.clip_vision import CLIPVision
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.params import prefixed
from sdjax.sampling.control import Control, check, nothing_of
from sdjax.sampling.control_options import Read, of_each, parse
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
    controls = list(request.controls)
    picture, params = dict(request.picture), dict(request.params)
    for i, (option, files) in enumerate(zip(options, chosen, strict=True)):
        asked = parse(option, "--ip_adapter")
        config, own = read(asked.place)
        name, said = f"{IP_ADAPTER}{i}", f"--ip_adapter={asked.place}"
        if not isinstance(config, IPAdapterConfig):
            raise UserError(f"{said} is no IP-Adapter; a ControlNet is for --controlnet")
        check(request.model, config, said)
        check_encoder(config, tower.config, said)
        control = Control(name, config, asked.weight, asked.start, asked.stop)
        control.inside(request.plan.timesteps)  # a range without a step is an error now
        controls.append(control)
        made, none = seen(config, tower, files)
        picture[name] = made if len(made) == count else np.repeat(made, count, axis=0)
        picture[nothing_of(name)] = np.repeat(none, count, axis=0)
        params |= {path: jnp.asarray(value) for path, value in prefixed(own, name).items()}
    return dataclasses.replace(request, controls=tuple(controls), picture=picture, params=params)


def seen(
    config: IPAdapterConfig, tower: ImageEncoder, files: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what an IP-Adapter reads of pictures, [N, ...], and of none, [1, ...].

    Raises:
        UserError: a file is no picture.
    """
    pictures = [np.asarray(read_picture("--ip_image", file, None)) for file in files]
    pixels = np.stack([tower.preprocess.pixels(picture[None])[0] for picture in pictures])
    graph, _ = weights.abstract(CLIPVision, tower.config)

    @jax.jit
    def run(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = weights.merge(graph, params)
        return features(config, network, x), no_features(config, network)

    made, none = run(tower.params, pixels)
    return np.asarray(made), np.asarray(none)


def _check(options: Sequence[str], images: Sequence[str], encoder: str | None) -> None:
    for option, given in (("--ip_image", images), ("--image_encoder", encoder)):
        if given and not options:
            raise UserError(f"{option} is for --ip_adapter=FILE; give that too, or leave it out")
        if options and not given:
            raise UserError(
                "--ip_adapter takes a picture and the image tower that it was trained with: give "
                "--ip_image=FILE and --image_encoder=DIR"
            )
