"""The config of an IP-Adapter, which its files leave to their shapes."""

from __future__ import annotations

import dataclasses

from sdjax.models.config import check, check_bounds

_BOUNDS: dict[str, tuple[float, float]] = {
    "embedding_dim": (1, 65_536),
    "cross_attention_dim": (1, 65_536),
    "tokens": (1, 4096),
    "widths": (1, 32_768),
    "resampler_layers": (0, 64),
    "resampler_width": (0, 32_768),
}
_MOST_LAYERS = 4096
HEAD = 64  # width of the resampler's heads, which files do not say (resampler.py, dim_head)


@dataclasses.dataclass(frozen=True)
class IPAdapterConfig:
    """The shape of an IP-Adapter; the defaults are those of ip-adapter_sd15 but for the widths.

    embedding_dim: of the features that a CLIP image tower has for a picture: 1024 of ViT-H/14, 1280
        of ViT-bigG/14. With a resampler of those that it has for each patch, 1280 of ViT-H/14.
    cross_attention_dim: of the text features that the UNet reads.
    tokens: the number of words, as it were, that a picture becomes.
    widths: of each cross-attention of the UNet, in the order of its `attn_processors`: on the way
        down, then up, then in the middle.
    resampler_layers: of IP-Adapter Plus, whose tokens are made of patches; 0 for the plain form.
    resampler_width: of these layers, a multiple of HEAD.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """

    embedding_dim: int = 1024
    cross_attention_dim: int = 768
    tokens: int = 4
    widths: tuple[int, ...] = (320,)
    resampler_layers: int = 0
    resampler_width: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        count = len(self.widths)
        check(1 <= count <= _MOST_LAYERS, "widths", count, f"1 to {_MOST_LAYERS:,} of them")
        width, layers = self.resampler_width, self.resampler_layers
        fits = bool(width) == bool(layers) and width % HEAD == 0
        expected = f"a multiple of {HEAD} with resampler_layers, and 0 without"
        check(fits, "resampler_width", width, expected)
