"""The `sample` group of the configuration."""

from __future__ import annotations

import dataclasses

from sdjax.diffusion.guidance import SkipLayers
from sdjax.diffusion.samplers import SamplerConfig


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The pictures made while training."""

    prompts: tuple[str, ...] = ()  # () takes captions of the evaluation split
    count: int = 16  # how many of those
    compare: bool = False  # also with the raw weights, and without guidance, side by side
    guidance: float = 7.5
    image_guidance: float = 1.5  # towards the picture, of models that edit one
    guidance_rescale: float = 0.0
    # The number that models read which draw guided pictures from it: those distilled to few steps
    # (8.5 in LatentConsistencyModelPipeline of diffusers), and FLUX.1-dev.
    embedded_guidance: float = 8.5
    skip: SkipLayers = SkipLayers()  # skip-layer guidance, of SD3 and SD3.5
    negative_prompt: str = ""
    sampler: SamplerConfig = SamplerConfig()
    fidelity: int = 0  # pictures the reader of captioned_shapes checks at the end (0: none)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"sample.count is {self.count}; expected at least 1")
