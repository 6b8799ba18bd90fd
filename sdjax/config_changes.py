"""Resuming with another configuration: the fields that differ, and those that must not."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.families.registry import FAMILIES, NETWORKS

# Of adapters, words, control networks, distilled models, autoencoders: which arrays are trained,
# and what they mean.
_OF_ARRAYS = (
    "kind rank ranks alpha alphas rank_stabilized targets text_targets factor full_matrix "
    "tucker block_ranks block_alphas tokens vectors widths channel_order pooled guidance_width "
    "original_steps steps stage_steps student_steps res_blocks grey embedding_dim image_tokens "
    "resampler_layers resampler_width critic_width critic_layers learn_logvar decoder_only"
).split()
# Fields of the configuration that a run cannot change half-way: the saved arrays or the position in
# the data would no longer mean the same. Shell patterns on dotted names. What else changes the
# structure of the state (say, a group of parameters that is no longer frozen) `restore` reports.
BREAKING = (
    "method.name",
    *(f"method.{name}" for name in _OF_ARRAYS),
    "seed",
    "*_from",
    "init_prediction_type",
    "init_zero_terminal_snr",
    "model.family",
    *(f"model.{name}*" for name in NETWORKS),
    *(f"model.{name}" for family in FAMILIES.values() for name in family.fixed),
    "tokenizer.*",
    "schedule.*",
    "objective.prediction_type",
    "objective.resampling*",
    "data.name",
    "data.path",
    "data.split",
    "data.image_key",
    "data.images",
    "data.importance.*",
    "data.text_key",
    "data.label_template",
    "data.validation_share",
    "data.test_share",
    "data.fold",
    "data.split_key",
    "data.captions.empty",
    "data.captions.others_key",
    "data.captions.texts",
    "data.score_key",
    "data.min_score",
    "data.text_embeddings",
    "data.mixture",
    "data.buckets.*",
    "data.resolution",
    "data.batch_size",
    "data.shapes_*",
    "optim.name",
    "optim.moments",
    "ema.profiles",
)

MISSING = "(not set)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field of the configuration that is not what it was when the checkpoint was saved."""

    field: str
    saved: Any
    current: Any
    breaks: bool

    def __str__(self) -> str:
        return f"{self.field}: was {self.saved!r}, is {self.current!r}"


def compare_configs(
    saved: Mapping[str, Any], current: Mapping[str, Any], breaking: Sequence[str] = BREAKING
) -> list[Difference]:
    """The fields that differ, by name; `breaks` tells those that match a pattern of `breaking`.

    Tuples equal lists of the same items, as JSON has only lists.
    """
    before, now = _fields(saved), _fields(current)
    return [
        Difference(
            field=name,
            saved=before.get(name, MISSING),
            current=now.get(name, MISSING),
            breaks=any(fnmatch.fnmatchcase(name, pattern) for pattern in breaking),
        )
        for name in sorted(before.keys() | now.keys())
        if before.get(name, MISSING) != now.get(name, MISSING)
    ]


def _fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields.update(_fields(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = json.loads(json.dumps(value))
    return fields
