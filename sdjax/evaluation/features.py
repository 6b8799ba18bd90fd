"""Features of pictures and texts, which metrics compare, computed on all devices.

    tower = inception_tower("pt_inception-2015-12-05-6726825d.pth")   # FID, KID, ...
    tower(images)          # uint8 [N, H, W, 3] -> float32 [N, 2048]
    tower.digest           # of weights and preprocessing: the key of cached statistics

    clip = clip_tower("clip-vit-large-patch14")                       # CLIP score, CMMD, audits
    clip.images(images)    # a FeatureTower; float32 [N, D], each of length 1
    clip.texts(["a cat"])  # float32 [M, D], each of length 1

A tower always computes batches of one shape: the last batch is padded. So there is one compilation
(and a small one for each size of picture), and a picture's features do not depend on the number of
other pictures. Batches are spread over the devices of a mesh. On several hosts all must call a
tower, with the same pictures, and all get all features.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.evaluation import preprocess, towers
from sdjax.models import weights
from sdjax.parallel.batches import batch_sharding
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.parallel.sharding import to_host
from sdjax.system import paths

Params = Mapping[str, Any]
BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTower:
    """A network from pictures to features; call it.

    name: its name, such as "inception-v3-2048".
    digest: 16 hex digits, of the weights and the preprocessing.
    dims: length D of a picture's features.
    batch_size: pictures that are computed at once, on all devices together.
    prepare: uint8 [B, H, W, 3] -> the input of `apply`, on the host.
    apply: (params, prepared) -> float32 [B, D], on the devices.
    """

    name: str
    digest: str
    dims: int
    batch_size: int
    mesh: Mesh
    params: Params = dataclasses.field(repr=False)
    prepare: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    apply: Callable[[Params, jax.Array], jax.Array] = dataclasses.field(repr=False)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The features of pictures, in their order.

        Args:
            images: uint8 [N, H, W, 3]; N may be 0.

        Returns:
            float32 [N, dims].

        Raises:
            ValueError: the pictures have another shape or dtype.
            UserError: features are not finite, so the weights are broken.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images: expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
            )
        return _in_batches(self, images, self.prepare, self.apply)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTower:
    """Both towers of a CLIP, whose features of pictures and texts can be compared.

    images: pictures -> features of length 1.
    digest: of both towers, the tokenizer and the preprocessing.
    logit_scale: the factor of cosines before a softmax over texts.
    """

    name: str
    digest: str
    images: FeatureTower
    logit_scale: float
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    apply: Callable[[Params, jax.Array], jax.Array] = dataclasses.field(repr=False)

    @property
    def dims(self) -> int:
        """The length D of the features of a picture or a text."""
        return self.images.dims

    @property
    def batch_size(self) -> int:
        """The number of texts, or pictures, that are computed at once."""
        return self.images.batch_size

    @property
    def mesh(self) -> Mesh:
        """The devices that compute."""
        return self.images.mesh

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """The features of texts, float32 [M, D], each of length 1; too long texts are cut.

        Raises:
            UserError: features are not finite, so the weights are broken.
        """
        return _in_batches(self, self.tokenizer.encode(list(texts)), np.asarray, self.apply)


def inception_tower(
    path: paths.PathLike,
    *,
    dims: int = 2048,
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
) -> FeatureTower:
    """The InceptionV3 of pytorch-fid, by which FID is defined.

    Args:
        path: the weights, pytorch-fid's .pth file or the same tensors as .safetensors.
        dims: 2048 (pool3, the usual one), or 768, 192, 64: earlier layers, averaged over positions.
        batch_size: of pictures; rounded up to a multiple of the devices.
        mesh: None for all devices.

    Raises:
        WeightsError: the file is missing (the message has its address) or does not fit.
        UserError: `dims` is another number.
    """
    read = towers.read_inception(path, dims=dims)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh

    @jax.jit
    def network(params: Params, pixels: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return weights.merge(read.graph, params)(pixels)

    return FeatureTower(
        name=f"inception-v3-{dims}",
        digest=digest(read.params, read.config, preprocess.INCEPTION),
        dims=dims,
        batch_size=_whole(batch_size, mesh),
        mesh=mesh,
        params=_replicated(read.params, mesh),
        prepare=np.asarray,
        # Two programs, so that a new size of picture compiles the resize alone.
        apply=lambda params, images: network(params, preprocess.inception_pixels(images)),
    )


def clip_tower(
    folder: paths.PathLike, *, batch_size: int = BATCH_SIZE, mesh: Mesh | None = None
) -> ClipTower:
    """A CLIP of transformers, from its folder.

    Args:
        folder: config.json of a `CLIPModel`, its weights, preprocessor_config.json and tokenizer.
        batch_size: of pictures and texts; rounded up to a multiple of the devices.
        mesh: None for all devices.

    Raises:
        UserError: the folder is missing (the message has an address), lacks a file, or has a field
            or weight that does not fit.
    """
    read = towers.read_clip(folder)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh

    @jax.jit
    def image_features(params: Params, pixels: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return _unit(weights.merge(read.vision.graph, params)(pixels))

    @jax.jit
    def text_features(params: Params, tokens: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return _unit(weights.merge(read.text.graph, params).penultimate(tokens)[1])

    images = FeatureTower(
        name=f"{read.name} images",
        digest=digest(read.vision.params, read.vision.config, read.preprocess),
        dims=read.vision.config.projection_dim,
        batch_size=_whole(batch_size, mesh),
        mesh=mesh,
        params=_replicated(read.vision.params, mesh),
        prepare=read.preprocess.pixels,
        apply=image_features,
    )
    text = digest(read.text.params, read.text.config, read.tokenizer.identity, read.logit_scale)
    return ClipTower(
        name=read.name,
        digest=digest({}, images.digest, text),
        images=images,
        logit_scale=read.logit_scale,
        tokenizer=read.tokenizer,
        params=_replicated(read.text.params, mesh),
        apply=text_features,
    )


def text_image_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The CLIP score of each picture with its own text, 100 cos, float32 [N] in [-100, 100].

    As torchmetrics' CLIPScore before its mean (functional/multimodal/clip_score.py). The original
    (arXiv:2104.08718, equation 1) has a factor 2.5 instead and cuts off below 0.

    Args:
        images, texts: float32 [N, D] of `ClipTower`, pairwise.

    Raises:
        ValueError: their shapes differ.
    """
    if images.shape != texts.shape:
        raise ValueError(f"images {images.shape} and texts {texts.shape}: expected one text each")
    return 100 * np.einsum("nd,nd->n", images, texts)


