"""Networks with their weights, from whatever folder or file the user has.

`read_any` takes a diffusers pipeline, the folder of one of its networks, an sdjax workdir, or a
single-file checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from sdjax.checkpoints.checkpoint import all_steps, latest_step
from sdjax.checkpoints.references import BROUGHT, TINY, Source
from sdjax.checkpoints.workdir import read_run_config, read_workdir
from sdjax.families.family import Model
from sdjax.families.registry import FAMILIES, NETWORKS
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.folders import folder_kind
from sdjax.formats.single_file import Hints, read_single_file
from sdjax.methods.registry import METHODS
from sdjax.system import paths
from sdjax.system.untrusted import is_number


def read_any(
    path: paths.PathLike,
    *,
    components: Sequence[str] = NETWORKS,
    weights: str = "ema",
    step: int | None = None,
    variant: str = "",
    hints: Hints | None = None,
    with_weights: bool = True,
) -> Model:
    """Networks from a diffusers pipeline or network, an sdjax workdir, or a single file.

    Args:
        path: the folder or file; a checkpoint of a workdir (WORKDIR/checkpoints/STEP) is one too.
        components: which networks to read, if they are there.
        weights, step: of a workdir, see `read_workdir`.
        variant: of a diffusers folder, see `find_weights`.
        hints: of a single file, see `Hints`.
        with_weights: False, of a folder, reads configs, schedule and tokenizers alone.

    Raises:
        ModelError: the folder is neither, or all that is wrong with it.
        CheckpointError: a workdir's checkpoint is missing or damaged.
    """
    path = paths.to_path(path)
    kind = folder_kind(path)
    if kind == "single_file":
        return read_single_file(
            path, components=components, weights=weights, hints=hints or Hints()
        )
    if kind == "diffusers":
        return read_diffusers(
            path, components=components, variant=variant, with_weights=with_weights
        )
    if path.parent.name == "checkpoints" and is_number(path.name):
        path, step = path.parents[1], int(path.name)
    return read_workdir(
        path, components=components, weights=weights, step=step, with_weights=with_weights
    )


def locate(field: str, value: str, *, like: Source | None = None) -> Source:
    """Return what a field of a recipe names: of a workdir, one checkpoint and one average.

    Args:
        field: as "vae_from".
        value: the folder or file, or "tiny".
        like: the same networks at another place; if both are workdirs, the checkpoint and the
            average are those, where there is such a checkpoint.

    Raises:
        ModelError: there are no networks.
    """
    if field == "vae_from" and value == TINY:
        return Source(field, TINY)
    if field in BROUGHT:
        return Source(field, os.fspath(paths.absolute(value)))
    path, step = paths.absolute(value), None
    if folder_kind(path) != "workdir":
        return Source(field, os.fspath(path))
    if path.parent.name == "checkpoints" and is_number(path.name):
        path, step = path.parents[1], int(path.name)
    if like is not None and step is None and like.step in all_steps(path):
        return Source(field, os.fspath(path), like.step, like.weights)
    profiles = read_run_config(path).ema.profiles
    step = latest_step(path) if step is None else step
    return Source(field, os.fspath(path), step, profiles[0] if profiles else "ema")


def read_source(
    source: Source, components: Sequence[str] = NETWORKS, hints: Hints | None = None
) -> Model:
    """Return networks of a source. Arguments and errors are those of `read_any`."""
    return read_any(
        source.place, components=components, weights=source.weights or "ema", step=source.step,
        hints=hints,
    )  # fmt: skip


def lasts(source: Source) -> bool:
    """Whether another run may refer to a source, which has the networks as they are read.

    A checkpoint may be deleted by its run if that goes on; step 0 is that of a conversion, which
    does not. What a run has changed, as by adapters, is nowhere as it is read.
    """
    if not source.step:
        return True
    config = read_run_config(source.place)
    kind = METHODS[config.method.name]
    changed = kind.changes(config.method, FAMILIES[config.model.family])
    return source.step >= config.train.steps and not changed
