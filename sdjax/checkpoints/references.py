"""Frozen networks by reference: DIR/frozen.json says where a run read what it does not train.

    {"vae": {"field": "vae_from", "path": "/models/sd15", "step": null, "weights": "",
             "digest": "sha256:...", "parameters": 83653863}}

So no fine-tune copies gigabytes of a VAE and of text encoders. Whoever reads the workdir reads the
network there, and believes it only if its digest is the one that the run began with. The file
stands beside config.json, since that holds a recipe's own fields: a digest is not one of them.

A run copies a network into DIR/frozen.safetensors where a reference would not last or reach: with
`train.bundle_frozen`, from a checkpoint that its run may still delete, and where either the network
or the workdir is in a bucket and the other is not. A workdir whose network is itself a reference
passes on that reference, so none leads to another.

A stranger may have written the file (SECURITY.md): it makes `follow` read a network as from any
other folder, and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.folders import ModelError, folder_kind, read_json, write_json
from sdjax.formats.image_encoder import read_image_encoder
from sdjax.formats.single_file import PARAMETERS, read_single_file
from sdjax.formats.vgg16 import read_lpips
from sdjax.models.config import ConfigError
from sdjax.models.params import component, prefixed
from sdjax.system import paths, progress
from sdjax.system.untrusted import brief, explained
from sdjax.typed_tree import build, to_dict

REFERENCES_FILE = "frozen.json"
FIELDS = ("init_from", "vae_from", "text_encoder_from")  # in the order in which they decide
# Of methods, for networks that no family has, and what reads one under a name: folders of CLIP
# image towers, and files of VGG16.
BROUGHT: Mapping[str, Callable[[str, paths.Path], dict[str, np.ndarray]]] = {
    "method.image_encoder_from": lambda name, folder: prefixed(
        read_image_encoder(folder).params, name
    ),
    "method.lpips_from": read_lpips,
}
TINY = "tiny"  # the path of the VAE shipped with sdjax, wherever that is installed
TINY_VAE = Path(__file__).parents[1] / "models" / "tiny_vae"
_DIGEST = re.compile("sha256:[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Source:
    """The place of a network's weights.

    field: of the recipe, one of `FIELDS` or `BROUGHT`, which named it.
    path: of a diffusers folder, workdir or single file: absolute, gs://..., or `TINY`.
    step, weights: of a workdir, the checkpoint and which of its averages; None and "" otherwise.
    """

    field: str = ""
    path: str = ""
    step: int | None = None
    weights: str = ""

    def __post_init__(self):
        known = (*FIELDS, *BROUGHT)
        if self.field not in known:
            raise ValueError(f"field is {brief(self.field)}; expected one of {', '.join(known)}")
        if self.path != TINY and not self.path.startswith(("/", "gs://")):
            raise ValueError(f"path is {brief(self.path)}; expected an absolute one, or {TINY!r}")

    @property
    def place(self) -> paths.Path:
        """The path to read from."""
        return paths.to_path(TINY_VAE if self.path == TINY else self.path)

    def reaches(self, folder: paths.Path) -> bool:
        """Whether a workdir may refer to it: both lie on disks, or both in buckets."""
        return self.path == TINY or paths.is_remote(self.path) == paths.is_remote(folder)


@dataclasses.dataclass(frozen=True)
class Reference(Source):
    """A network of a run that lies elsewhere.

    digest: of all its parameters, see `digest`.
    parameters: how many of its values the run does not train.
    network: its name where it lies, if the run has it as a copy under another name; "" otherwise.
    """

    digest: str = ""
    parameters: int = 0
    network: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"digest is {brief(self.digest)}; expected sha256: and 64 digits")


class ReadRun(Protocol):
    """Reads networks of a workdir that holds them itself."""

    def __call__(
        self, path: paths.Path, components: tuple[str, ...], weights: str, step: int | None
    ) -> Model: ...


def digest(params: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of parameters: of a sorted line for each, with path, shape and own sha256.

    The values are float32, row-major, little-endian, whatever the file they came from.
    """

    def line(path: str) -> str:
        value = np.asarray(params[path], "<f4", order="C")
        return json.dumps([path, value.shape, hashlib.sha256(value.data).hexdigest()])

    lines = []
    shown = progress.work("hashing weights", sum(value.size for value in params.values()))
    with shown as work, ThreadPoolExecutor() as threads:
        for path, text in zip(sorted(params), threads.map(line, sorted(params)), strict=True):
            lines.append(text)
            work.advance(params[path].size)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_references(folder: paths.Path) -> dict[str, Reference]:
    """Return {network: where it lies} of a workdir; empty where it holds all networks itself.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / REFERENCES_FILE
    if not file.is_file():
        return {}
    with explained(file, "references to frozen networks", error=ModelError):
        content = read_json(file)
        try:
            return {name: build(Reference, entry, name, {}) for name, entry in content.items()}
        except ConfigError as error:
            raise ModelError(f"{file}: {error}") from error


def write_references(folder: paths.Path, references: Mapping[str, Reference]) -> None:
    """Write the references of a workdir, whole or not at all; none leave no file."""
    file = folder / REFERENCES_FILE
    if references:
        write_json(file, {name: to_dict(own) for name, own in references.items()})
    elif paths.exists(file):
        file.unlink()


def refer(
    source: Source,
    params: Mapping[str, np.ndarray],
    *,
    parameters: int,
    inner: Reference | None,
    network: str = "",
) -> Reference:
    """Return the reference to a network that was read from `source`.

    Args:
        params: {path: array} of the whole network.
        parameters: see `Reference`.
        inner: the reference of the workdir that `source` is, if it has one for the network.
        network: see `Reference`.
    """
    found, field = digest(params), source.field
    if inner is not None and inner.digest == found:
        source = inner
    place = (source.path, source.step, source.weights)
    return Reference(field, *place, digest=found, parameters=parameters, network=network)


def follow(
    folder: paths.Path, name: str, reference: Reference, read_run: ReadRun
) -> dict[str, np.ndarray]:
    """Return the parameters of a network of `folder` that lies elsewhere, whole.

    Raises:
        ModelError: it is not there, cannot be read, or is not what it was.
    """
    said = (
        f"{folder} does not hold the {name} of its run, which was read from {reference.path} "
        f"(config.{reference.field})"
    )
    if not reference.reaches(folder):
        raise ModelError(
            f"{said}: a workdir on a disk refers to no bucket, and one in a bucket to no disk.\n"
            f"{_remedy(folder, reference)}"
        )
    there = reference.network or name
    try:
        params = _read(there, reference, read_run)
    except UserError as error:
        raise ModelError(
            f"{said} and cannot be read there now: {error}\n{_remedy(folder, reference)}"
        ) from error
    check(folder, name, reference, digest(params), place=reference.path)
    return params if there == name else prefixed(component(params, there), name)


def check(
    folder: paths.Path,
    name: str,
    reference: Reference,
    found: str,
    *,
    place: str,
) -> None:
    """Check that a network in `place`, whose digest is `found`, is the one of a workdir's run.

    Raises:
        ModelError: it is another.
    """
    if found != reference.digest:
        raise ModelError(
            f"the {name} in {place} is not the one that the run in {folder} began with: its "
            f"weights have the digest {found}, and {folder / REFERENCES_FILE} has "
            f"{reference.digest}. Was it replaced, or written again?\n{_remedy(folder, reference)}"
        )


def _remedy(folder: paths.Path, reference: Reference) -> str:
    return (
        f"Restore it there, or say where a copy is: --config.{reference.field}=PLACE when the run "
        f"resumes, or as its path in {folder / REFERENCES_FILE}. A run with "
        "--config.train.bundle_frozen=True holds its own copy, and sdjax.convert --bundle makes "
        "one later"
    )


def read_brought(name: str, source: Source) -> dict[str, np.ndarray]:
    """Return {path: float32 array} of a network of `BROUGHT`; paths start with `name`.

    Raises:
        ModelError: there is none.
    """
    return BROUGHT[source.field](name, source.place)


def _read(name: str, reference: Reference, read_run: ReadRun) -> dict[str, np.ndarray]:
    """The parameters at the place of a reference, whatever kind of place that is now."""
    if reference.field in BROUGHT:
        return read_brought(name, reference)
    place, wanted = reference.place, (name,)
    with explained(place, "networks", error=ModelError):
        kind = folder_kind(place)
        if kind == "diffusers":
            read = read_diffusers(place, components=wanted)
        elif kind == "single_file":
            read = read_single_file(place, components=wanted, hints=PARAMETERS)
        else:
            read = read_run(place, wanted, reference.weights or "ema", reference.step)
    if name not in read.networks:
        raise ModelError(f"{place} has no {name}")
    return {path: value for path, value in read.params.items() if path.split(".")[0] == name}
