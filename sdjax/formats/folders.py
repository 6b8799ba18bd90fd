"""The parts that all folders and files of models share: error, JSON, kinds, replacing a folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.families.registry import NETWORKS
from sdjax.formats.scheduler_json import scheduler_from_diffusers, scheduler_to_diffusers
from sdjax.system import locks, paths, text_files
from sdjax.system.interrupts import at_end
from sdjax.system.untrusted import is_number

# In a folder of a bucket from before its first file is written until after its last.
INCOMPLETE = "INCOMPLETE"


class ModelError(UserError):
    """A folder that cannot be read or written; the message names the files and the remedy."""


def scheduler_file(model: Model) -> dict[str, Any]:
    """Return the scheduler_config.json of a model: the one it came with, if that still holds.

    A model that was distilled to few steps is drawn by its own sampler.

    Raises:
        ValueError: diffusers has no scheduler for this schedule and prediction type.
    """
    assert model.schedule
    if model.scheduler is not None:
        read = scheduler_from_diffusers(model.scheduler)
        same = (read.schedule, read.prediction_type) == (model.schedule, model.prediction_type)
        distilled = model.sampler is not None and model.sampler.few_steps
        if same and not (distilled and read.sampler != model.sampler):
            return dict(model.scheduler)
    return scheduler_to_diffusers(model.schedule, model.prediction_type, model.sampler)


def check_components(components: Sequence[str]) -> None:
    """ValueError unless all are names of networks."""
    unknown = [name for name in components if name not in NETWORKS]
    if unknown:
        raise ValueError(f"components has {unknown}; expected some of {', '.join(NETWORKS)}")


def read_json(file: paths.Path) -> dict[str, Any]:
    """A JSON object. ModelError, naming the file, if it is none or not there."""
    try:
        content = text_files.read_json(file)
    except text_files.TextError as error:
        raise ModelError(f"{error}; is the folder whole?") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(file: paths.Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON."""
    paths.write_text(file, json.dumps(content, indent=2) + "\n")


def folder_kind(path: paths.Path) -> str:
    """ "diffusers", "workdir" or "single_file". ModelError, with the reason, if none."""
    if not paths.exists(path):
        raise ModelError(f"{path}: no such folder or file")
    if not path.is_dir():
        if path.suffix == ".safetensors":
            return "single_file"
        raise ModelError(
            f"{path} is a file; expected a diffusers folder (model_index.json, unet/, ...), an "
            "sdjax workdir, or a single .safetensors file. A .ckpt is a pickle, which can run code "
            "and is not read: save it as safetensors where torch is installed"
        )
    if (path / INCOMPLETE).exists():
        raise ModelError(
            f"{path} is incomplete: whatever wrote it was interrupted (it holds {INCOMPLETE}); "
            "write it again"
        )
    if (path / "model_index.json").is_file():
        return "diffusers"
    if (path / "checkpoints").is_dir() or (
        path.parent.name == "checkpoints" and is_number(path.name)
    ):
        return "workdir"
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if "method" in config:
            return "workdir"
        if "_class_name" in config or "model_type" in config or "architectures" in config:
            return "diffusers"
    has = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise ModelError(
        f"{path} is neither a diffusers folder (no model_index.json, no network's config.json) nor "
        f"an sdjax workdir (no checkpoints/). It has: {has}"
    )


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
        ModelError: `folder` has something in it that must not be deleted.
        UserError: it is in a bucket that cannot be reached.
    """
    if paths.exists(folder) and not folder.is_dir():
        raise ModelError(f"{folder} is a file; expected a new folder")
    if folder.is_dir() and any(not locks.is_lock(path) for path in folder.iterdir()):
        if not overwrite:
            raise ModelError(f"{folder} is not empty; choose another, or --force to replace it")
        known = ("model_index.json", "config.json", INCOMPLETE)
        if not any((folder / name).exists() for name in known):
            raise ModelError(
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
