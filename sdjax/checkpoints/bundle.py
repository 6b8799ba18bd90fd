"""What is read from a folder and written to one: networks with their weights, and their context."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sdjax.checkpoints.scheduler_json import scheduler_from_diffusers, scheduler_to_diffusers
from sdjax.data.tokenizer import Tokenizer
from sdjax.diffusion.grids import SamplerConfig, changed_sampler
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.errors import UserError
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import VAE, VAEConfig
from sdjax.system import locks, paths, text_files
from sdjax.system.interrupts import at_end

NETWORKS: dict[str, tuple[Any, Any]] = {
    "unet": (UNet, UNetConfig),
    "vae": (VAE, VAEConfig),
    "text_encoder": (CLIPText, CLIPTextConfig),
    "text_encoder_2": (CLIPText, CLIPTextConfig),
}
# {text encoder: its tokenizer}, in the folders of diffusers and in `Pretrained`.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


# In a folder of a bucket from before its first file is written until after its last.
INCOMPLETE = "INCOMPLETE"


class PretrainedError(UserError):
    """A folder that cannot be read or written; the message names the files and the remedy."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Networks and what they were trained with; None for what the folder does not have.

    text_encoder_2: SDXL's second encoder, and the only one of its refiner.
    params: {path: float32 array}, paths start with the network, as in `unet.conv_in.bias`.
    sampler: how the folder says to sample; the nearest to it where `unsupported_sampler` says
        something.
    unsupported_sampler: the sampler that the folder asks for and sdjax does not have, or "".
    scheduler: the folder's scheduler_config.json, for a folder that is written of these.
    zero_empty_prompt: an empty negative prompt is zeros and not the encoding of "" (SDXL's
        `force_zeros_for_empty_prompt`).
    ignored: fields and parts of the folder that were not used, for the log.
    """

    unet: UNetConfig | None = None
    vae: VAEConfig | None = None
    text_encoder: CLIPTextConfig | None = None
    text_encoder_2: CLIPTextConfig | None = None
    schedule: ScheduleConfig | None = None
    prediction_type: str = "epsilon"
    sampler: SamplerConfig | None = None
    unsupported_sampler: str = ""
    scheduler: Mapping[str, Any] | None = None
    params: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    tokenizer_2: Tokenizer | None = None
    zero_empty_prompt: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def networks(self) -> dict[str, Any]:
        """{name: config} of the networks that are there."""
        return {name: getattr(self, name) for name in NETWORKS if getattr(self, name) is not None}

    def component(self, name: str) -> dict[str, np.ndarray]:
        """The parameters of one network, without its prefix."""
        prefix = name + "."
        return {p[len(prefix) :]: v for p, v in self.params.items() if p.startswith(prefix)}

    def scheduler_file(self) -> dict[str, Any]:
        """The scheduler_config.json of a folder: the one there was, if it still holds.

        Raises:
            ValueError: diffusers has no scheduler for this schedule and prediction type.
        """
        assert self.schedule
        if self.scheduler is not None:
            read = scheduler_from_diffusers(self.scheduler)
            if (read.schedule, read.prediction_type) == (self.schedule, self.prediction_type):
                return dict(self.scheduler)
        return scheduler_to_diffusers(self.schedule, self.prediction_type, self.sampler)

    def missing(self) -> list[str]:
        """What a pipeline has and these do not: each encoder comes with its tokenizer."""
        encoders = [name for name in TOKENIZERS if getattr(self, name) is not None]
        wanted = ["unet", "vae", *(encoders or ["text_encoder"]), "schedule"]
        wanted += [TOKENIZERS[name] for name in encoders] or ["tokenizer"]
        return [name for name in wanted if getattr(self, name) is None]


def choose_sampler(found: Pretrained, changes: Mapping[str, Any], model: str) -> SamplerConfig:
    """A model's own sampler with some fields changed.

    Args:
        found: the model.
        changes: {field of SamplerConfig: value}.
        model: where it is, for messages.

    Raises:
        UserError: the model's own sampler is asked for and sdjax does not have it, or a change
            makes no sense.
    """
    own = found.sampler or SamplerConfig()
    if found.unsupported_sampler and "name" not in changes:
        raise UserError(
            f"{model} is sampled with {found.unsupported_sampler}, which sdjax does not have; "
            f"choose another by --sampler, as --sampler={own.name}, the nearest to it"
        )
    return changed_sampler(own, changes)


def sampler_note(found: Pretrained, sampler: SamplerConfig, model: str) -> str:
    """A line that says what a model is drawn with in place of its own sampler, or ""."""
    if not found.unsupported_sampler:
        return ""
    return (
        f"note: {model} is sampled with {found.unsupported_sampler}, which sdjax does not have; "
        f"{sampler.name} draws instead"
    )


def check_components(components: Sequence[str]) -> None:
    """ValueError unless all are names of networks."""
    unknown = [name for name in components if name not in NETWORKS]
    if unknown:
        raise ValueError(f"components has {unknown}; expected some of {', '.join(NETWORKS)}")


def read_json(file: paths.Path) -> dict[str, Any]:
    """A JSON object. PretrainedError, naming the file, if it is none or not there."""
    try:
        content = text_files.read_json(file)
    except text_files.TextError as error:
        raise PretrainedError(f"{error}; is the folder whole?") from error
    if not isinstance(content, dict):
        raise PretrainedError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(file: paths.Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON."""
    paths.write_text(file, json.dumps(content, indent=2) + "\n")


