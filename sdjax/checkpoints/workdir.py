"""The workdir of a training run, or of a conversion: what is in it besides checkpoints.

config.json          the resolved configuration
tokenizer/           in the layout of transformers; of further encoders, tokenizer_2/ and so on
scheduler/           the scheduler_config.json of the diffusers folder that it came from, if it did
frozen.json          where each network lies that is not trained and not copied (`references`)
frozen.safetensors   {path: array} of what is not trained and copied, under sdjax's own names
checkpoints/STEP/    see `sdjax.checkpoints.checkpoint`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.checkpoints import saved_state
from sdjax.checkpoints.checkpoint import Checkpoints, checkpoint_folder, latest_step, restore_params
from sdjax.checkpoints.references import follow, read_references, write_references
from sdjax.config import Config, resolve, to_dict
from sdjax.config_model import model_of_run
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.data.text.tokenizer_files import TokenizerError
from sdjax.data.text.tokenizers import load_tokenizer
from sdjax.families.bind import bind
from sdjax.families.embeddings import count_of
from sdjax.families.family import Model
from sdjax.families.registry import FAMILIES, NETWORKS, TOKENIZERS, adopted, model_of
from sdjax.formats.adapters.layers import Adapter
from sdjax.formats.folders import (
    ModelError,
    check_components,
    read_json,
    replaced_folder,
    write_json,
)
from sdjax.machine_settings import of_model
from sdjax.methods.adapter_files import adapter_of
from sdjax.methods.adapter_rules import AdaptersConfig
from sdjax.methods.registry import METHODS
from sdjax.models.config import ConfigError
from sdjax.models.weights import WeightsError, check_finite, load_file, save_file
from sdjax.system import paths, progress
from sdjax.system.untrusted import explained, listed

CONFIG_FILE, FROZEN_FILE = "config.json", "frozen.safetensors"
SCHEDULER_FILE = "scheduler/scheduler_config.json"


def read_workdir(
    workdir: paths.PathLike,
    *,
    components: Sequence[str] = NETWORKS,
    weights: str = "ema",
    step: int | None = None,
    with_weights: bool = True,
) -> Model:
    """Reads the networks of a training run.

    Args:
        workdir: of the run.
        components: which networks to read, if the run has them.
        weights: "ema" for the first of `config.ema.profiles` (the parameters themselves if the run
            keeps no average), "raw" for the parameters themselves, or the name of a profile.
        step: of the checkpoint, the newest by default.
        with_weights: False leaves `params` empty and the checkpoints alone.

    Raises:
        ModelError: the workdir's files do not make whole networks, hold NaN or Inf, or
            `weights` is none.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = paths.to_path(workdir)
    check_components(components)
    with explained(folder, "a workdir of sdjax"):
        return _read(folder, components, weights, step, with_weights=with_weights)


def read_run_config(folder: paths.Path) -> Config:
    """Return the configuration of a workdir. ModelError, naming the file, if it has none."""
    file = folder / CONFIG_FILE
    try:
        return resolve(read_json(file))
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from error


def _read(
    folder: paths.Path,
    components: Sequence[str],
    weights: str,
    step: int | None,
    *,
    with_weights: bool = True,
    follows: bool = True,
    folded: bool = True,
) -> Model:
    """See `read_workdir`.

    Args:
        follows: whether networks may lie elsewhere.
        folded: see `Kind.folded`; without, the model has the changes that the run made.
    """
    config = of_model(read_run_config(folder))
    kind, family = METHODS[config.method.name], FAMILIES[config.model.family]
    own = [name for name in kind.networks(config.model.networks) if name in components]
    model = model_of(config.model, own, changes=kind.changes(config.method, family))
    fields: dict[str, Any] = {}
    if with_weights:
        trained = trained_params(folder, config, weights, step, model.networks)
        frozen = frozen_params(folder, model, follows=follows)
        fields["params"] = _complete(folder, model, trained, frozen, step)
    if model.family.denoiser in model.networks:
        fields["schedule"] = config.schedule
        fields["prediction_type"] = config.objective.prediction_type
        fields["sampler"] = config.sample.sampler
        fields["scheduler"] = read_scheduler(folder)
    try:
        fields["tokenizers"] = read_tokenizers(folder, model)
    except TokenizerError as error:
        raise ModelError(str(error)) from error
    model = dataclasses.replace(model, **fields)
    return kind.folded(model) if folded else model


