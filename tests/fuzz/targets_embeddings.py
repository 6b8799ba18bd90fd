"""Hostile files of words that a model has learnt: safetensors and PyTorch's, and their names."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.families.sd import SD
from sdjax.families.sdxl import CLIP_BIGG, SDXL
from sdjax.formats.embeddings import read_embedding
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.weights import save_file
from tests.fuzz import mutation

_MODELS = (
    Model(SD, {"text_encoder": CLIPTextConfig(hidden_size=12)}),
    Model(SDXL, {"text_encoder": CLIPTextConfig(hidden_size=12), "text_encoder_2": CLIP_BIGG}),
)
_NAMES = ("<cat>", "emb_params", "clip_l", "clip_g", "*", "", "a" * 5000, "\u202e", "a\nb", "{}")
_TYPES = (np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_)
_SHAPES = ((2, 12), (12,), (2, 1280), (0, 12), (2, 0), (), (1, 2, 12), (300, 12), (2, 13))
# {"string_to_param": {"*": a tensor of [2, 2]}, "name": "x"}
_PICKLE = (
    b"\x80\x02}(X\x0f\x00\x00\x00string_to_param}X\x01\x00\x00\x00*ctorch._utils\n"
    b"_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQK\x00K\x02K\x02\x86K\x02K\x01\x86\x89ccollections\nOrderedDict\n"
    b")RtRsX\x04\x00\x00\x00nameX\x01\x00\x00\x00xu."
)


def embedding(rng: np.random.Generator, folder: Path) -> str:
    """Rows of other shapes, types and names, or a damaged file, for a model of either family."""
    if rng.random() < 0.3:
        file, data = folder / "a.pt", io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            hurt = mutation.damaged(rng, _PICKLE) if rng.random() < 0.8 else _PICKLE
            archive.writestr("a/data.pkl", hurt)
            archive.writestr("a/data/0", bytes(16))
        content = data.getvalue()
        file.write_bytes(mutation.damaged(rng, content) if rng.random() < 0.3 else content)
    else:
        file = folder / "a.safetensors"
        for name in (file, folder / "a_2.safetensors")[: int(rng.integers(1, 3))]:
            save_file(_tensors(rng), name)
            if rng.random() < 0.4:
                name.write_bytes(mutation.damaged(rng, name.read_bytes()))
    try:
        found = read_embedding(file, _MODELS[rng.integers(len(_MODELS))])
    except UserError as error:
        assert len(str(error)) < 4000, f"a message of {len(str(error))} characters"
        return "refused"
    assert all(np.isfinite(rows).all() and rows.ndim == 2 for rows in found.rows.values())
    return "read"


def _tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Mostly the rows of one word."""
    names = rng.permutation(_NAMES)[: 1 if rng.random() < 0.8 else 2]
    found = {}
    for name in names:
        shape = _SHAPES[0] if rng.random() < 0.5 else _SHAPES[rng.integers(len(_SHAPES))]
        dtype = _TYPES[0] if rng.random() < 0.6 else _TYPES[rng.integers(len(_TYPES))]
        values = np.ones(shape)
        if rng.random() < 0.2 and values.size:
            values.flat[0] = rng.choice([np.nan, np.inf, 1e300])
        with np.errstate(over="ignore", invalid="ignore"):
            found[str(name)] = values.astype(dtype)
    return found


TARGETS = [("embedding", embedding)]
