"""The trainer's own step at a size that is benchmarked: its configuration, program and arguments.

The step trains the UNet alone, from latents' moments and text features that were computed before
(`data.name = "encoded"` with `data.text_embeddings`): what a trainer does for every image, once
pictures and captions are encoded ahead. Captions are not dropped, so no text encoder runs. The VAE
and the text encoders of the configuration are there for their shapes, as small as can be.

Imports no more than jax, flax, optax and what they bring, and safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from sizes import SIZES, Size

from sdjax.config import Config, TrainConfig
from sdjax.config_model import blank_method
from sdjax.data.config import DataConfig
from sdjax.diffusion.losses import ObjectiveConfig
from sdjax.families.sd import SDConfig
from sdjax.families.sdxl import SDXLConfig
from sdjax.methods.method import Method
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.layers import check_remat
from sdjax.models.params import Params
from sdjax.models.vae import VAEConfig
from sdjax.optim.ema import EMAConfig
from sdjax.optim.optimizers import OptimConfig
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train.program import Program, build
from sdjax.train.state import State

# Stable Diffusion's factor of 8 between pixels and latents, and its 4 channels; no other part runs.
_VAE = VAEConfig(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=4)


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of the benchmark.

    resolution: of square pictures, in pixels. batch: images of an optimizer step, over all devices,
    taken in `accumulation` micro-batches. remat, attention: `model.remat`, `model.attention`.
    """

    size: str
    resolution: int
    dtype: str
    remat: str
    attention: str
    batch: int
    accumulation: int
    ema: bool = True


def own_resolution(size: str) -> int:
    """Pixels of the pictures that a UNet of this size is published for."""
    side = SIZES[size].unet.sample_size
    assert isinstance(side, int)
    return side * _VAE.downscale


def make_config(row: Row) -> Config:
    """The trainer's configuration of a row.

    Raises:
        ValueError: naming the field that has a wrong value, and what is expected.
    """
    if row.resolution % _VAE.downscale:
        raise ValueError(
            f"resolution is {row.resolution}; expected a multiple of {_VAE.downscale} pixels"
        )
    check_remat(row.remat)
    return Config(
        model=(SDXLConfig if SIZES[row.size].pooled else SDConfig)(
            unet=SIZES[row.size].unet,
            vae=_VAE,
            **_text_encoders(SIZES[row.size]),
            dtype=row.dtype,
            remat=row.remat,
            attention=row.attention,
        ),
        objective=ObjectiveConfig(caption_dropout=0.0),
        data=DataConfig(
            name="encoded",
            path="made of random numbers",
            text_embeddings=True,
            resolution=row.resolution,
            batch_size=row.batch,
        ),
        optim=OptimConfig(name="adamw", weight_decay=0.01, groups=((r"^text_encoder", 0.0),)),
        ema=EMAConfig(profiles=("warmup-0.9999",) if row.ema else ()),
        train=TrainConfig(accumulation=row.accumulation),
    )


def _text_encoders(size: Size) -> dict[str, CLIPTextConfig]:
    """Such that their states are as wide and as long as the UNet's context."""

    def encoder(width: int, pooled: int | None = None) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=4,
            hidden_size=width,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=size.tokens,
            projection_dim=pooled,
        )

    width = size.unet.cross_attention_dim
    if not size.pooled:
        return {"text_encoder": encoder(width)}
    return {
        "text_encoder": encoder(width - size.pooled),
        "text_encoder_2": encoder(size.pooled, size.pooled),
    }


@dataclasses.dataclass(frozen=True)
class Bench:
    """The method of a configuration and the jitted step, over all devices of this process."""

    config: Config
    method: Method
    program: Program

    def state(self, seed: int = 0) -> State:
        """Before the first step. Drawn by NumPy: XLA takes longer to compile the real beginning,
        which has some zeros more, than NumPy takes to draw this one."""
        rng = np.random.default_rng(seed)
        shardings = self.program.state_shardings
        params = {
            path: jax.device_put(_parameter(rng, path, leaf.shape), shardings["params"][path])
            for path, leaf in self.program.split.trained.items()
        }
        return jax.jit(self.program.fresh, donate_argnums=0, out_shardings=shardings)(params)

    def frozen(self) -> Params:
        """Zeros: the step reads none of them."""
        return _placed(self.program.frozen, lambda name, leaf: np.zeros(leaf.shape, leaf.dtype))

    def batch(self, seed: int = 0) -> dict[str, jax.Array]:
        """Standard normal moments and text features; sizes of pictures that were not cropped."""
        side = self.config.data.resolution
        rng = np.random.default_rng(seed)

        def fill(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            if name == "size":
                return np.broadcast_to(np.asarray([side, side, 0, 0], leaf.dtype), leaf.shape)
            return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

        return _placed(self.program.batch, fill)


def make_bench(config: Config) -> Bench:
    """The program that the trainer would run, over a mesh of all devices.

    Raises:
        UserError: the batch does not spread over the devices and micro-batches.
    """
    method = blank_method(config)
    return Bench(config, method, build(config, method, make_mesh(MeshConfig())))


def _parameter(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32: norms at 1, biases at 0, kernels that keep the variance of what they multiply."""
    if path.endswith(".scale"):
        return np.ones(shape, np.float32)
    if path.endswith(".bias"):
        return np.zeros(shape, np.float32)
    drawn = rng.standard_normal(shape, np.float32)
    return drawn / np.float32(np.sqrt(np.prod(shape[:-1])))


def _placed(
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    fill: Callable[[str, jax.ShapeDtypeStruct], np.ndarray],
) -> dict[str, jax.Array]:
    return {n: jax.device_put(fill(n, wanted[n]), wanted[n].sharding) for n in sorted(wanted)}