def digest(params: Params, *more: Any) -> str:
    """A digest, 16 hex digits, of parameters and of all else that features depend on, by repr."""
    found = hashlib.sha256(repr(more).encode())
    for path, value in sorted(params.items()):
        array = np.ascontiguousarray(value)
        found.update(f"{path} {array.dtype} {array.shape}".encode())
        found.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return found.hexdigest()[:16]


def _in_batches(
    tower: FeatureTower | ClipTower,
    rows: np.ndarray,
    prepare: Callable[[np.ndarray], np.ndarray],
    apply: Callable[[Params, jax.Array], jax.Array],
) -> np.ndarray:
    """Apply `apply` to all rows in batches of one shape; the last row pads the last batch."""
    out = np.empty((len(rows), tower.dims), np.float32)
    sharding = batch_sharding(tower.mesh)
    pending: list[tuple[int, jax.Array]] = []  # one batch is computed while the next is prepared
    for start in range(0, len(rows), tower.batch_size):
        batch = prepare(rows[start : start + tower.batch_size])
        missing = tower.batch_size - len(batch)
        batch = (
            np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
        )
        placed = jax.make_array_from_callback(batch.shape, sharding, batch.__getitem__)
        pending.append((start, apply(tower.params, placed)))
        if len(pending) > 1:
            _fetch(out, *pending.pop(0))
    for found in pending:
        _fetch(out, *found)
    if not np.isfinite(out).all():
        bad = int((~np.isfinite(out).all(axis=1)).sum())
        raise UserError(
            f"{tower.name}: the features of {bad} of {len(rows)} are not finite: the weights are "
            "damaged or belong to another network; download them again"
        )
    return out


def _fetch(out: np.ndarray, start: int, found: jax.Array) -> None:
    """Write the features of a batch into `out`, without those of the padding."""
    rows = to_host(found)[: len(out) - start]
    out[start : start + len(rows)] = rows


def _unit(x: jax.Array) -> jax.Array:
    """The vectors x [..., D] scaled to length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _whole(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the devices."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1")
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // ways) * ways


def _replicated(params: Params, mesh: Mesh) -> dict[str, jax.Array]:
    """The parameters, whole on every device; every host has read them itself."""
    sharding = NamedSharding(mesh, P())
    return {
        path: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        for path, value in params.items()
    }
