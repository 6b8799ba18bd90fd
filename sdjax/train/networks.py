"""Before the first step: which networks, with which weights, and which tokenizer.

Loaded folders decide what they bring: the architecture, the noise schedule and prediction type
they were trained with, the tokenizer. The configuration decides the rest. `assemble` returns the
configuration with what was adopted written into it, so that `DIR/config.json` says what really ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.config import Config, to_dict
from sdjax.data.pipeline import captions
from sdjax.data.tokenizer import Tokenizer
from sdjax.models.config import ConfigError
from sdjax.train.pretrained import Pretrained, read_any

TINY_VAE = Path(__file__).parents[1] / "models" / "tiny_vae"
COMPONENTS = ("unet", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class Assembled:
    """config: with what loaded folders decided; params: loaded ones by path; notes: for the log."""

    config: Config
    params: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]


def assemble(config: Config, *, with_tokenizer: bool = True) -> Assembled:
    """Read every folder that the configuration names.

    Without a tokenizer, no dataset is looked at and the vocabulary's size is left as configured.

    Raises:
        ConfigError: weights that training cannot do without are named nowhere.
        WeightsError, FileNotFoundError: from reading a folder.
    """
    params: dict[str, np.ndarray] = {}
    notes: list[str] = []
    tokenizer = None
    sources = (
        ("init_from", config.init_from, COMPONENTS),
        ("vae_from", config.vae_from, ("vae",)),
        ("text_encoder_from", config.text_encoder_from, ("text_encoder",)),
    )
    for field, folder, wanted in sources:
        if not folder:
            continue
        if config.task == "autoencoder":
            wanted = ("vae",)
        path = TINY_VAE if field == "vae_from" and folder == "tiny" else folder
        loaded = read_any(path, components=wanted)
        config, adopted = _adopt(config, loaded, wanted, whole=field == "init_from")
        notes += [f"{field}={folder}: {note}" for note in adopted]
        params |= {k: v for k, v in loaded.params.items() if k.split(".")[0] in wanted}
        tokenizer = loaded.tokenizer or tokenizer
    if config.task == "autoencoder" or not with_tokenizer:
        return Assembled(config, params, None, tuple(notes))
    if tokenizer is None:
        tokenizer = _tokenizer(config)
    config = _fit_vocabulary(config, tokenizer, loaded="text_encoder" in _components(params))
    return Assembled(config, params, tokenizer, tuple(notes))


def check_complete(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
    """What is not trained must have been loaded from somewhere.

    Raises:
        ConfigError: naming the network and the fields that can bring it.
    """
    for name in sorted(_components(frozen)):
        if name not in _components(params):
            raise ConfigError(
                f"the {name} has no weights and (in part) is not trained: set config.init_from (a "
                f"whole diffusers folder or sdjax workdir)"
                + (f" or config.{name}_from" if name != "unet" else "")
            )


def _components(params: Mapping[str, Any]) -> set[str]:
    return {path.split(".")[0] for path in params}


def _adopt(
    config: Config, loaded: Pretrained, wanted: tuple[str, ...], *, whole: bool
) -> tuple[Config, list[str]]:
    """The configuration with the loaded networks' own settings, and a line for each change."""
    before = to_dict(config)
    networks = {name: getattr(loaded, name) for name in wanted if getattr(loaded, name) is not None}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **networks))
    if whole and config.task == "text_to_image" and loaded.schedule is not None:
        config = dataclasses.replace(
            config,
            schedule=loaded.schedule,
            objective=dataclasses.replace(config.objective, prediction_type=loaded.prediction_type),
        )
    return config, _changes(before, to_dict(config))


def _changes(before: dict, after: dict, where: str = "config") -> list[str]:
    lines = []
    for name, value in after.items():
        if isinstance(value, dict):
            lines += _changes(before[name], value, f"{where}.{name}")
        elif value != before[name]:
            lines.append(f"{where}.{name} = {value!r} (the recipe says {before[name]!r})")
    return lines


def _tokenizer(config: Config) -> Tokenizer:
    length = config.model.text_encoder.max_position_embeddings
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path, context_length=length)
    return Tokenizer.train(
        captions(config.data, config.data.split),
        vocab_size=config.tokenizer.vocab_size,
        context_length=length,
    )


def _fit_vocabulary(config: Config, tokenizer: Tokenizer, *, loaded: bool) -> Config:
    """A text encoder that is trained from nothing takes its tokenizer's vocabulary."""
    encoder = config.model.text_encoder
    if loaded:
        if tokenizer.vocab_size > encoder.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the text encoder's "
                f"vocab_size is {encoder.vocab_size}: they do not belong together"
            )
        return config
    encoder = dataclasses.replace(
        encoder,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, text_encoder=encoder)
    )