@contextmanager
def _refilled(folder: paths.Path) -> Iterator[paths.Path]:
    """`replaced_folder` in a bucket, where a folder of many objects cannot be renamed at a stroke.

    The mark tells readers, and the next writer, of an end in between.
    """
    paths.make_folder(folder)
    (folder / INCOMPLETE).write_text("being written, or left so by a writer that was killed\n")
    for old in list(folder.iterdir()):
        if old.name != INCOMPLETE:
            paths.remove(old)
    try:
        with paths.explained_writes(folder):
            yield folder
    except BaseException:
        paths.remove(folder)
        raise
    (folder / INCOMPLETE).unlink()


@contextmanager
def replaced_folder(folder: paths.Path, *, overwrite: bool) -> Iterator[paths.Path]:
    """A new folder to write into, which becomes `folder` at the end, or vanishes on an error.

    Args:
        folder: may exist empty; with `overwrite` also with the networks of an earlier time, which
            are deleted once the new ones are complete.

    Raises:
        PretrainedError: `folder` has something in it that must not be deleted.
        UserError: it is in a bucket that cannot be reached.
    """
    if paths.exists(folder) and not folder.is_dir():
        raise PretrainedError(f"{folder} is a file; expected a new folder")
    if folder.is_dir() and any(not locks.is_lock(path) for path in folder.iterdir()):
        if not overwrite:
            raise PretrainedError(
                f"{folder} is not empty; choose another, or --force to replace it"
            )
        known = ("model_index.json", "config.json", INCOMPLETE)
        if not any((folder / name).exists() for name in known):
            raise PretrainedError(
                f"{folder} is neither a diffusers folder nor an sdjax workdir and is not replaced, "
                "by force either; choose another"
            )
    if paths.is_remote(folder):
        with _refilled(folder) as partial:
            yield partial
        return
    folder = folder.absolute()
    paths.make_folder(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")

    def clean_up(*signal: object) -> None:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if not complete:
            _remove_for_good(partial)
        paths.remove(old)

    complete = False
    try:
        with at_end(clean_up), paths.explained_writes(folder):
            partial.mkdir()
            yield partial
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            complete = True
    finally:
        clean_up()


def _remove_for_good(folder: paths.Path) -> None:
    """Delete a folder that threads of a save that failed may make again, up to 0.3 s later."""
    absent = 0
    for _ in range(20):
        absent = 0 if folder.exists() else absent + 1
        if absent == 4:
            break
        paths.remove(folder)
        time.sleep(0.1)
