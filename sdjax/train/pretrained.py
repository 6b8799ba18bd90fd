"""Networks with their weights, from whatever folder the user has.

`read_any` takes a diffusers pipeline, the folder of one of its networks, or an sdjax workdir.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdjax import paths
from sdjax.train.bundle import INCOMPLETE, NETWORKS, Pretrained, PretrainedError, read_json
from sdjax.train.diffusers_folder import read_diffusers, write_diffusers
from sdjax.train.workdir import read_workdir

__all__ = [
    "NETWORKS",
    "Pretrained",
    "PretrainedError",
    "folder_kind",
    "read_any",
    "read_diffusers",
    "read_workdir",
    "write_diffusers",
]


def read_any(
    path: paths.PathLike,
    *,
    components: Sequence[str] = tuple(NETWORKS),
    weights: str = "ema",
    step: int | None = None,
    variant: str = "",
) -> Pretrained:
    """Networks from a diffusers pipeline, the folder of one of its networks, or an sdjax workdir.

    Args:
        path: the folder; one checkpoint of a workdir (WORKDIR/checkpoints/STEP) is fine too.
        components: which networks to read, if they are there.
        weights, step: of a workdir, see `read_workdir`.
        variant: of a diffusers folder, see `find_weights`.

    Raises:
        PretrainedError: the folder is neither, or all that is wrong with it.
        CheckpointError: a workdir's checkpoint is missing or damaged.
    """
    path = paths.to_path(path)
    kind = folder_kind(path)
    if kind == "diffusers":
        return read_diffusers(path, components=components, variant=variant)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parents[1], int(path.name)
    return read_workdir(path, components=components, weights=weights, step=step)


def folder_kind(path: paths.Path) -> str:
    """ "diffusers" or "workdir". PretrainedError, with the reason, if it is neither."""
    if not paths.exists(path):
        raise PretrainedError(f"{path}: no such folder")
    if not path.is_dir():
        raise PretrainedError(
            f"{path} is a file; expected a diffusers folder (model_index.json, unet/, ...) or an "
            "sdjax workdir. Single-file checkpoints are not read: convert them with diffusers first"
        )
    if (path / INCOMPLETE).exists():
        raise PretrainedError(
            f"{path} is incomplete: whatever wrote it was interrupted (it holds {INCOMPLETE}); "
            "write it again"
        )
    if (path / "model_index.json").is_file():
        return "diffusers"
    if (path / "checkpoints").is_dir() or (
        path.parent.name == "checkpoints" and path.name.isdigit()
    ):
        return "workdir"
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if "task" in config:
            return "workdir"
        if "_class_name" in config or "model_type" in config or "architectures" in config:
            return "diffusers"
    has = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise PretrainedError(
        f"{path} is neither a diffusers folder (no model_index.json, no network's config.json) nor "
        f"an sdjax workdir (no checkpoints/). It has: {has}"
    )
