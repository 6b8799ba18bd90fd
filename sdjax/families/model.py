"""The record of a model: its networks, and how they are run."""

from __future__ import annotations

import dataclasses

from sdjax.models.clip import CLIPTextConfig
from sdjax.models.kernels.choice import WANTED
from sdjax.models.unet import UNetConfig
from sdjax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The networks. With `init_from` and its kin the loaded folder decides these instead."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text_encoder: CLIPTextConfig | None = CLIPTextConfig()  # None for SDXL's refiner
    text_encoder_2: CLIPTextConfig | None = None  # of SDXL and its refiner, with a projection
    # SDXL: an empty caption is zeros, in training and drawing, and not the encoding of "".
    zero_empty_prompt: bool = False
    # What a refiner is told of every picture, and of what guidance leads away from.
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    dtype: str = "float32"  # of matmuls and convolutions; parameters stay in float32
    remat: str = "none"  # "attention", "block", "full" or the name of a jax.checkpoint policy
    # "auto": the kernel that is faster there; "dense": none; "flash" (TPU), "cudnn" (NVIDIA GPUs):
    # that one, wherever it takes the shape.
    attention: str = "auto"

    def __post_init__(self):
        if self.attention not in WANTED:
            raise ValueError(
                f"model.attention is {self.attention!r}; expected one of {', '.join(WANTED)}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "model.attention is 'cudnn', which has no float32; set model.dtype to 'bfloat16', "
                "or model.attention to 'auto'"
            )

    @property
    def text_encoders(self) -> dict[str, CLIPTextConfig]:
        """{name: config} of those that are there."""
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: encoder for name, encoder in both.items() if encoder is not None}
