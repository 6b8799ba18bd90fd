"""The config of FLUX.1's transformer, in the field names of diffusers `FluxTransformer2DModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sdjax.models.config import check, check_bounds, json_values, read_config

PATCH = 2  # a token is a square of 2 x 2 latents (pipeline_flux.py, _pack_latents)
AXES = 3  # of a position: picture, row, column

# A field of diffusers that is not implemented, with the value of every release.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"patch_size": (1,)}
# Far beyond any network there is: the largest has 19 and 38 blocks of 24 heads of 128 channels.
_BOUNDS: dict[str, tuple[float, float]] = {
    "in_channels": (4, 65_536),
    "out_channels": (4, 65_536),
    "num_layers": (1, 256),
    "num_single_layers": (1, 256),
    "attention_head_dim": (6, 1024),
    "num_attention_heads": (1, 1024),
    "joint_attention_dim": (1, 65_536),
    "pooled_projection_dim": (1, 65_536),
    "axes_dims_rope": (2, 1024),
}


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """The shape of a FLUX.1 transformer, in the words of diffusers; the defaults are FLUX.1-dev.

    in_channels, out_channels: of tokens, 4 times those of latents. Those of FLUX.1-Fill and of
      FLUX.1-Canny and -Depth read more channels than they predict. None for as many.
    num_layers: blocks with weights of their own for text and picture.
    num_single_layers: blocks with the same weights for both, which follow.
    joint_attention_dim: width of the text features.
    pooled_projection_dim: width of the pooled caption.
    guidance_embeds: whether the network reads a guidance scale; FLUX.1-schnell does not.
    axes_dims_rope: channels of a head that turn with the picture's index, the row and the column.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    # Latent size that pipelines draw by default, which files do not say (pipeline_flux.py).
    sample_size: ClassVar[int] = 128

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        for field in ("in_channels", "out_channels"):
            value = getattr(self, field)
            expected = f"a multiple of {PATCH**2}: tokens are {PATCH} x {PATCH} latents"
            check(value is None or value % PATCH**2 == 0, field, value, expected)
        check(
            self.outputs <= self.in_channels,
            "out_channels",
            self.out_channels,
            f"at most in_channels = {self.in_channels}: the first are the noisy latents",
        )
        axes, width = self.axes_dims_rope, self.attention_head_dim
        check(
            len(axes) == AXES and all(dim % 2 == 0 for dim in axes) and sum(axes) == width,
            "axes_dims_rope",
            axes,
            f"{AXES} even numbers of sum attention_head_dim = {width}",
        )

    @property
    def outputs(self) -> int:
        """Channels of a token that the network predicts."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def width(self) -> int:
        """Channels of the tokens within the network."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latents."""
        return self.outputs // PATCH**2

    @property
    def added_channels(self) -> int:
        """Channels of latents that the network reads beside the noisy ones."""
        return (self.in_channels - self.outputs) // PATCH**2

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], where: str = "transformer/config.json"
    ) -> tuple[FluxConfig, list[str]]:
        """(config, ignored fields) of a diffusers config; see `config.read_config`."""
        return read_config(
            cls, data, where=where, neutral=_NEUTRAL, absent={"guidance_embeds": False}
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json with which diffusers builds the same network."""
        return {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **json_values(self)}
