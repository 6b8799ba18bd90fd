"""A sweep: trials that Optuna suggests, each a run of `sdjax.main`, by any number of workers.

In the folder of a sweep:

    settings.json     configuration, space and metric, with which it began
    journal.log       Optuna's journal of all trials
    trials/NNNN/      the workdir of a trial, with recipe.py and the output of its run (sweep.log)
    trials/NNNN.lock  the lock of the worker that has the trial
    sweep.json        all trials, the ranking and the importances
    best.py           the configuration of the best trial
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sdjax.config import Config, to_dict
from sdjax.config_changes import compare_configs
from sdjax.data.splits import VALIDATION
from sdjax.models.config import ConfigError
from sdjax.sweeps.runs import best
from sdjax.sweeps.space import Space
from sdjax.system import locks, paths, text_files, untrusted
from sdjax.train.weight_sets import evaluated_set

SETTINGS, JOURNAL = "settings.json", "journal.log"
NAME = "sweep"  # Hyperband sorts trials into brackets by it and their number
SILENT = 120.0  # seconds after which a worker of another machine that says nothing is dead


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The subject of a sweep; the same for all workers.

    folder: absolute and local (or NFS), since the journal is a file that grows.
    metric: of the base configuration, see `metric_of`.
    folds: of cross-validation, see `sdjax.sweeps.folds`; 0 for none.
    """

    folder: Path
    base: Config
    space: Space
    metric: str
    mode: str
    folds: int = 0

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the fields of the configuration that a trial sets."""
        found = self.space.values(trial.params)
        if self.folds:
            fold = f"{1 + trial.number % self.folds}/{self.folds}"
            found |= {"data.fold": fold, "data.eval_split": VALIDATION}
        return found

    def metric_of(self, config: Config) -> str:
        """The number that a trial is judged by.

        Without a word of the space file or of `validation.metric` it is the loss of the weights
        that the trial would be drawn with, whose name is its own.
        """
        own = f"validation/{evaluated_set(config.ema.profiles)}/loss"
        return self.space.metric or config.validation.metric or own

    def trial_folder(self, number: int) -> Path:
        """The workdir of a trial."""
        return self.folder / "trials" / f"{number:04d}"

    def lock(self, number: int) -> locks.Lock:
        """The lock of the worker that has a trial."""
        file = self.trial_folder(number).with_suffix(".lock")
        what = f"--workdir={self.folder}"
        return locks.Lock(file, what, "sdjax.sweep", grace=0.0, silent=SILENT)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Run without any other worker in here; for moments only.

        The lock is made with O_EXCL, so it is exclusive on NFS too. Optuna breaks one that a worker
        left behind by dying after 30 s.
        """
        lock = JournalFileOpenLock(str(self.folder / SETTINGS))
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # broken, since we were too slow
                lock.release()


def make_sweep(folder: paths.PathLike, base: Config, space: Space, folds: int = 0) -> Sweep:
    """Return a sweep that can be judged.

    Raises:
        ConfigError: no trial would write the metric, or no pruner could look at it.
    """
    if paths.is_remote(folder):
        raise ConfigError(
            f"--workdir={folder}: a sweep's journal is a file that grows, which a bucket does not "
            "have; take a local folder, or one on NFS for workers on several machines"
        )
    place = Path(folder).expanduser().resolve()
    if ":" in str(place):
        raise ConfigError(
            f"--workdir={folder}: the recipes of the trials lie in it, and --config takes what "
            "follows a colon for an argument of the recipe; take a folder without a colon"
        )
    sweep = Sweep(place, base, space, "", space.mode or base.validation.mode, folds)
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


