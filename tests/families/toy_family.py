"""A family of its own: three tiny networks and a VAE, nothing of Stable Diffusion's.

Its single files have bare names, a tensor that two weights share, halves in another order, and may
lack the second text encoder.

`toy_run.py` adds it to FAMILIES as a new family would be, by one line, and uses it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families.config import ModelConfig
from sdjax.families.family import Family, Part
from sdjax.families.single_file import FileNetwork, Place, SingleFile, halves_swapped
from sdjax.models.config import read_config
from sdjax.models.layers import conv, normal_init, silu
from sdjax.models.products import Embed, Linear
from sdjax.models.vae import VAE, VAEConfig


class Config:
    """Reading and writing of a flat config."""

    kind = ""
    architecture = ""
    inert = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})

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
        told, init = config.text + 2, normal_init(0.3)
        self.shift = Linear(told, config.width, kernel_init=init, **kw)
        self.gates = Linear(told, 2 * config.width, kernel_init=init, **kw)
        self.conv_out = conv(config.width, config.out_channels, **kw)

    def __call__(self, xt, timesteps, context, *, key=None):
        words = jnp.mean(context["context"], axis=1)
        time = (timesteps / 1000).reshape(-1, 1)
        told = jnp.concatenate([words, time, context["light"]], axis=1)
        scale, more = jnp.split(self.gates(told)[:, None, None, :], 2, axis=-1)
        x = self.conv_in(xt) * (1 + scale) + self.shift(told)[:, None, None, :] + more
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


@dataclasses.dataclass(frozen=True)
class MoodsConfig(Config):
    """As of T5: no BOS, and no length of its own."""

    kind = "moods"
    architecture = "Moods"

    vocab_size: int = 600
    hidden_size: int = 6
    eos_token_id: int = 1
    pad_token_id: int = 0


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
    "moods": Part(
        Words,
        MoodsConfig,
        "moods",
        tokens="mood_tokens",
        tokenizer="mood_tokenizer",
        tokenizer_kind="t5",
        length_setting="mood_length",
    ),
    "vae": Part(VAE, VAEConfig, "AutoencoderKL"),
}


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    parts = PARTS

    family: str = "toy"
    dots: DotsConfig = DotsConfig()
    words: WordsConfig = WordsConfig()
    moods: MoodsConfig | None = MoodsConfig()
    light: float = 0.5
    mood_length: int = 7


def embed(networks, params, tokens, *, empty, key):
    encoders = {name: networks.module(name, params) for name in networks.configs}
    states = [encode(tokens[PARTS[name].tokens]) for name, encode in encoders.items()]
    return {"context": jnp.concatenate(states, axis=1)}


def context(networks, features, batch, *, target, negative):
    light = 0.0 if negative else networks.settings.get("light", ToyConfig.light)
    return {**features, "light": jnp.full((len(features["context"]), 1), light)}


def dots_places(config):
    """`conditions` is `shift` above `gates`, whose halves are swapped."""

    def place(name):
        stem, _, leaf = name.partition(".")
        if stem == "shift":
            return Place(f"conditions.{leaf}", part=0)
        if stem == "gates":
            swap = halves_swapped
            return Place(f"conditions.{leaf}", part=1, to_file=swap, from_file=swap)
        return Place({"conv_in": "first.", "conv_out": "last."}[stem] + leaf)

    return place


def words_of(prefix, config):
    def configure(shapes, prediction):
        vocab, width = shapes["words.weight"]
        return config(vocab_size=vocab, hidden_size=width)

    return FileNetwork((prefix,), configure)


def dots_config(shapes, prediction):
    width, text = shapes["first.weight"][0], shapes["conditions.weight"][1] - 2
    return DotsConfig(width=width, text=text)


TOY_FILE = SingleFile(
    name="toy",
    networks={
        "dots": FileNetwork(
            ("",), dots_config, dots_places, bare=("first.", "conditions.", "last.")
        ),
        "words": words_of("words.", WordsConfig),
        "moods": words_of("moods.", MoodsConfig),
        "vae": FileNetwork(("ae.",), lambda shapes, _: VAEConfig()),
    },
    tells=lambda shapes: "conditions.weight" in shapes,
    objective=lambda shapes: (ScheduleConfig(), "epsilon"),
    scaling_factor=1.0,
    settings={"light": 0.25},
    leftover=lambda name: name if name == "note" else "",
)
TOY = Family(
    name="toy",
    title="the toy",
    config=ToyConfig,
    parts=PARTS,
    denoiser="dots",
    fixed=("light", "mood_length"),
    encodes=("mood_length",),
    halvings=lambda networks: 0,
    check=lambda model: None,
    embed=embed,
    context=context,
    features=("context",),
    numbers={},
    pipelines=("ToyPipeline",),
    pipeline_class=lambda model: "ToyPipeline",
    index=lambda model: dict(model.settings),
    settings_of_index=lambda index: {name: index[name] for name in ("light", "mood_length")},
    scheduler_changes=lambda pipeline: {},
    single_files=(TOY_FILE,),
    single_file=lambda model: "toy",
    presets={"base": ToyConfig()},
)
