"""The config of SD3's denoiser: its shape in the field names of `SD3Transformer2DModel`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from sdjax.models.config import check, check_bounds, json_values, read_config

RMS_NORM = "rms_norm"

# Defaults of diffusers' SD3Transformer2DModel that differ from SD3-medium.
_ABSENT = {
    "num_layers": 18,
    "num_attention_heads": 18,
    "caption_projection_dim": 1152,
    "pos_embed_max_size": 96,
}
# Far beyond any network there is: SD3.5-large has 38 blocks of width 2,432.
_BOUNDS: dict[str, tuple[float, float]] = {
    "sample_size": (1, 4096),
    "patch_size": (1, 64),
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "num_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "attention_head_dim": (4, 4096),
    "joint_attention_dim": (1, 65_536),
    "caption_projection_dim": (4, 65_536),
    "pooled_projection_dim": (1, 65_536),
    "pos_embed_max_size": (1, 4096),
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """The shape of an MMDiT; the defaults are those of SD3-medium.

    sample_size: side of the latents that pipelines draw by default. New position tables count in
      its patches.
    joint_attention_dim: width of the text features.
    caption_projection_dim: width of the text tokens, equal to heads times attention_head_dim.
    pooled_projection_dim: width of the pooled caption.
    pos_embed_max_size: side of the position table, in patches.
    dual_attention_layers: the blocks with a second attention over the image (SD3.5-medium: 0-12).
    qk_norm: "rms_norm" of queries and keys (SD3.5), or None.

    Raises ValueError that names a field, its value and the expected values.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 192
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        heads = f"num_attention_heads * attention_head_dim = {self.width}"
        width = self.caption_projection_dim
        check(width == self.width, "caption_projection_dim", width, heads)
        # The position code has a sine and a cosine for rows and for columns.
        check(self.width % 4 == 0, "attention_head_dim", self.attention_head_dim,
              f"4 to divide {heads}")  # fmt: skip
        check(self.sample_size >= self.patch_size, "sample_size", self.sample_size,
              f"patch_size = {self.patch_size} or more")  # fmt: skip
        dual = self.dual_attention_layers
        within = all(0 <= i < self.num_layers for i in dual) and len(set(dual)) == len(dual)
        check(within, "dual_attention_layers", dual,
              f"different numbers below num_layers = {self.num_layers}")  # fmt: skip
        check(self.qk_norm in (None, RMS_NORM), "qk_norm", self.qk_norm, f"{RMS_NORM!r} or null")

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    def runs(self) -> list[tuple[bool, bool, int]]:
        """Return (dual, last, count) of each run of equal blocks, in order."""
        dual, last = set(self.dual_attention_layers), self.num_layers - 1
        kinds = [(i in dual, i == last) for i in range(self.num_layers)]
        return [(*kind, len(list(group))) for kind, group in itertools.groupby(kinds)]

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "transformer/config.json"
    ) -> tuple[MMDiTConfig, list[str]]:
        """Read a diffusers `config.json`; return the config and the names of ignored fields.

        Raises:
            ConfigError: some fields are unknown or not supported; the message lists them.
        """
        channels = data.get("in_channels", cls.in_channels)
        return read_config(cls, data, where=where, absent=_ABSENT, null={"out_channels": channels})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json with which diffusers builds the same network."""
        return {"_class_name": "SD3Transformer2DModel", **json_values(self)}