def read_tokenizers(folder: paths.Path, model: Model) -> dict[str, TextTokenizer]:
    """Return {field: tokenizer} of the text encoders that a model has.

    Raises:
        TokenizerError: a tokenizer cannot be read, or has more tokens than its encoder.
    """
    found: dict[str, TextTokenizer] = {}
    for name, config in model.text_encoders.items():
        part = model.family.parts[name]
        own = folder / part.tokenizer
        tokenizer = load_tokenizer(part.tokenizer_kind, own, model.text_length(name))
        tokenizer.check_vocabulary(config.vocab_size + count_of(model), own)
        found[part.tokens] = tokenizer
    return found


def read_scheduler(folder: paths.Path) -> dict[str, Any] | None:
    """The scheduler file that came with the networks, if one did."""
    file = folder / SCHEDULER_FILE
    return read_json(file) if file.is_file() else None


def write_scheduler(folder: paths.Path, scheduler: Mapping[str, Any]) -> None:
    """A scheduler file, for the diffusers folder that is written at the end."""
    file = folder / SCHEDULER_FILE
    paths.make_folder(file.parent)
    paths.write_text(file, json.dumps(scheduler, indent=2) + "\n")


def trained_params(
    folder: paths.Path, config: Config, weights: str, step: int | None, networks: Container[str]
) -> dict[str, np.ndarray]:
    """Return the trained parameters of some networks, as `weights` of `read_workdir` asks.

    Raises:
        ModelError: `weights` is none.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    profiles = config.ema.profiles
    if weights not in ("ema", "raw", *profiles):
        raise ModelError(
            f"weights is {weights!r}; the run in {folder} has: ema, raw, {', '.join(profiles)}"
        )
    if weights == "ema" and not profiles and config.optim.name == "schedule_free":
        raise ModelError(
            f"{folder}: the run's average is in the state of its optimizer, schedule_free, where "
            f"it cannot be read alone. Use what the run wrote at its end ({folder / 'diffusers'}), "
            "weights 'raw' for where gradients were taken, or train with an EMA profile"
        )
    profile = profiles[0] if weights == "ema" and profiles else weights
    which = f"ema:{profile}" if profile in profiles else "params"
    return restore_params(folder, which, step, networks)


def frozen_params(
    folder: paths.Path, model: Model, *, follows: bool = True
) -> dict[str, np.ndarray]:
    """Return the parameters of a model's networks that its run does not train, float32.

    Of networks that lie elsewhere they are all, also those that it trains.

    Args:
        follows: whether networks may lie elsewhere.

    Raises:
        ModelError: they cannot be read, or are not what they were.
    """
    frozen: dict[str, np.ndarray] = {}
    if (folder / FROZEN_FILE).is_file():
        try:
            frozen = load_file(
                folder / FROZEN_FILE, wanted=lambda path: path.split(".")[0] in model.networks
            )
        except WeightsError as error:
            raise ModelError(str(error)) from error
    for name, reference in read_references(folder).items():
        if name not in model.networks:
            continue
        if not follows:
            raise ModelError(f"{folder} holds no {name}, but refers to another folder for it")
        frozen |= follow(folder, name, reference, read_run)
    return frozen


def read_adapter_run(folder: paths.Path, weights: str, step: int | None) -> tuple[Model, Adapter]:
    """Return the model of a run of adapters, without parameters, and what the run has trained.

    Args:
        weights, step: see `read_workdir`.

    Raises:
        ModelError: it is no such run, or `weights` is none.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    with explained(folder, "a workdir of sdjax"):
        config = of_model(read_run_config(folder))
        if not isinstance(config.method, AdaptersConfig):
            raise ModelError(
                f"{folder} is of a run with method {config.method.name!r}, which trains no "
                "adapter; expected one with method 'adapters'. sdjax.convert --extract_lora makes "
                "one of what a run has changed"
            )
        model = model_of_run(config, {})
        trained = trained_params(folder, config, weights, step, model.networks)
        check_finite(trained)
        return dataclasses.replace(model, changes=()), adapter_of(model, trained)


def read_run(path: paths.Path, components: Sequence[str], weights: str, step: int | None) -> Model:
    """Return networks that a workdir holds itself; see `references.ReadRun`."""
    with explained(path, "a workdir of sdjax"):
        return _read(path, components, weights, step, follows=False)


