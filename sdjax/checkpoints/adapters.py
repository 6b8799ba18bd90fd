"""Adapters that a command line names: --lora=FILE[:WEIGHT][:lbw=WEIGHT,WEIGHT,...].

FILE is a file, a folder or a workdir. The numbers of `lbw` multiply the weight for the text
encoders and each block of a denoiser, in the order of sd-webui-lora-block-weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from absl import logging

from sdjax.checkpoints import workdir as runs
from sdjax.checkpoints.widening import widened
from sdjax.errors import UserError
from sdjax.families.adapter_names import OUTSIDE, TEXT, by_block
from sdjax.families.family import AUTOENCODER, FOLLOWS, Model, said_task
from sdjax.formats.adapters.layers import Adapter
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.reading import adapter_task, entrance_inputs, read_adapter
from sdjax.formats.folders import folder_kind
from sdjax.sampling.start import counts
from sdjax.system import paths
from sdjax.system.untrusted import is_number

_BLOCKS = ":lbw="


def with_loras(model: Model, options: Sequence[str]) -> Model:
    """Return a model with the adapters of --lora in its weights, in their order.

    One that reads a picture beside the noisy latents, as the LoRAs of FLUX.1-Canny and -Kontext do,
    has a model that reads noisy latents alone read it too.

    Raises:
        UserError: an option is wrong, or an adapter does not fit the model.
    """
    model, loras = read_loras(model, options)
    return merged_loras(model, loras, [lora.weight for lora in loras])


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """An adapter that --lora names.

    option: as it was given; place: the file or folder; weight: of all of it.
    numbers: that multiply the weight in blocks; () for none.
    """

    option: str
    place: paths.Path
    weight: float
    numbers: tuple[float, ...]
    adapter: Adapter


def read_loras(model: Model, options: Sequence[str]) -> tuple[Model, list[Lora]]:
    """Return a model that the adapters of --lora fit, without them in its weights, and these.

    Raises:
        UserError: an option is wrong, or an adapter does not fit the model.
    """
    for option in options:
        model = _reading_a_picture(model, option)
    parsed = [(option, *parse_lora(option)) for option in options]
    return model, [Lora(*one, load_adapter(one[1], model)) for one in parsed]


def merged_loras(model: Model, loras: Sequence[Lora], weights: Sequence[float]) -> Model:
    """Return a model with adapters in its weights, in their order, each with a weight.

    Raises:
        UserError: an adapter does not fit the model.
    """
    if not loras:
        return model
    given = [
        (lora.adapter, _weights(lora.option, model, w, lora.numbers) if lora.numbers else w)
        for lora, w in zip(loras, weights, strict=True)
    ]
    return merged(model, given)


def _reading_a_picture(model: Model, option: str) -> Model:
    """The model, which reads a picture if an adapter was trained with one that reads it.

    One for FLUX.1-Kontext says so. The inputs of one that is to follow say it. Other adapters of
    models that fill or edit are made for these, and fit them alone.
    """
    place, family = parse_lora(option)[0], model.family
    own = model.networks.get(family.denoiser)
    if own is None or AUTOENCODER not in model.networks or not paths.exists(place):
        return model
    if is_run(place):
        trained = read_run(place)[0]
        task = said_task(trained)
        wanted = getattr(trained.networks.get(family.denoiser), "in_channels", 0)
    else:
        task, wanted = adapter_task(place, model), entrance_inputs(place, model)
    if task:
        model, note = widened(model, task, name=f"--lora={option}")
        if note:
            logging.warning(
                "%s, as the LoRA was trained. It fits the weights that it was trained on: if those "
                "were FLUX.1-Kontext's, give that as the model", note
            )  # fmt: skip
        return model
    count = next((count for count, task in counts(model).items() if task == FOLLOWS), 0)
    reads = family.latent_channels(own) > model.vae.latent_channels
    if not count or reads or wanted != family.widened(own, count).in_channels:
        return model
    return widened(model, FOLLOWS, name=f"--lora={option}")[0]


def parse_lora(option: str) -> tuple[paths.Path, float, tuple[float, ...]]:
    """Return (file or folder, weight, weights of blocks) of an option.

    The weight is 1 where none is said, and blocks have none of their own. A file whose name ends so
    comes first.

    Raises:
        UserError: a weight is no finite number.
    """
    if paths.exists(paths.to_path(option)):
        return paths.to_path(option), 1.0, ()
    rest, marked, listed = option.rpartition(_BLOCKS)
    blocks: tuple[float, ...] = ()
    if marked:
        blocks = tuple(_number(option, text) for text in listed.split(","))
    else:
        rest = option
    if paths.exists(paths.to_path(rest)):
        return paths.to_path(rest), 1.0, blocks
    place, colon, weight = rest.rpartition(":")
    if not colon or not _is_float(weight):
        return paths.to_path(rest), 1.0, blocks
    return paths.to_path(place), _number(option, weight), blocks


def _weights(
    option: str, model: Model, weight: float, numbers: tuple[float, ...]
) -> Callable[[str], float]:
    """The weight of a module by its path. UserError if the numbers are not those of the model."""
    family = model.family
    if family.adapters is None or family.adapters.blocks is None:
        raise UserError(
            f"--lora={option}: {family.title} has no weights of blocks; they are of SD1, SD2, "
            "SDXL and FLUX.1: give one weight"
        )
    lists = family.adapters.blocks(model.networks[family.denoiser])
    found = by_block(numbers, lists.weights, f"--lora={option}: lbw")

    def of_module(path: str) -> float:
        network, _, module = path.partition(".")
        denoises = network == family.denoiser
        block = lists.of(module) if denoises else lists.texts.get(network, TEXT)
        # As there: a short list leaves out all other blocks, and layers in no block have 1.
        return weight * (1.0 if block in OUTSIDE else found.get(block, 0.0))

    return of_module


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(option: str, text: str) -> float:
    if not _is_float(text) or not math.isfinite(float(text)):
        raise UserError(f"--lora={option}: the weight is {text}; expected a finite number")
    return float(text)


def load_adapter(path: paths.PathLike, model: Model) -> Adapter:
    """Return the adapter in a file, a folder, or the workdir of a run that trained one.

    Raises:
        ModelError: it cannot be read, or does not fit the model.
    """
    if is_run(path):
        return read_run(path)[1]
    return read_adapter(path, model)


def is_run(path: paths.PathLike) -> bool:
    """Whether a path is a workdir, or a checkpoint of one: no folder of a file."""
    folder = paths.to_path(path)
    inside = folder.parent.name == "checkpoints" and is_number(folder.name)
    return folder.is_dir() and (inside or (folder / "checkpoints").is_dir())


def read_run(
    path: paths.PathLike, weights: str = "ema", step: int | None = None
) -> tuple[Model, Adapter]:
    """Return (model without parameters, adapter) of a workdir or one of its checkpoints.

    Raises:
        ModelError, CheckpointError: it is no run of an adapter, or has no such weights or step.
    """
    folder = paths.to_path(path)
    assert folder_kind(folder) == "workdir"
    if folder.parent.name == "checkpoints" and is_number(folder.name):
        folder, step = folder.parents[1], int(folder.name)
    return runs.read_adapter_run(folder, weights, step)
