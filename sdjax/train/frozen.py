"""The networks that a run does not train: kept in the workdir or referred to, and placed.

At a fresh start `keep` decides which networks the workdir refers to, and copies the others into
DIR/frozen.safetensors. To resume, each host reads one network after the other from where it lies,
and of that file only the rows that its devices hold.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the length n of the
header, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the arrays, row-major. The
library's own slices want a local file; a bucket serves ranges of bytes as well.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.assemble import Assembled
from sdjax.checkpoints.reading import lasts, locate, read_source
from sdjax.checkpoints.references import (
    BROUGHT,
    Reference,
    Source,
    check,
    follow,
    read_brought,
    read_references,
    refer,
    write_references,
)
from sdjax.checkpoints.workdir import FROZEN_FILE, bundle, read_run
from sdjax.config import Config
from sdjax.errors import UserError
from sdjax.formats.single_file import PARAMETERS
from sdjax.models import int8, weight_checks
from sdjax.models.params import Params, component, is_buffer, prefixed
from sdjax.models.weights import save_file
from sdjax.system import paths
from sdjax.system.text_files import pointer_note
from sdjax.system.untrusted import brief, check_regular, damage, plain, why

_MOST_HEADER = 16 * 2**20  # bytes; that of SDXL has 0.3 MB


def keep(
    config: Config,
    folder: paths.Path,
    assembled: Assembled,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    copies: Mapping[str, str],
) -> None:
    """Write references to the networks that are not trained, and copies where they do not do.

    Process 0 writes, whatever an earlier start has left.

    Args:
        copies: see `Method.copies`.
    """
    if jax.process_index() != 0:
        return
    references: dict[str, Reference] = {}
    wanted = int8.in_files(wanted)
    for name, own in _by_network(wanted).items():
        origin = copies.get(name, name)
        source = assembled.sources.get(origin)
        if config.train.bundle_frozen or source is None or not lasts(source):
            continue
        if all(is_buffer(path) for path in own):
            continue  # of a network that is trained
        loaded = component(assembled.params, origin) or component(assembled.derived, origin)
        whole = prefixed(loaded, origin)
        reference = refer(
            source,
            whole,
            parameters=sum(math.prod(want.shape) for want in own.values()),
            inner=_inner(source, origin),
            network=copies.get(name, ""),
        )
        if reference.reaches(folder):
            references[name] = reference
    every = assembled.every
    copied = {p: np.asarray(every[p]) for p in wanted if p.split(".")[0] not in references}
    file = folder / FROZEN_FILE
    if copied:
        save_file(copied, file)
    elif paths.exists(file):
        file.unlink()
    write_references(folder, references)


def resumed(
    config: Config,
    folder: paths.Path,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    saved: Config,
) -> Params:
    """Return what is not trained, on the devices, from the workdir and where it refers to.

    A field of the configuration that names another folder than at first moves the reference, if
    the networks there are the same.

    Raises:
        UserError: a network is not where it was, nor where the configuration says, or is another.
    """
    references = read_references(folder)
    current = dict(references)
    found: Params = {}
    for name, own in _by_network(wanted).items():
        if name not in references:
            continue
        place = _named(config, references[name].field)
        if place and place != _named(saved, references[name].field):
            params, current[name] = _moved(folder, name, references[name], place)
        else:
            params = follow(folder, name, references[name], read_run)
        _check_shapes(folder, name, params, int8.in_files(own))
        found |= placed(params, own)
        del params  # one network at a time on the host
    rest = {path: want for path, want in wanted.items() if path not in found}
    if rest:
        found |= read_frozen(folder / FROZEN_FILE, rest)
    if jax.process_index() == 0 and current != references:
        write_references(folder, current)
    if jax.process_index() == 0 and config.train.bundle_frozen:
        bundle(folder)
    return {path: found[path] for path in wanted}


def placed(params: Mapping[str, np.ndarray], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Return arrays as `wanted` has them, {path: shape with sharding, and dtype}.

    Kernels are put into int8 here, always from what was loaded.
    """

    def put(value: np.ndarray, want: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(want.shape, want.sharding, lambda index: value[index])

    found: Params = {}
    for path, want in int8.in_files(wanted).items():
        if want.dtype == np.int8:
            codes, scales = int8.quantised(path, params[path])
            own = int8.scale_path(path)
            found |= {path: put(codes, want), own: put(scales, wanted[own])}
        else:
            found[path] = put(np.asarray(params[path], want.dtype), want)
    return {path: found[path] for path in wanted}


def _moved(
    folder: paths.Path, name: str, reference: Reference, place: str
) -> tuple[dict[str, np.ndarray], Reference]:
    """The same network from another place, and its reference there."""
    source = locate(reference.field, place, like=reference)
    there = reference.network or name
    if reference.field in BROUGHT:
        params = read_brought(there, source)
    else:
        read = read_source(source, (there,), PARAMETERS)
        params = {p: value for p, value in read.params.items() if p.split(".")[0] == there}
    new = refer(
        source,
        params,
        parameters=reference.parameters,
        inner=_inner(source, there),
        network=reference.network,
    )
    check(folder, name, reference, new.digest, place=place)
    if not new.reaches(folder):
        raise UserError(
            f"config.{reference.field} is {place!r}, but {folder} refers to networks on a disk if "
            "it is on one, and in a bucket if it is in one: copy them there"
        )
    return params if there == name else prefixed(component(params, there), name), new


def _named(config: Config, field: str) -> str:
    """The place that a field of a recipe names; the field by its dotted name."""
    return functools.reduce(getattr, field.split("."), config)  # type: ignore[return-value]


def _inner(source: Source, name: str) -> Reference | None:
    """The reference that a source has for a network, if it is a workdir with one."""
    return read_references(source.place).get(name) if source.step is not None else None


def _by_network(wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, want in wanted.items():
        found.setdefault(path.split(".")[0], {})[path] = want
    return found


def _check_shapes(
    folder: paths.Path, name: str, params: Mapping[str, np.ndarray], wanted: Mapping[str, Any]
) -> None:
    for path, want in wanted.items():
        if path not in params or params[path].shape != want.shape:
            raise UserError(
                f"{folder}: the {name} that its run began with has no {path} {list(want.shape)}, "
                "which this configuration does not train. Use the one the run began with, or "
                "another --workdir"
            )


def read_frozen(file: paths.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of `wanted`, on its shardings.

    At any time a host holds the rows of one array that its devices share, besides what is placed.

    Args:
        file: float32 arrays, local or in a bucket.
        wanted: {path: shape with sharding, and the dtype to give}.

    Raises:
        UserError: the file is not there, is cut short, or holds other arrays or NaN or Inf.
    """
    try:
        check_regular(file)
        with file.open("rb") as opened:
            start, header = _header(opened)
            inside = int8.in_files(wanted)
            found: dict[str, Any] = {}
            _check(file, header, inside)
            # In the file's order: from a bucket, going back would fetch a block again.
            for path in sorted(inside, key=lambda path: header[path]["data_offsets"]):
                found |= _read(opened, start, path, header[path], wanted)
            return found
    except UserError:
        raise
    except damage() as error:
        raise UserError(
            f"{file} cannot be read: {pointer_note(file) or why(error)}\n"
            "It holds networks that this run does not train, and is written when the run begins. "
            "Restore it from a copy, or start in another --workdir"
        ) from error


def _header(opened: Any) -> tuple[int, dict[str, Any]]:
    """(where the arrays begin, {name: entry})."""
    size = int.from_bytes(opened.read(8), "little")
    if not 2 <= size <= _MOST_HEADER:
        raise ValueError("not a safetensors file")
    header = json.loads(opened.read(size))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: its header is no group")
    return 8 + size, header


def _check(file: paths.Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = []
    for path, want in wanted.items():
        if path not in header:
            problems.append(f"missing: {path}")
        elif (header[path]["dtype"], header[path]["shape"]) != ("F32", list(want.shape)):
            has = f"{plain(header[path]['dtype'])} {brief(header[path]['shape'])}"
            problems.append(f"{path} is {has}, the model has F32 {list(want.shape)}")
    if problems:
        raise UserError(
            f"{file} is not of this configuration:\n  " + "\n  ".join(problems[:20]) + "\nUse the "
            "one the run began with (networks, and which groups are trained), or another --workdir"
        )


def _read(
    opened: Any, start: int, path: str, entry: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The array of a path; of a kernel that is wanted in int8, its codes and its scales."""
    want = wanted[path]
    begin, shape = start + entry["data_offsets"][0], want.shape
    row = 4 * math.prod(shape[1:])
    cached: dict[tuple[int, int], np.ndarray] = {}  # devices of a host often share their rows

    def rows(first: int, last: int) -> np.ndarray:
        opened.seek(begin + first * row)
        data = opened.read((last - first) * row)
        if len(data) < (last - first) * row:
            raise ValueError("it is cut short")
        values = np.frombuffer(data, "<f4")
        if not weight_checks.is_finite(values):
            raise ValueError(weight_checks.describe(path, values))
        return values.reshape((last - first, *shape[1:]) if shape else ())

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0]) if shape else (0, 1, 1)
        if (first, last) not in cached:
            cached[first, last] = rows(first, last).astype(want.dtype, copy=False)
        return cached[first, last][(slice(None), *index[1:]) if shape else ()]

    if want.dtype == np.int8:  # a scale needs all rows
        own = (path, int8.scale_path(path))
        return placed({path: rows(0, shape[0])}, {name: wanted[name] for name in own})
    return {path: jax.make_array_from_callback(shape, want.sharding, part)}
