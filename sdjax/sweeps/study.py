"""A sweep: trials that Optuna suggests, each a run of `sdjax.main`, by any number of workers.

In the folder of a sweep:

    settings.json    what it was begun with: configuration, space, metric
    journal.log      Optuna's journal of all trials
    claims/          which worker has which trial, see `sweep_claims`
    trials/NNNN/     the workdir of a trial, with recipe.py and what it printed (sweep.log)
    sweep.json       all trials, the ranking and the importances
    best.py          the configuration of the best trial
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial

from sdjax.config import Config, to_dict
from sdjax.config_changes import compare_configs
from sdjax.models.config import ConfigError
from sdjax.sweeps.claims import Claims
from sdjax.sweeps.space import Choices, Range, Space
from sdjax.system import paths, text_files, untrusted
from sdjax.train.weight_sets import evaluated_set

SETTINGS, JOURNAL = "settings.json", "journal.log"
NAME = "sweep"  # Hyperband sorts trials into brackets by it and their number


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is swept; the same for all workers.

    folder: absolute and local (or NFS), since the journal is a file that grows.
    metric: of the base configuration, see `metric_of`.
    """

    folder: Path
    base: Config
    space: Space
    metric: str
    mode: str

    def metric_of(self, config: Config) -> str:
        """What a trial is judged by: what the space file or `validation.metric` names, else the
        loss of the weights that it would be drawn with, whose name is its own."""
        own = f"validation/{evaluated_set(config.ema.profiles)}/loss"
        return self.space.metric or config.validation.metric or own

    def trial_folder(self, number: int) -> Path:
        """The workdir of a trial."""
        return self.folder / "trials" / f"{number:04d}"


def make_sweep(folder: paths.PathLike, base: Config, space: Space) -> Sweep:
    """Put together what is swept, and check that it can be judged.

    Raises:
        ConfigError: no trial would write the metric, or no pruner could look at it.
    """
    if paths.is_remote(folder):
        raise ConfigError(
            f"--workdir={folder}: a sweep's journal is a file that grows, which a bucket does not "
            "have; take a local folder, or one on NFS for workers on several machines"
        )
    if ":" in str(Path(folder).expanduser().resolve()):
        raise ConfigError(
            f"--workdir={folder}: the recipes of the trials lie in it, and --config takes what "
            "follows a colon for an argument of the recipe; take a folder without a colon"
        )
    mode = space.mode or base.validation.mode
    sweep = Sweep(Path(folder).expanduser().resolve(), base, space, "", mode)
    metric = sweep.metric_of(base)
    if metric.startswith("validation"):
        if not base.validation.examples:
            raise ConfigError(
                f"config.validation.examples is 0, so no trial has {metric}: set it above 0, or "
                "name another metric in the space file"
            )
        every, steps = base.validation.every, base.train.steps
        if space.pruner["name"] != "none" and not 0 < every < steps:
            raise ConfigError(
                f"config.validation.every is {every} and config.train.steps {steps}: the pruner "
                f"{space.pruner['name']} would see nothing before the end; validate more often, or "
                "write `pruner: none` into the space file"
            )
    return dataclasses.replace(sweep, metric=metric)


def begin(sweep: Sweep, claims: Claims) -> None:
    """Write down what is swept, or check that it is what the folder was begun with.

    Raises:
        ConfigError: the folder holds another sweep, naming what differs.
    """
    given = {
        "config": to_dict(sweep.base),
        "space": dataclasses.asdict(sweep.space),
        "metric": sweep.metric,
        "mode": sweep.mode,
    }
    file = sweep.folder / SETTINGS
    with claims.locked():
        if not file.exists():
            paths.write_text(file, json.dumps(given, indent=2) + "\n")
            return
        try:
            saved = text_files.read_json(file)
            different = compare_configs(saved, given)
        except untrusted.damage() as error:
            raise ConfigError(
                f"{file} cannot be read ({untrusted.why(error)}); choose another --workdir"
            ) from error
    if different:
        lines = "\n  ".join(str(d) for d in different)
        raise ConfigError(
            f"{sweep.folder} holds a sweep of something else:\n  {lines}\nuse the same --config, "
            "overrides and --space, or another --workdir (--trials may change)"
        )


def open_study(sweep: Sweep, claims: Claims) -> optuna.Study:
    """The study in the folder's journal, made if it is not there."""
    optuna.logging.set_verbosity(logging.WARNING)
    file = str(sweep.folder / JOURNAL)
    lock = JournalFileOpenLock(file)
    with claims.locked():
        _mend(file, lock)
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(file, lock_obj=lock)),
            study_name=NAME,
            direction="minimize" if sweep.mode == "min" else "maximize",
            sampler=TrialSampler(_sampler(sweep.space.sampler), sweep.space.sampler["seed"]),
            pruner=_pruner(sweep),
            load_if_exists=True,
        )


def _mend(file: str, lock: JournalFileOpenLock) -> None:
    """Drop a last line that a dying worker left torn, to which the next would be appended."""
    if not os.path.exists(file):
        return
    lock.acquire()
    try:
        with open(file, "rb+") as journal:
            content = journal.read()
            if content and not content.endswith(b"\n"):
                journal.truncate(content.rfind(b"\n") + 1)
    finally:
        with contextlib.suppress(RuntimeError):
            lock.release()


class TrialSampler(optuna.samplers.BaseSampler):
    """Draws each value anew from a seed, the trial's number and the field.

    So it depends on nothing else than the trials that were finished before, and a trial that was
    interrupted between two draws goes on with the same values.
    """

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int):
        self._make, self._seed = make, seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Fields are drawn one by one."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """None together."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """One value."""
        text = f"{self._seed}/{trial.number}/{param_name}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
        return self._make(seed).sample_independent(study, trial, param_name, param_distribution)


def _sampler(options: Mapping[str, Any]) -> Callable[[int], optuna.samplers.BaseSampler]:
    if options["name"] == "random":
        return lambda seed: optuna.samplers.RandomSampler(seed=seed)
    startup = options["startup_trials"]
    return lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    options = sweep.space.pruner
    if options["name"] == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=options["startup_trials"], n_warmup_steps=options["warmup_steps"]
        )
    if options["name"] == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=options["min_steps"] or max(sweep.base.validation.every, 1),
            max_resource=sweep.base.train.steps,
            reduction_factor=options["reduction_factor"],
        )
    return optuna.pruners.NopPruner()


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The trial's values of all fields, as the configuration takes them."""
    return space.values({name: _draw(trial, name, field) for name, field in space.fields.items()})


def _draw(trial: optuna.Trial, name: str, field: Range | Choices) -> Any:
    if isinstance(field, Choices):
        return trial.suggest_categorical(name, field.labels)
    if field.integer:
        step = int(field.step or 1)
        return trial.suggest_int(name, int(field.low), int(field.high), log=field.log, step=step)
    return trial.suggest_float(name, field.low, field.high, log=field.log, step=field.step)
