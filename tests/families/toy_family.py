"""A family of its own: two tiny networks and a VAE, nothing of Stable Diffusion's.

`toy_run.py` adds it to FAMILIES as a new family would be, by one line, and uses it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.families.config import ModelConfig
from sdjax.families.family import Family, Part
from sdjax.models.config import read_config
from sdjax.models.layers import conv, normal_init, silu
from sdjax.models.products import Embed, Linear
from sdjax.models.vae import VAE, VAEConfig


class Config:
    """Reading and writing of a flat config."""

    kind = ""
    architecture = ""

    @classmethod
    def from_json(cls, data, where="config.json"):
        return read_config(cls, data, where=where)

    def to_json(self) -> dict[str, Any]:
        return {"_class_name": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class DotsConfig(Config):
    kind = "Dots"

    sample_size: int = 8
    in_channels: int = 4
    out_channels: int = 4
    width: int = 8
    text: int = 6


class Dots(nnx.Module):
    """Predicts from latents, the timestep, the mean of the words and the picture's brightness."""

    def __init__(self, config, *, dtype=jnp.float32, param_dtype=jnp.float32, remat="none", rngs):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv_in = conv(config.in_channels, config.width, **kw)
        self.conditions = Linear(config.text + 2, config.width, kernel_init=normal_init(0.3), **kw)
        self.conv_out = conv(config.width, config.out_channels, **kw)

    def __call__(self, xt, timesteps, context, *, key=None):
        words = jnp.mean(context["context"], axis=1)
        time = (timesteps / 1000).reshape(-1, 1)
        told = jnp.concatenate([words, time, context["light"]], axis=1)
        x = self.conv_in(xt) + self.conditions(told)[:, None, None, :]
        return self.conv_out(silu(x)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class WordsConfig(Config):
    kind = "words"
    architecture = "Words"

    vocab_size: int = 600
    hidden_size: int = 6
    max_position_embeddings: int = 12
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 1


class Words(nnx.Module):
    """A table of words."""

    def __init__(self, config, *, dtype=jnp.float32, param_dtype=jnp.float32, remat="none", rngs):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.words = Embed(
            config.vocab_size, config.hidden_size, embedding_init=normal_init(1.0), **kw
        )

    def __call__(self, tokens, key=None):
        return self.words(tokens)


PARTS = {
    "dots": Part(Dots, DotsConfig, "Dots"),
    "words": Part(Words, WordsConfig, "words", tokens="word_tokens", tokenizer="word_tokenizer"),
    "vae": Part(VAE, VAEConfig, "AutoencoderKL"),
}


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    parts = PARTS

    family: str = "toy"
    dots: DotsConfig = DotsConfig()
    words: WordsConfig = WordsConfig()
    light: float = 0.5


def embed(networks, params, tokens, *, empty, key):
    return {"context": networks.module("words", params)(tokens["word_tokens"])}


def context(networks, features, batch, *, target, negative):
    light = 0.0 if negative else networks.settings.get("light", ToyConfig.light)
    return {**features, "light": jnp.full((len(features["context"]), 1), light)}


TOY = Family(
    name="toy",
    title="the toy",
    config=ToyConfig,
    parts=PARTS,
    denoiser="dots",
    fixed=("light",),
    halvings=lambda networks: 0,
    check=lambda model: None,
    embed=embed,
    context=context,
    features=("context",),
    numbers={},
    pipelines=("ToyPipeline",),
    pipeline_class=lambda model: "ToyPipeline",
    index=lambda model: {"light": model.settings["light"]},
    settings_of_index=lambda index: {"light": index["light"]},
    scheduler_changes=lambda pipeline: {},
    single_files=(),
    single_file=lambda model: "",
    presets={"base": ToyConfig()},
)
