"""Before the first step: which networks, with which weights, and which tokenizer.

Loaded folders decide what they bring: the architecture, the noise schedule and prediction type
they were trained with, the tokenizer. The configuration decides the rest. `assemble` returns the
configuration with what was adopted written into it, so that `DIR/config.json` says what really ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sdjax.checkpoints.reading import locate, read_source
from sdjax.checkpoints.references import FIELDS, Source
from sdjax.checkpoints.widening import reading_guidance, widened
from sdjax.config import Config, to_dict
from sdjax.data.pipeline import captions
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.data.text.tokenizers import KINDS, inner_folder, load_tokenizer
from sdjax.families.family import AUTOENCODER, Model
from sdjax.families.registry import FAMILIES, NETWORKS, TOKENIZERS, adopted
from sdjax.formats.folders import folder_kind
from sdjax.formats.single_file import Hints
from sdjax.methods.registry import METHODS
from sdjax.models.config import ConfigError
from sdjax.models.params import is_buffer

_SHOWN = 5  # fields of a network that a line names


@dataclasses.dataclass(frozen=True)
class Assembled:
    """The result of `assemble`.

    config: with what loaded folders decided.
    params: loaded ones by path.
    tokenizers: by the field of the batch that each fills, one for each text encoder.
    notes: for the log.
    scheduler: the scheduler file of `init_from`, for what is written at the end; None without one.
    sources: {network: where its parameters were read}.
    derived: {path: array} of what a method makes of the loaded ones; see `Method.start`.
    """

    config: Config
    params: dict[str, np.ndarray]
    tokenizers: dict[str, TextTokenizer]
    notes: tuple[str, ...]
    scheduler: Mapping[str, Any] | None = None
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def every(self) -> dict[str, np.ndarray]:
        """{path: array} of what was loaded and what follows from it."""
        return {**self.params, **self.derived}


def assemble(config: Config, *, with_tokenizer: bool = True) -> Assembled:
    """Read every folder that the configuration names.

    Without a tokenizer, no dataset is looked at and the vocabulary's size is left as configured.

    Raises:
        ConfigError: weights that training cannot do without are named nowhere.
        WeightsError, FileNotFoundError: from reading a folder.
    """
    params: dict[str, np.ndarray] = {}
    notes: list[str] = []
    tokenizers: dict[str, TextTokenizer] = {}
    scheduler: Mapping[str, Any] | None = None
    sources: dict[str, Source] = {}
    draws = config.draws
    if not config.init_from and (config.init_prediction_type or config.init_zero_terminal_snr):
        raise ConfigError(
            "init_prediction_type and init_zero_terminal_snr correct what init_from says, which is "
            "empty: set objective.prediction_type and schedule.zero_terminal_snr in their place"
        )
    kind = METHODS[config.method.name]
    for field, folder in _sources(config):
        wanted = kind.networks(dict.fromkeys(_brought_by(field, config)))
        source = locate(field, folder)
        if folder_kind(source.place) == "single_file":
            wanted = _not_replaced(field, config, wanted)
        hints = _hints(field, config, with_tokenizer=with_tokenizer)
        read = read_source(source, wanted, hints)
        name = f"{field}={folder}"
        wide, widening = widened(read, kind.task, name=name, vae=config.model.vae)
        loaded, told = reading_guidance(wide, kind.guidance_width(config.method), name=name)
        config, decided = _adopt(config, loaded, wanted, whole=field == "init_from")
        if decided:
            notes.append(f"{field}={folder} decides {decided}")
        notes += [note for note in (widening, told) if note]
        if field == "init_from" and draws:
            scheduler = loaded.scheduler
            notes += _sampler_notes(loaded, config, name)
        params |= {k: v for k, v in loaded.params.items() if k.split(".")[0] in wanted}
        sources |= dict.fromkeys(_components(loaded.params), source)
        if wide.networks != read.networks:  # so what is frozen of it is copied, and not referred to
            sources.pop(loaded.family.denoiser, None)
        tokenizers |= loaded.tokenizers
    if not (draws and with_tokenizer):
        return Assembled(config, params, {}, tuple(notes), scheduler, sources)
    fields = {name: part.tokens for name, part in config.model.parts.items() if part.tokens}
    for name in config.model.text_encoders:
        if fields[name] not in tokenizers:
            tokenizers[fields[name]] = _tokenizer(config, name)
    tokenizers = {
        fields[name]: _of_length(config, name, tokenizers[fields[name]])
        for name in config.model.text_encoders
    }
    config = _fit_vocabularies(config, tokenizers, loaded=_components(params))
    tokenizers = dict(kind.tokenizers(config.method, tokenizers))
    return Assembled(config, params, tokenizers, tuple(notes), scheduler, sources)


def _sampler_notes(loaded: Model, config: Config, name: str) -> list[str]:
    """A line on what draws in place of a model's own sampler, if sdjax does not have it."""
    if not loaded.unsupported_sampler:
        return []
    return [
        f"{name}: it is sampled with {loaded.unsupported_sampler}, which sdjax does not have; "
        f"pictures are drawn with config.sample.sampler, {config.sample.sampler.name}. What the "
        "run writes keeps the scheduler"
    ]