def bundle(folder: paths.Path) -> list[str]:
    """Copy the networks that a workdir refers to into it.

    Returns:
        Their names.

    Raises:
        ModelError: one of them cannot be read, or is not what it was.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    references = read_references(folder)
    if not references:
        return []
    model = model_of(read_run_config(folder).model)
    step = latest_step(folder)
    trained = (
        saved_state.trained(checkpoint_folder(folder) / str(step)) if step is not None else set()
    )
    file = folder / FROZEN_FILE
    frozen = load_file(file) if file.is_file() else {}  # of networks that the run alone reads
    frozen |= {path: v for path, v in frozen_params(folder, model).items() if path not in trained}
    for name in references.keys() - model.networks.keys():  # copies, which the run alone reads
        frozen |= follow(folder, name, references[name], read_run)
    save_file(frozen, file)
    write_references(folder, {})
    return list(references)


def _complete(
    folder: paths.Path,
    model: Model,
    trained: Mapping[str, Any],
    frozen: Mapping[str, Any],
    step: int | None,
) -> dict[str, np.ndarray]:
    """The parameters of the networks, float32, after a look that all are there and finite."""
    params = {**frozen, **trained}
    chosen, problems = {}, []
    for path, want in bind(model).abstract.items():
        if path not in params:
            problems.append(f"missing: {path}")
        elif np.shape(params[path]) != want.shape:
            have = np.shape(params[path])
            problems.append(f"mis-shaped: {path} is {have}, the model has {want.shape}")
        else:
            chosen[path] = np.asarray(params[path], np.float32)
    if problems:
        raise ModelError(
            f"{folder}: the parameters are not those of its {CONFIG_FILE}:\n  " + listed(problems)
        )
    try:
        check_finite({path: value for path, value in chosen.items() if path not in trained})
    except WeightsError as error:
        raise ModelError(f"{folder / FROZEN_FILE}: {error}") from error
    try:
        check_finite({path: value for path, value in chosen.items() if path in trained})
    except WeightsError as error:
        step = latest_step(folder) if step is None else step
        raise ModelError(
            f"{checkpoint_folder(folder) / str(step)}: {error}\n"
            f"An earlier checkpoint ({folder / 'checkpoints' / 'STEP'}) or other --weights may do"
        ) from error
    return chosen


def save_workdir(folder: paths.PathLike, model: Model, *, overwrite: bool = False) -> paths.Path:
    """Writes networks as a workdir with one checkpoint, of step 0 and without moments.

    It can be drawn from, converted back and started from (`init_from`, `vae_from`); it is not a run
    to resume.

    Args:
        folder: to write; appears under its name only once it is complete.
        model: a VAE, or all networks of a pipeline with tokenizers and schedule.
        overwrite: replace a folder of networks that is there.

    Raises:
        ModelError: something is missing, or `folder` is not empty.
        CheckpointError, OSError: the disk's own error; nothing is left behind.
    """
    folder = paths.to_path(folder)
    config = _config_of(folder, model)
    with replaced_folder(folder, overwrite=overwrite) as partial:
        for field, tokenizer in model.tokenizers.items():
            tokenizer.save(partial / TOKENIZERS[field])
        if model.scheduler is not None:
            write_scheduler(partial, model.scheduler)
        state = {"params": dict(model.params), "step": np.zeros((), np.int32)}
        size = sum(value.nbytes for value in model.params.values())
        shown = progress.work(f"writing {folder}", size, poll=progress.bytes_written())
        with shown, Checkpoints(partial) as checkpoints:
            checkpoints.save(0, state, {}, to_dict(config))
        write_json(partial / CONFIG_FILE, to_dict(config))
    return folder


def _config_of(folder: paths.Path, model: Model) -> Config:
    """The configuration of a run that would have ended with these networks."""
    whole = not model.is_autoencoder
    if whole and (missing := model.missing()):
        raise ModelError(
            f"{folder}: a workdir holds a VAE or a whole pipeline; {', '.join(missing)} missing"
        )
    default = Config()
    replace = dataclasses.replace
    group = adopted(default.model, model, model.networks, whole=whole)
    config = replace(
        default,
        method=METHODS["denoise" if whole else "autoencoder"].config(),
        model=group,
        ema=replace(default.ema, profiles=()),
    )
    if model.schedule is None:
        return config
    objective = replace(default.objective, prediction_type=model.prediction_type)
    sampler = model.sampler or default.sample.sampler
    try:
        return replace(
            config,
            schedule=model.schedule,
            objective=objective,
            sample=replace(default.sample, sampler=sampler),
        )
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from error
