"""The metadata of PEFT: what a file says of ranks and alphas, and the little that is written.

diffusers has it as JSON in the entry `lora_adapter_metadata` of a file's header, each field of a
`LoraConfig` after its network's name; PEFT in `adapter_config.json` beside `adapter_model`. A
reader whose PEFT lacks a field refuses the file: only the fields that decide the maths are written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sdjax.system import paths, text_files
from sdjax.system.untrusted import brief, check_depth

ENTRY = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
_MOST = 2.0**31  # of a rank or an alpha
# A pattern of names: a path or its end, after "^" a whole path. Other regular expressions of a
# stranger's file are not run.
_PATTERN = re.compile(r"\^?[\w.\\]+\$?")


@dataclasses.dataclass(frozen=True)
class PeftScales:
    """The scales that metadata says; those of no network where there is none.

    configs: {network, or "" for any: fields of its LoraConfig}.
    """

    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float | None:
        """Return s of a module; None where the metadata does not speak of its network.

        Raises:
            ValueError: the rank of the factors is another.
        """
        network, _, name = module.partition(".")
        config = self.configs.get(network, self.configs.get(""))
        if config is None:
            return None
        alpha = _matching(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
        said = _matching(config.get("rank_pattern"), name, config.get("r", rank))
        for field, value in (("r", said), ("lora_alpha", alpha)):
            if type(value) not in (int, float) or not abs(value) < _MOST:
                raise ValueError(f"{ENTRY} has {field} = {brief(value)}; expected a number")
        if said != rank:
            raise ValueError(f"the rank of its factors is {rank}, that of {ENTRY} is {said}")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Any, name: str, default: Any) -> Any:
    """Return the value of the first pattern for a name, as PEFT's `get_pattern_key` finds it."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
            raise ValueError(f"{ENTRY} has the pattern {brief(pattern)}; expected a name")
        end = pattern.removesuffix("$").replace("\\", "")
        if end.startswith("^"):
            if name == end[1:]:
                return value
        elif name == end or name.endswith(f".{end}") or f"text_model.{name}" == end:
            return value
    return default


def read_scales(file: paths.Path, metadata: Mapping[str, str]) -> PeftScales:
    """Return what a file's metadata says.

    Raises:
        ValueError: it is no JSON object.
    """
    beside = file.with_name(PEFT_CONFIG)
    if ENTRY in metadata:
        said = json.loads(metadata[ENTRY])
        check_depth(said)
        if not isinstance(said, dict):
            raise ValueError(f"{ENTRY} is {brief(said)}; expected an object")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in said.items():
            network, _, field = key.rpartition(".")
            configs.setdefault(network, {})[field] = value
        return PeftScales(configs)
    if file.name == "adapter_model.safetensors" and beside.is_file():
        said = text_files.read_json(beside)
        return PeftScales({"": said} if isinstance(said, dict) else {})
    return PeftScales()


def written(
    networks: Mapping[str, Mapping[str, int]],
    *,
    encoders: Collection[str],
    dora: Collection[str],
    bias: Collection[str],
) -> str:
    """Return the entry for files whose alphas are the ranks.

    Args:
        networks: {network: {name of a module: rank}}.
        encoders: the networks that transformers makes.
        dora, bias: the networks that have magnitudes, and changes of biases.
    """
    said: dict[str, Any] = {}
    for network, ranks in networks.items():
        rank = Counter(ranks.values()).most_common(1)[0][0]
        # A name is one of a whole path after "^", else also the end of others. The paths of text
        # encoders begin with another word in some versions of transformers.
        start = "" if network in encoders else "^"
        others = {start + name: own for name, own in ranks.items() if own != rank}
        fields = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": list(ranks),
            "use_dora": network in dora,
            "use_rslora": False,
            "lora_bias": network in bias,
        }
        said |= {f"{network}.{field}": value for field, value in fields.items()}
    return json.dumps(said)