def _of_length(config: Config, name: str, tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer of an encoder, for as many tokens as the recipe says if it has a say."""
    model = config.model
    if not model.parts[name].length_setting:
        return tokenizer
    family = FAMILIES[model.family]
    return tokenizer.of_length(family.text_length(name, model.networks[name], model.settings))


def _sources(config: Config) -> Iterator[tuple[str, str]]:
    """(field, folder) of each folder that brings networks, in the order in which they decide."""
    for field in FIELDS:
        if folder := getattr(config, field):
            yield field, folder


def _not_replaced(field: str, config: Config, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The networks that no later field brings: in a single file, others would want a tokenizer."""
    later = [f for f in FIELDS[FIELDS.index(field) + 1 :] if getattr(config, f)]
    replaced = {name for f in later for name in _brought_by(f, config)}
    return tuple(name for name in wanted if name not in replaced)


def _hints(field: str, config: Config, *, with_tokenizer: bool) -> Hints:
    """Return what the recipe says of a single file that does not say it."""
    model, vae, tokenizer = config.model, config.model.vae, config.tokenizer
    settings = {part.length_setting for part in model.parts.values() if part.length_setting}
    first = field == "init_from"
    return Hints(
        tokenizer=tokenizer.path if with_tokenizer else None,
        tokenizer_2=tokenizer.path_2,
        prediction_type=config.init_prediction_type if first else "",
        zero_terminal_snr=config.init_zero_terminal_snr and first,
        alone=(vae.scaling_factor, vae.shift_factor),
        lengths={name: model.settings[name] for name in settings},
    )


def _brought_by(field: str, config: Config) -> tuple[str, ...]:
    """Names of the networks that a folder in a field can bring."""
    if field == "vae_from":
        return (AUTOENCODER,)
    return tuple(config.model.text_encoders) if field == "text_encoder_from" else NETWORKS


def check_complete(config: Config, params: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
    """Check that every network that is not trained has loaded weights.

    Buffers need none: a new network has the right ones.

    Raises:
        ConfigError: naming the network and the fields that can bring it.
    """
    for name in sorted(_components({path for path in frozen if not is_buffer(path)})):
        if name not in _components(params):
            raise ConfigError(
                f"the {name} has no weights and (in part) is not trained: set config.init_from (a "
                f"whole diffusers folder or sdjax workdir)"
                + "".join(f" or config.{f}" for f in FIELDS[1:] if name in _brought_by(f, config))
            )


def _components(params: Iterable[str]) -> set[str]:
    return {path.split(".")[0] for path in params}


def _adopt(
    config: Config, loaded: Model, wanted: tuple[str, ...], *, whole: bool
) -> tuple[Config, str]:
    """The configuration with the loaded networks' own settings, and what these change in it."""
    before = to_dict(config)
    whole = whole and config.draws
    config = dataclasses.replace(config, model=adopted(config.model, loaded, wanted, whole=whole))
    if whole and loaded.schedule is not None:
        schedule, kind = loaded.schedule, config.init_prediction_type or loaded.prediction_type
        if config.init_zero_terminal_snr:
            schedule = dataclasses.replace(schedule, zero_terminal_snr=True)
        objective = dataclasses.replace(config.objective, prediction_type=kind)
        config = dataclasses.replace(config, schedule=schedule, objective=objective)
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
        if isinstance(value, dict) and isinstance(before.get(name), dict):
            yield from _changes(before[name], value, (*where, name))
        elif value != before.get(name):
            yield (*where, name), value


def _tokenizer(config: Config, name: str) -> TextTokenizer:
    """The tokenizer of a text encoder that no folder brought one for."""
    model, part = config.model, config.model.parts[name]
    family = FAMILIES[model.family]
    length = family.text_length(name, model.text_encoders[name], model.settings)
    path = config.tokenizer.path
    if part.tokenizer != next(iter(TOKENIZERS.values())):
        path = config.tokenizer.path_2 or path
    if path:
        return load_tokenizer(part.tokenizer_kind, inner_folder(path, part.tokenizer), length)
    return KINDS[part.tokenizer_kind].train(
        captions(config.data, config.data.split),
        vocab_size=config.tokenizer.vocab_size,
        context_length=length,
    )


def _fit_vocabularies(
    config: Config, tokenizers: Mapping[str, TextTokenizer], *, loaded: set[str]
) -> Config:
    """A text encoder that is trained from nothing takes its tokenizer's vocabulary."""
    fitted: dict[str, Any] = {}
    for name, encoder in config.model.text_encoders.items():
        tokenizer = tokenizers[config.model.parts[name].tokens]
        if name not in loaded:
            size = {"vocab_size": tokenizer.largest_id + 1}
            fitted[name] = dataclasses.replace(encoder, **size, **tokenizer.special_ids)
        else:
            tokenizer.check_vocabulary(encoder.vocab_size, name)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fitted))
