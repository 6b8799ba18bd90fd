"""Hostile files of adapters: other keys, other shapes, other metadata, other bytes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.families.flux import FLUX
from sdjax.formats.adapters import keys, peft_metadata, recognition
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.reading import read_adapter
from sdjax.formats.adapters.spellings import modules_of, spellings
from sdjax.models.flux.config import FluxConfig
from sdjax.models.weights import save_file
from tests.fuzz import mutation
from tests.fuzz.targets_models import _hurt, _judged

_PARTS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight",
    "lora_B.bias", "lora_magnitude_vector", "alpha", "dora_scale", "diff", "diff_b", "w_norm",
    *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)  # fmt: skip
_KINDS = (
    ("lora_down.weight", "lora_up.weight", "alpha"),
    ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    ("diff", "diff_b"),
)


@functools.cache
def _model() -> Model:
    """A transformer with modules that are fused in files.

    An adapter that does not fit is compared with every release, whose networks are made once.
    """
    recognition._model_of({"none": ()})
    config = FluxConfig(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=24,
        pooled_projection_dim=20, attention_head_dim=6, axes_dims_rope=(2, 2, 2),
        num_attention_heads=2,
    )  # fmt: skip
    model = Model(FLUX, {"transformer": config})
    rng = np.random.default_rng(0)
    params = {
        path: rng.standard_normal(want.shape).astype(np.float32)
        for path, want in bind(model).abstract.items()
    }
    return Model(FLUX, {"transformer": config}, params=params)


@functools.cache
def _names() -> tuple[tuple[str, int], ...]:
    """(name in a file, its outputs) of the modules of 12 inputs."""
    modules = modules_of(_model())
    found = []
    for name, target in spellings(_model(), modules).items():
        shapes = [modules[path].shape for path in target.parts]
        if len(shapes[0]) == 2 and shapes[0][1] == 12:
            found.append((name, sum(shape[0] for shape in shapes)))
    return tuple(found)


def _shape(rng: np.random.Generator, part: str, rank: int, out: int) -> tuple[int, ...]:
    """A shape that is mostly right for a module of 12 inputs."""
    right = {
        "lora_down.weight": (rank, 12), "lora_A.weight": (rank, 12), "alpha": (),
        "lora_up.weight": (out, rank), "lora_B.weight": (out, rank), "diff_b": (out,),
        "lora_magnitude_vector": (out,), "diff": (out, 12), "hada_w1_a": (out, rank),
        "hada_w2_a": (out, rank), "hada_w1_b": (rank, 12), "hada_w2_b": (rank, 12),
        "lokr_w1": (4, 4), "lokr_w2_a": (out // 4, rank), "lokr_w2_b": (rank, 3),
    }  # fmt: skip
    if part in right and rng.random() < 0.97:
        return right[part]
    return tuple(int(size) for size in rng.integers(0, 5, rng.integers(0, 5)))


def _file(rng: np.random.Generator, file: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    for _ in range(int(rng.integers(1, 4))):
        stem, out = _names()[rng.integers(len(_names()))]
        rank = int(rng.integers(1, 4))
        parts = list(_KINDS[rng.integers(len(_KINDS))])
        if rng.random() < 0.1:
            parts += [str(rng.choice(_PARTS))]
        for part in parts:
            value = rng.standard_normal(_shape(rng, part, rank, out))
            kind = np.float32 if rng.random() < 0.99 else np.int64
            tensors[f"{stem}.{part}"] = value.astype(kind)
    said = {f"transformer.{field}": 2 for field in ("r", "lora_alpha")}
    said["transformer.rank_pattern"] = {"proj_out": 1}
    metadata = {"format": "pt"}
    if rng.random() < 0.15:
        metadata = {peft_metadata.ENTRY: json.dumps(mutation.tree(rng, said))}
    save_file(tensors, file, metadata=metadata)


def adapter_file(rng: np.random.Generator, folder: Path) -> str:
    """An adapter of mixed kinds, with wrong parts, metadata or bytes; merged if it is read."""
    file = folder / "adapter.safetensors"
    _file(rng, file)
    if rng.random() < 0.2:
        _hurt(rng, file)

    def read() -> None:
        adapter = read_adapter(file, _model())
        found = merged(_model(), [(adapter, 0.5)])
        assert found.params.keys() == _model().params.keys()

    return _judged(read)


def adapter_keys(rng: np.random.Generator, folder: Path) -> str:
    """A key of odd words, which is taken apart or is none."""
    words = [".", "_", "lora", "lora_A", "default", "weight", "processor", "base_model.model."]
    key = "".join(str(rng.choice([*words, *_PARTS])) for _ in range(rng.integers(1, 300)))
    found = keys.split(key)
    return "refused" if found is None else "read"


def adapter_scales(rng: np.random.Generator, folder: Path) -> str:
    """Metadata of PEFT with other values, asked for the scale of a module."""
    said = {
        "unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": False,
        "unet.rank_pattern": {"a.b": 2}, "unet.alpha_pattern": {"^mid.to_q$": 4},
    }  # fmt: skip
    metadata = {peft_metadata.ENTRY: json.dumps(mutation.tree(rng, said))}

    def read() -> None:
        try:
            scales = peft_metadata.read_scales(folder / "a.safetensors", metadata)
            value = scales.scale("unet.mid.to_q", 4)
        except (ValueError, RecursionError) as error:  # which the reader of the file explains
            raise UserError(str(error)[:1000]) from error
        assert value is None or np.isfinite(value)

    return _judged(read)


TARGETS = [
    (function.__name__, function) for function in (adapter_file, adapter_keys, adapter_scales)
]