def open_study(sweep: Sweep) -> optuna.Study:
    """Return the study in the folder's journal, made if it is not there.

    Raises:
        ConfigError: the folder holds another sweep, naming what differs, or a damaged one.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    file = sweep.folder / JOURNAL
    remedy = "choose another --workdir"
    with sweep.alone():
        with untrusted.explained(sweep.folder / SETTINGS, "JSON", error=ConfigError, remedy=remedy):
            _check_settings(sweep)
        with untrusted.explained(file, "Optuna's journal", error=ConfigError, remedy=remedy):
            _mend(file)
            lock = JournalFileOpenLock(str(file))
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(file), lock)),
                study_name=NAME,
                direction=_direction(sweep),
                pruner=_pruner(sweep),
                load_if_exists=True,
            )
            _check_trials(sweep, study)
    return study


def _check_settings(sweep: Sweep) -> None:
    """Write down what is swept, or check that the folder began with it."""
    given = {
        "config": to_dict(sweep.base),
        "space": sweep.space.to_dict(),
        "metric": sweep.metric,
        "mode": sweep.mode,
        "folds": sweep.folds,
    }
    file = sweep.folder / SETTINGS
    if not file.exists():
        paths.write_text(file, json.dumps(given, indent=2) + "\n")
    elif different := compare_configs(text_files.read_json(file), given):
        lines = untrusted.listed(different)
        raise ConfigError(
            f"{sweep.folder} holds a sweep of something else:\n  {lines}\nuse the same --config, "
            "overrides, --space and --folds, or another --workdir (--trials may change)"
        )


def _mend(file: Path) -> None:
    """Drop a last line that a dying worker left torn, to which the next would be appended."""
    content = untrusted.read_bytes(file, untrusted.MOST_TEXT) if file.exists() else b""
    if content and not content.endswith(b"\n"):
        with open(file, "rb+") as journal:
            journal.truncate(content.rfind(b"\n") + 1)


def _check_trials(sweep: Sweep, study: optuna.Study) -> None:
    """Raise a ValueError for a trial that no worker of this sweep has written."""
    trials = study.get_trials()
    _copy(sweep, study, trials, seed=0)
    for trial in trials:
        curve = trial.intermediate_values
        values = [*curve.values(), *(trial.values or [])]
        if (
            trial.distributions != sweep.space.fields
            or trial.state == TrialState.WAITING
            or (trial.state == TrialState.COMPLETE and best(curve, sweep.mode) is None)
            or any(type(step) is not int for step in curve)
            or any(type(value) is not float for value in values)
            or not isinstance(trial.user_attrs.get("reason", ""), str)
        ):
            raise ValueError(f"trial {trial.number} is none of this sweep")


def begin_trial(sweep: Sweep, study: optuna.Study) -> None:
    """Add the next trial, with all of its values at once: none is ever half drawn.

    The values follow from the sampler's seed, the trial's number, and the trials before it. The
    folds of one setting have the same.
    """
    trials = study.get_trials()
    if sweep.folds and len(trials) % sweep.folds:
        first = trials[len(trials) - len(trials) % sweep.folds]
        return _add(sweep, study, first.params)
    text = f"{sweep.space.sampler['seed']}/{len(trials)}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
    drawn = _copy(sweep, study, trials, seed).ask(fixed_distributions=dict(sweep.space.fields))
    _add(sweep, study, drawn.params)


def _add(sweep: Sweep, study: optuna.Study, params: Mapping[str, Any]) -> None:
    """Add a trial that runs with these values."""
    study.add_trial(
        optuna.create_trial(
            state=TrialState.RUNNING, params=dict(params), distributions=dict(sweep.space.fields)
        )
    )


def _copy(sweep: Sweep, study: optuna.Study, trials: list[FrozenTrial], seed: int) -> optuna.Study:
    """Return a study in memory with the same trials, which Optuna checks, and a new sampler."""
    copy = optuna.create_study(
        study_name=NAME,
        direction=_direction(sweep),
        sampler=_sampler(sweep, seed),
        pruner=study.pruner,
    )
    if copy.directions != study.directions:
        raise ValueError(f"it is not of a sweep whose mode is {sweep.mode}")
    copy.add_trials(trials)
    return copy


def _direction(sweep: Sweep) -> StudyDirection:
    return StudyDirection.MINIMIZE if sweep.mode == "min" else StudyDirection.MAXIMIZE


def _sampler(sweep: Sweep, seed: int) -> optuna.samplers.BaseSampler:
    options: dict[str, Any] = dict(sweep.space.sampler)
    if options["name"] == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=options["startup_trials"])


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    options: dict[str, Any] = dict(sweep.space.pruner)
    if options["name"] == "median":
        return optuna.pruners.MedianPruner(options["startup_trials"], options["warmup_steps"])
    if options["name"] == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=options["min_steps"] or max(sweep.base.validation.every, 1),
            max_resource=sweep.base.train.steps,
            reduction_factor=options["reduction_factor"],
        )
    return optuna.pruners.NopPruner()
