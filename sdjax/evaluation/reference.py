"""Statistics of reference pictures, kept in .npz files.

mu [D] and sigma [D, D] (float64) have pytorch-fid's names: it reads these files and this module
reads its files. Beside them lie the features [N, D] (float32), which KID and the metrics of
neighbours need. "meta" is a JSON text that names the network and the pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.data.pictures import Pictures, stretches
from sdjax.errors import UserError
from sdjax.evaluation.metrics.frechet import Moments, moments
from sdjax.system import paths, progress
from sdjax.system.array_files import open_npz
from sdjax.system.text_files import pointer_note
from sdjax.system.untrusted import brief, check_depth, damage, why

PYTORCH_FID_TOWER = "inception-v3-2048"  # the tower of a file without "meta"


class Tower(Protocol):
    """A network from pictures to features; `sdjax.evaluation.features.FeatureTower` is one."""

    @property
    def name(self) -> str:
        """The name of the network."""
        ...

    @property
    def digest(self) -> str:
        """A digest of its weights and preprocessing."""
        ...

    @property
    def dims(self) -> int:
        """The length D of a picture's features."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 [N, H, W, 3] to float32 [N, D]."""
        ...


@dataclasses.dataclass(frozen=True)
class Reference:
    """The statistics of the reference pictures.

    features: None in files that hold the moments alone, as pytorch-fid's.
    meta: tower, digest, dataset, size, count; empty in pytorch-fid's files.
    """

    moments: Moments
    features: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PixelTower:
    """A tower without a network: pictures averaged down to side x side, as numbers from 0 to 1.

    Its distances show whether two pictures are nearly the same, and little else.
    """

    side: int = 16

    @property
    def name(self) -> str:
        """The name, with the side."""
        return f"pixels-{self.side}x{self.side}"

    @property
    def digest(self) -> str:
        """The name: there are no weights."""
        return self.name

    @property
    def dims(self) -> int:
        """The length of the features: three for each of side x side."""
        return 3 * self.side**2

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 [N, H, W, 3] to float32 [N, side * side * 3]."""
        images = np.asarray(images, np.float32) / 255
        for axis in (1, 2):
            images = _averaged(images, axis, self.side)
        return images.reshape(len(images), -1)


def _averaged(images: np.ndarray, axis: int, side: int) -> np.ndarray:
    """The means of `side` stretches of one axis, which may overlap by a pixel."""
    edges = np.arange(side + 1) * images.shape[axis] / side
    parts = [
        np.take(images, np.arange(int(a), max(int(np.ceil(b)), int(a) + 1)), axis).mean(axis)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    return np.stack(parts, axis)


def features_of(tower: Tower, pictures: Pictures) -> np.ndarray:
    """The features of all pictures, float32 [N, D]."""
    parts = []
    with progress.work(f"looking by {tower.name}", len(pictures), unit="pictures") as work:
        for images in stretches(pictures):
            parts.append(tower(images))
            work.advance(len(images))
    return np.concatenate(parts)


def write(file: paths.PathLike, features: np.ndarray, meta: Mapping[str, Any]) -> Reference:
    """Write features [N, D] and their moments; return them.

    Raises WriteError if the file cannot be written.
    """
    found = moments(features)
    file = paths.to_path(file)
    paths.make_folder(file.parent)
    with paths.writing(file) as local, local.open("wb") as out:
        np.savez(
            out,
            mu=found.mu,
            sigma=found.sigma,
            features=features,
            meta=np.array(json.dumps(dict(meta))),
        )
    return Reference(found, features, dict(meta))


def read(
    file: paths.PathLike, tower: Tower | None = None, *, size: tuple[int, int] | None = None
) -> Reference:
    """The statistics in a file.

    Args:
      tower: the tower that must have made them; None takes any.
      size: (height, width) that the pictures must have had, if the file has it.

    Raises:
      UserError: the file cannot be read, or its network, weights, preprocessing or size of pictures
        is another.
    """
    file = paths.to_path(file)
    try:
        with paths.reading(file) as local, open_npz(local) as stored:
            features = stored["features"] if "features" in stored else None
            meta = json.loads(str(stored["meta"])) if "meta" in stored else {}
            check_depth(meta)
            mu, sigma = (np.asarray(stored[name], np.float64) for name in ("mu", "sigma"))
            _check_arrays(mu, sigma, features, meta)
            found = Reference(Moments(mu, sigma), features, meta)
    except damage() as error:
        cause = pointer_note(file) or why(error)
        raise UserError(
            f"{file}: cannot be read as statistics of pictures ({cause}); expected an .npz with mu "
            "and sigma, as pytorch-fid --save-stats or sdjax.evaluate writes"
        ) from error
    if tower is not None:
        _check(file, found, tower, size)
    return found


def _check_arrays(mu: np.ndarray, sigma: np.ndarray, features: Any, meta: Any) -> None:
    """Raise a ValueError unless mu is [D], sigma [D, D], features [N, D] or None, all finite."""
    if mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape):
        shapes = f"mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}"
        raise ValueError(f"{shapes}; expected [D] and [D, D]")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma has NaN or Inf")
    if features is not None and (
        features.shape[1:] != mu.shape or features.ndim != 2 or features.dtype.kind != "f"
    ):
        raise ValueError(
            f"features are {features.dtype} {list(features.shape)}; expected floats [N, {len(mu)}]"
        )
    if not isinstance(meta, dict):
        raise ValueError(f"meta is {brief(meta)}; expected a group")


def _check(file: paths.Path, found: Reference, tower: Tower, size: tuple[int, int] | None) -> None:
    """Raise a UserError unless the statistics are comparable with the tower's features."""
    made_by = found.meta.get("tower", PYTORCH_FID_TOWER)
    wanted: dict[str, Any] = {"tower": tower.name, "digest": tower.digest}
    has = {"tower": made_by, "digest": found.meta.get("digest", tower.digest)}
    if size is not None and "size" in found.meta:
        wanted["size"], has["size"] = list(size), found.meta["size"]
    different = [
        f"{k}: {brief(has[k])} there, {brief(wanted[k])} here"
        for k in wanted
        if has[k] != wanted[k]
    ]
    if different:
        raise UserError(
            f"{file} holds statistics that cannot be compared with: {'; '.join(different)} "
            "(digest: of the weights and the preprocessing). Give the file of these weights and "
            "this size, or leave --reference out to have it made"
        )
    if found.moments.mu.shape[0] != tower.dims:
        raise UserError(
            f"{file} has a mean of {found.moments.mu.shape[0]} numbers; {tower.name} makes "
            f"{tower.dims}"
        )


def cached(
    folder: paths.PathLike, tower: Tower, pictures: Pictures, identity: Mapping[str, Any]
) -> Reference:
    """The statistics of pictures, computed if `folder` has none of them by this tower.

    Args:
      identity: identifies these pictures, as `SplitPictures.identity`.
    """
    meta = {"tower": tower.name, "digest": tower.digest, **identity}
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    kind = tower.name.split()[0].split("/")[-1]
    file = paths.to_path(folder) / f"{kind}-{key}.npz"
    there = np.array(file.exists())
    if jax.process_count() > 1:  # all hosts read it, or all compute it together
        there = multihost_utils.broadcast_one_to_all(there)
    if there:
        found = read(file, tower)
        if dict(found.meta) == json.loads(json.dumps(meta)):
            return found
    features = features_of(tower, pictures)
    if jax.process_index() == 0:
        return write(file, features, meta)
    return Reference(moments(features), features, meta)
