"""Before the first step: which networks, with which weights, and which tokenizer.

Loaded folders decide what they bring: the architecture, the noise schedule and prediction type
they were trained with, the tokenizer. The configuration decides the rest. `assemble` returns the
configuration with what was adopted written into it, so that `DIR/config.json` says what really ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints.bundle import TOKENIZERS
from sdjax.checkpoints.pretrained import Pretrained, read_any
from sdjax.config import Config, to_dict
from sdjax.data.pipeline import captions
from sdjax.data.tokenizer import Tokenizer
from sdjax.families.conditioning import TOKENS
from sdjax.models.config import ConfigError

TINY_VAE = Path(__file__).parents[1] / "models" / "tiny_vae"
ENCODERS = tuple(TOKENS)
COMPONENTS = ("unet", "vae", *ENCODERS)
_SHOWN = 5  # fields of a network that a line names


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What `assemble` found.

    config: with what loaded folders decided.
    params: loaded ones by path.
    tokenizers: by the field of the batch that each fills, one for each text encoder.
    notes: for the log.
    scheduler: the scheduler file of `init_from`, for what is written at the end; None without one.
    """

    config: Config
    params: dict[str, np.ndarray]
    tokenizers: dict[str, Tokenizer]
    notes: tuple[str, ...]
    scheduler: Mapping[str, Any] | None = None


def assemble(config: Config, *, with_tokenizer: bool = True) -> Assembled:
    """Read every folder that the configuration names.

    Without a tokenizer, no dataset is looked at and the vocabulary's size is left as configured.

    Raises:
        ConfigError: weights that training cannot do without are named nowhere.
        WeightsError, FileNotFoundError: from reading a folder.
    """
    params: dict[str, np.ndarray] = {}
    notes: list[str] = []
    tokenizers: dict[str, Tokenizer] = {}
    scheduler: Mapping[str, Any] | None = None
    sources: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("init_from", config.init_from, COMPONENTS),
        ("vae_from", config.vae_from, ("vae",)),
        ("text_encoder_from", config.text_encoder_from, tuple(config.model.text_encoders)),
    )
    for field, folder, wanted in sources:
        if not folder:
            continue
        if config.task == "autoencoder":
            wanted = ("vae",)
        path = TINY_VAE if field == "vae_from" and folder == "tiny" else folder
        loaded = read_any(path, components=wanted)
        config, adopted = _adopt(config, loaded, wanted, whole=field == "init_from")
        if adopted:
            notes.append(f"{field}={folder} decides {adopted}")
        if field == "init_from" and config.task == "text_to_image":
            scheduler = loaded.scheduler
            if loaded.unsupported_sampler:
                notes.append(
                    f"{field}={folder}: it is sampled with {loaded.unsupported_sampler}, which "
                    "sdjax does not have; pictures are drawn with config.sample.sampler, "
                    f"{config.sample.sampler.name}. What the run writes keeps the scheduler"
                )
        params |= {k: v for k, v in loaded.params.items() if k.split(".")[0] in wanted}
        for name in ENCODERS:
            tokenizer = getattr(loaded, TOKENIZERS[name])
            if tokenizer is not None:
                tokenizers[TOKENS[name]] = tokenizer
    if config.task == "autoencoder" or not with_tokenizer:
        return Assembled(config, params, {}, tuple(notes), scheduler)
    for name in config.model.text_encoders:
        if TOKENS[name] not in tokenizers:
            tokenizers[TOKENS[name]] = _tokenizer(config, name)
    wanted_fields = [TOKENS[name] for name in config.model.text_encoders]
    tokenizers = {field: tokenizers[field] for field in wanted_fields}
    config = _fit_vocabularies(config, tokenizers, loaded=_components(params))
    return Assembled(config, params, tokenizers, tuple(notes), scheduler)


def bundle(
    config: Config,
    tokenizers: Mapping[str, Tokenizer],
    params: Mapping[str, np.ndarray],
    scheduler: Mapping[str, Any] | None = None,
) -> Pretrained:
    """A text-to-image run as a pipeline with these parameters."""
    model = config.model
    return Pretrained(
        unet=model.unet,
        vae=model.vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        schedule=config.schedule,
        prediction_type=config.objective.prediction_type,
        sampler=config.sample.sampler,
        scheduler=scheduler,
        params=params,
        tokenizer=tokenizers.get("tokens"),
        tokenizer_2=tokenizers.get("tokens_2"),
        zero_empty_prompt=model.zero_empty_prompt,
    )


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
                + (f" or config.{name.removesuffix('_2')}_from" if name != "unet" else "")
            )


def _components(params: Mapping[str, Any]) -> set[str]:
    return {path.split(".")[0] for path in params}


def _adopt(
    config: Config, loaded: Pretrained, wanted: tuple[str, ...], *, whole: bool
) -> tuple[Config, str]:
    """The configuration with the loaded networks' own settings, and what these change in it."""
    before = to_dict(config)
    changes: dict[str, Any] = {n: getattr(loaded, n) for n in wanted if n in loaded.networks}
    if whole and any(name in changes for name in ENCODERS):
        # A refiner's folder has one encoder, whatever the recipe has.
        changes |= {name: getattr(loaded, name) for name in ENCODERS}
        changes["zero_empty_prompt"] = loaded.zero_empty_prompt
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    if whole and config.task == "text_to_image" and loaded.schedule is not None:
        config = dataclasses.replace(
            config,
            schedule=loaded.schedule,
            objective=dataclasses.replace(config.objective, prediction_type=loaded.prediction_type),
        )
    return config, _described(before, to_dict(config))


def _described(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The differences, as "model.vae (layers_per_block, ...), objective.prediction_type = ..."."""
    networks: dict[str, list[str]] = {}
    others: list[str] = []
    for path, value in _changes(before, after):
        if path[0] == "model" and len(path) > 2:
            networks.setdefault(".".join(path[:2]), []).append(".".join(path[2:]))
        else:
            others.append(".".join(path) + ("" if isinstance(value, dict) else f" = {value!r}"))
    shown = []
    for network, names in networks.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown.append(f"{network} ({', '.join(names[:_SHOWN])}{more})")
    return ", ".join(shown + others)


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, new value) of each field that differs."""
    for name, value in after.items():
        if isinstance(value, dict) and isinstance(before[name], dict):
            yield from _changes(before[name], value, (*where, name))
        elif value != before[name]:
            yield (*where, name), value


def _tokenizer(config: Config, name: str) -> Tokenizer:
    """Of a text encoder whose folder brought none."""
    length = config.model.text_encoders[name].max_position_embeddings
    path = config.tokenizer.path
    if name == "text_encoder_2":
        path = config.tokenizer.path_2 or path
    if path:
        return Tokenizer.load(path, context_length=length)
    return Tokenizer.train(
        captions(config.data, config.data.split),
        vocab_size=config.tokenizer.vocab_size,
        context_length=length,
    )


def _fit_vocabularies(
    config: Config, tokenizers: Mapping[str, Tokenizer], *, loaded: set[str]
) -> Config:
    """A text encoder that is trained from nothing takes its tokenizer's vocabulary."""
    fitted: dict[str, Any] = {}
    for name, encoder in config.model.text_encoders.items():
        tokenizer = tokenizers[TOKENS[name]]
        if name not in loaded:
            fitted[name] = dataclasses.replace(
                encoder,
                vocab_size=tokenizer.largest_id + 1,
                bos_token_id=tokenizer.bos_id,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.pad_id,
            )
        else:
            tokenizer.check_vocabulary(encoder.vocab_size, name)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fitted))
