"""Networks with their weights, from whatever folder or file the user has.

`read_any` takes a diffusers pipeline, the folder of one of its networks, an sdjax workdir, or a
single-file checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.checkpoints.diffusers_folder import read_diffusers
from sdjax.checkpoints.folders import INCOMPLETE, ModelError, read_json
from sdjax.checkpoints.single_file import Hints, read_single_file
from sdjax.checkpoints.workdir import read_workdir
from sdjax.families.family import Model
from sdjax.families.registry import NETWORKS
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
