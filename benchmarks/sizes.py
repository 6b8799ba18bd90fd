"""The UNets that are benchmarked, by name."""

from __future__ import annotations

import dataclasses

from sdjax.families.sd import UNET_SD2
from sdjax.families.sdxl import UNET_SDXL
from sdjax.models.unet_config import UNetConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """A UNet and what it is given besides latents and timesteps.

    unet: `unet.sample_size` is the latent side of the published resolution.
    tokens: length of the text context, whose width is `unet.cross_attention_dim`.
    pooled: width of the pooled caption (SDXL), 0 for none; time_ids: numbers about the picture.
    """

    unet: UNetConfig
    tokens: int = 77
    pooled: int = 0
    time_ids: int = 0


SIZES = {
    # SD1.5's blocks in the least width that GroupNorm of 32 groups allows.
    "tiny": Size(
        UNetConfig(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=32,
        ),
        tokens=16,
    ),
    # SD1.5 at a fifth of its width: 37.5 million parameters.
    "small": Size(UNetConfig(sample_size=32, block_out_channels=(64, 128, 256, 256))),
    "sd15": Size(UNetConfig()),
    "sd21": Size(UNET_SD2),
    "sdxl": Size(UNET_SDXL, pooled=1280, time_ids=6),
}
