"""ControlNets, T2I-Adapters and their condition pictures, from the options of a command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside.t2i_adapter import check_size
from sdjax.families.family import FOLLOWS, Model
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.params import prefixed
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.sampling.control import Control, SteeringConfig, check, name_of
from sdjax.sampling.pictures import read_picture, read_pictures, shown
from sdjax.sampling.request import SamplingRequest
from sdjax.sampling.start import reads_picture
from sdjax.system import paths


class Asked(NamedTuple):
    """The words of --controlnet: where the network lies, and how it steers; see `Control`."""

    place: str
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0


class Read(Protocol):
    """Reads a ControlNet or a T2I-Adapter."""

    def __call__(self, place: str) -> tuple[SteeringConfig, Mapping[str, np.ndarray]]:
        """Return its config and {path: array}.

        Raises:
            UserError: there is none.
        """


def parse(text: str, option: str = "--controlnet") -> Asked:
    """Return what "DIR[:WEIGHT[:START:END]]" asks for; a path that exists is one, as it stands.

    Raises:
        UserError: it has one number too few.
    """
    if paths.exists(paths.to_path(text)):
        return Asked(text)
    place, *words = text.rsplit(":", 3)
    numbers = [_number(word) for word in words]
    if len(numbers) == 3 and None not in numbers:
        return Asked(place, *numbers)  # type: ignore[arg-type]
    if len(numbers) >= 2 and None not in numbers[-2:]:
        raise UserError(
            f"{option}={text} ends in two numbers; expected PLACE, PLACE:WEIGHT or "
            "PLACE:WEIGHT:START:END"
        )
    if numbers and numbers[-1] is not None:
        return Asked(text.rpartition(":")[0], numbers[-1])
    return Asked(text)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def with_controls(
    request: SamplingRequest,
    options: Sequence[str],
    images: Sequence[str],
    guess: bool,
    read: Read,
) -> SamplingRequest:
    """Return a request whose pictures ControlNets and T2I-Adapters steer.

    Args:
        options, images: of --controlnet and --control_image.
        guess: of --guess_mode.

    Raises:
        UserError: options do not go together, or a network is not for this model.
    """
    factor, count = request.model.vae.downscale, len(request.texts)
    size = request.shape[0] * factor, request.shape[1] * factor
    if reads_picture(request.model) == FOLLOWS:
        _check_followed(request, options, images, guess)
        return shown(request, read_pictures(images, count, size, option="--control_image"))
    _check(options, images, guess)
    if not options:
        return request
    chosen = of_each(images, len(options), count)
    steering = read_controls(request.model, options, guess, read)
    check_drawn(steering.controls, size, request.plan.timesteps)
    picture = dict(request.picture)
    for control, files in zip(steering.controls, chosen, strict=True):
        made = [np.asarray(read_picture("--control_image", f, size), np.float32) for f in files]
        picture[control.name] = np.stack(made * (count if len(made) == 1 else 1)) / 255
    params = {path: jnp.asarray(value) for path, value in steering.params.items()}
    return dataclasses.replace(
        request, controls=steering.controls, picture=picture, params={**request.params, **params}
    )


class Steering(NamedTuple):
    """Networks that steer a model, and {path: array} of their parameters."""

    controls: tuple[Control, ...]
    params: dict[str, np.ndarray]


def read_controls(model: Model, options: Sequence[str], guess: bool, read: Read) -> Steering:
    """Return the ControlNets and T2I-Adapters of --controlnet.

    Args:
        guess: of --guess_mode.

    Raises:
        UserError: a network is not for this model, or options do not go together.
    """
    controls: list[Control] = []
    params: dict[str, np.ndarray] = {}
    for i, asked in enumerate(map(parse, options)):
        config, own = read(asked.place)
        if isinstance(config, IPAdapterConfig):
            raise UserError(f"--controlnet={asked.place} is an IP-Adapter; give it as --ip_adapter")
        check(model, config, f"--controlnet={asked.place}")
        name = f"{name_of(config)}{i}"
        own_guess = guess and not isinstance(config, T2IAdapterConfig)
        controls.append(Control(name, config, asked.weight, asked.start, asked.stop, own_guess))
        params |= prefixed(own, name)
    if options and guess and not any(control.guess for control in controls):
        raise UserError("--guess_mode is for ControlNets, and there is none; leave it out")
    return Steering(tuple(controls), params)


def check_drawn(controls: Sequence[Control], size: tuple[int, int], timesteps: np.ndarray) -> None:
    """Check that networks steer pictures of a size (height, width) at some of the timesteps.

    Raises:
        UserError: a T2I-Adapter has no map for the size, or no step lies in a range.
    """
    for control in controls:
        if isinstance(control.config, T2IAdapterConfig):
            check_size(control.config, size, control.title)
        control.inside(timesteps)


def _check_followed(
    request: SamplingRequest, options: Sequence[str], images: Sequence[str], guess: bool
) -> None:
    """Check the options for a model that follows a picture by itself, as FLUX.1-Canny-dev."""
    name = request.model.family.denoiser
    if not images:
        raise UserError(f"the {name} follows a picture; give --control_image=FILE")
    if options or guess:
        given = "--controlnet" if options else "--guess_mode"
        raise UserError(f"the {name} follows a picture by itself; leave {given} out")


def _check(options: Sequence[str], images: Sequence[str], guess: bool) -> None:
    for option, given in (("--control_image", images), ("--guess_mode", guess)):
        if given and not options:
            raise UserError(f"{option} is for --controlnet=DIR; give that too, or leave it out")
    if options and not images:
        raise UserError("--controlnet takes a picture that steers; give --control_image=FILE")


def of_each(
    images: Sequence[str],
    networks: int,
    count: int,
    *,
    options: tuple[str, str] = ("--control_image", "--controlnet"),
) -> list[Sequence[str]]:
    """Return the files of each network: one for all prompts, or one for each.

    Args:
        options: of files and networks, for messages.

    Raises:
        UserError: there are neither as many.
    """
    if len(images) == networks:
        return [[file] for file in images]
    if len(images) == networks * count:
        return [images[i * count : (i + 1) * count] for i in range(networks)]
    raise UserError(
        f"{options[0]} is given {len(images)} times for {networks} of {options[1]} and {count} "
        f"prompts; expected {networks}, or {networks * count}: those of the first network, then of "
        "the next"
    )


def control_settings(args: argparse.Namespace, *, number: int, count: int) -> dict[str, Any]:
    """Return the settings that the file of a picture carries of what steers it.

    Args:
        number: of the picture, among `count`.
    """
    found: dict[str, Any] = {}
    for network, image in (("controlnet", "control_image"), ("ip_adapter", "ip_image")):
        if given := getattr(args, network):
            chosen = of_each(getattr(args, image), len(given), count)
            found |= {network: given, image: [files[number % len(files)] for files in chosen]}
    if args.control_image and not args.controlnet:
        found["control_image"] = args.control_image[number % len(args.control_image)]
    return found | ({"guess_mode": args.guess_mode} if args.controlnet else {})
