"""Parameters as flat dicts: {path: array}, where a path starts with its network's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Params = dict[str, jax.Array]


def component(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of one network, without its prefix: `unet.conv_in.bias` -> `conv_in.bias`."""
    prefix = name + "."
    return {path[len(prefix) :]: v for path, v in params.items() if path.startswith(prefix)}


def prefixed(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Inverse of `component`."""
    return {f"{name}.{path}": value for path, value in params.items()}


def is_buffer(path: str) -> bool:
    """Whether an array is a table that files hold and nothing trains: positions of an MMDiT."""
    return path.endswith("pos_embed.pos_embed")
