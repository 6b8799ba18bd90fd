"""The config of a T2I-Adapter: its shape in the field names of diffusers `T2IAdapter`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.models.config import check, check_bounds, json_values, read_config

FULL, FULL_XL, LIGHT = KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")
_BOUNDS: dict[str, tuple[float, float]] = {
    "channels": (4, 32_768),
    "num_res_blocks": (1, 32),
    "downscale_factor": (1, 256),
}
_MOST_LEVELS = 8


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig:
    """The shape of a T2I-Adapter, in the words of diffusers; the defaults are SD1.5's.

    in_channels: of the condition that it reads: 3, or 1 for its luma alone.
    channels: widths of its maps.
    num_res_blocks: blocks for each map.
    downscale_factor: pixels along the side of a patch, which its first convolution reads at once.
    adapter_type: KINDS; of "light_adapter" the last width stands for two maps.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = FULL

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        check(self.in_channels in (1, 3), "in_channels", self.in_channels, "1 or 3")
        widths = self.channels
        levels = f"1 to {_MOST_LEVELS} widths"
        check(1 <= len(widths) <= _MOST_LEVELS, "channels", widths, levels)
        check(self.adapter_type in KINDS, "adapter_type", self.adapter_type, f"one of {KINDS}")
        if self.adapter_type == FULL_XL:  # whose blocks 3 and on have no convolution for it
            same = len(set(widths[2:])) <= 1
            check(same, "channels", widths, "the same width from the third on")

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """(channels, pixels of the condition along its side) of each map that it makes."""
        widths, factor = self.channels, self.downscale_factor
        if self.adapter_type == FULL_XL:  # which halves once
            return tuple((c, factor * (2 if i > 1 else 1)) for i, c in enumerate(widths))
        if self.adapter_type == LIGHT:
            widths = (*widths, widths[-1])
        return tuple((c, factor * 2**i) for i, c in enumerate(widths))

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "t2i_adapter/config.json"
    ) -> tuple[T2IAdapterConfig, list[str]]:
        """(config, ignored fields) of a diffusers config; see `config.read_config`."""
        return read_config(cls, data, where=where)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json with which diffusers builds the same network."""
        return {"_class_name": "T2IAdapter", **json_values(self)}
