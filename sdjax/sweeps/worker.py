"""A worker of a sweep: takes one trial after another, runs it, and tells the journal."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from sdjax.config import Config, to_dict
from sdjax.errors import UserError
from sdjax.models.config import ConfigError
from sdjax.recipes import recipe
from sdjax.sweeps import runs
from sdjax.sweeps.claims import Claims, Lost
from sdjax.sweeps.ranking import write
from sdjax.sweeps.space import changed
from sdjax.sweeps.study import Sweep, begin, open_study, suggest
from sdjax.system import locks, paths
from sdjax.system.interrupts import StopSignal

MAIN = (sys.executable, "-u", "-m", "sdjax.main")
# Of sdjax.main: finished; wrong input; diverged; stopped after saving.
DONE, WRONG, DIVERGED, STOPPED = 0, 2, 3, 75
_FAILURES = 3  # trials that may fail for no reason of theirs before the first good one

Tell = Callable[[str], None]


class Stopped(Exception):
    """Asked to stop, with all saved."""


@dataclasses.dataclass
class Worker:
    """One of the processes that work on a sweep.

    command: of a run; it is given --config, --workdir and --cluster=none.
    poll: seconds between looks at the metrics of a run.
    """

    sweep: Sweep
    claims: Claims
    study: optuna.Study
    stop: StopSignal
    tell: Tell
    command: Sequence[str] = MAIN
    poll: float = 1.0


def work(
    sweep: Sweep,
    trials: int,
    *,
    tell: Tell = print,
    command: Sequence[str] = MAIN,
    poll: float = 1.0,
    claims: Claims | None = None,
) -> optuna.Study:
    """Run trials until there are `trials`, or other workers have the rest.

    Trials that were interrupted come first. Returns the study, for the ranking.

    Raises:
        UserError: the first trials cannot run, with what they said.
        Stopped: by SIGTERM or Ctrl-C; the same call goes on.
    """
    with locks.held(sweep.folder, "--workdir", "sdjax.sweep", shared=True):
        return _work(sweep, trials, tell, command, poll, claims)


def _work(
    sweep: Sweep,
    trials: int,
    tell: Tell,
    command: Sequence[str],
    poll: float,
    claims: Claims | None,
) -> optuna.Study:
    """`work`, in a folder that only workers of sweeps write into."""
    claims = claims or Claims(sweep.folder / "claims")
    begin(sweep, claims)
    study = open_study(sweep, claims)
    with StopSignal() as stop:
        worker = Worker(sweep, claims, study, stop, tell, command, poll)
        while (number := _next(worker, trials)) is not None:
            try:
                _run(worker, number)
            except Lost:
                tell(f"trial {number}: {claims.holder(number) or 'somebody'} has taken it over")
            finally:
                claims.release(number)
            with claims.locked():
                write(sweep, study)
    return study


def _next(worker: Worker, trials: int) -> int | None:
    """Number of a trial that this worker has taken; None if there is nothing left for it."""
    claims, told = worker.claims, set[int]()
    while True:
        there = worker.study.get_trials(deepcopy=False)
        begun = [t.number for t in there if not t.state.is_finished()]
        new = [len(there)] if len(there) < trials else []
        for number in begun + new:
            # What a dead worker left behind comes first, so that an interruption changes nothing
            # of what later trials are suggested by; so first it must be known who is dead.
            if number in new and any(claims.undecided(n) for n in begun):
                break
            if claims.take(number):
                if _is_open(worker, number):
                    return number
                claims.release(number)  # another has finished it since we looked
        if worker.stop.asked:
            raise Stopped
        now = worker.study.get_trials(deepcopy=False)
        if [t.state for t in now] != [t.state for t in there]:
            continue  # something has begun or ended since we looked
        free = [n for n in begun if not claims.holder(n)]
        waiting = [n for n in begun if claims.undecided(n)]
        # What is claimed and not begun will be in a moment, and there may be one after it.
        if not (new or free or waiting):
            for number in begun:
                worker.tell(f"trial {number} is left to {claims.holder(number)}")
            return None
        for number in waiting:
            if number not in told:
                told.add(number)
                worker.tell(f"trial {number}: seeing whether {claims.holder(number)} lives")
        time.sleep(worker.poll)


def _is_open(worker: Worker, number: int) -> bool:
    """Whether a trial is still to be run, now that nobody else can begin it."""
    trials = worker.study.get_trials(deepcopy=False)
    return number == len(trials) or (
        number < len(trials) and not trials[number].state.is_finished()
    )


def _run(worker: Worker, number: int) -> None:
    """One trial from wherever it is to its end."""
    sweep, study = worker.sweep, worker.study
    trials = study.get_trials(deepcopy=False)
    if number == len(trials):
        trial = study.ask()
        assert trial.number == number, "somebody writes to the journal without a claim"
    else:
        trial = optuna.Trial(study, trials[number]._trial_id)
    values = suggest(trial, sweep.space)
    shown = ", ".join(f"{name} = {_short(value)}" for name, value in values.items())
    worker.tell(f"trial {number}: {shown}")
    folder = sweep.trial_folder(number)
    try:
        config = changed(sweep.base, values)
    except ConfigError as error:
        return _failed(worker, trial, str(error), wrong=True)
    about = f"Trial {number} of the sweep in {sweep.folder}: {shown}."
    paths.make_folder(paths.to_path(folder))
    paths.write_text(folder / "recipe.py", recipe(to_dict(config), about))
    follow = Follower(worker, trial, config)
    began = time.monotonic()
    code = None if follow.look() else _watch(worker, number, follow)
    trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
    _judge(worker, trial, follow, code)


class Follower:
    """Tells Optuna each value of the metric once, and whether the pruner had enough.

    Values are judged in the order of their steps and none after the pruner's word, so the outcome
    does not depend on when they are seen.
    """

    def __init__(self, worker: Worker, trial: optuna.Trial, config: Config):
        self._worker, self._trial, self._steps = worker, trial, config.train.steps
        self.metric = worker.sweep.metric_of(config)
        self._file = worker.sweep.trial_folder(trial.number) / "metrics.jsonl"
        saved = worker.study.get_trials(deepcopy=False)[trial.number]
        self.values = dict(saved.intermediate_values)
        self.pruned = bool(self.values) and self._is_hopeless()

    def _is_hopeless(self) -> bool:
        return max(self.values) < self._steps and self._trial.should_prune()

    def look(self) -> bool:
        """Read what is new; True if the trial is pruned."""
        for step, value in runs.read_values(self._file, self.metric).items():
            if self.pruned:
                break
            if step in self.values:
                continue
            self._trial.report(value, step)
            self.values[step] = value
            self._worker.tell(f"trial {self._trial.number}: step {step}, {self.metric} {value:.5g}")
            self.pruned = self._is_hopeless()
        return self.pruned


def _watch(worker: Worker, number: int, follow: Follower) -> int | None:
    """Run `sdjax.main`; its exit code, None if it was stopped by the pruner.

    Raises:
        Stopped: the worker was asked to stop; the run has saved.
        Lost: another worker has the trial; the run is killed.
    """
    folder = worker.sweep.trial_folder(number)
    process = runs.start(
        # A worker may be one of several tasks of a scheduler, but its run is alone.
        [*worker.command, f"--config={folder / 'recipe.py'}", f"--workdir={folder}",
         "--cluster=none"], folder,
    )  # fmt: skip

    def alive() -> None:
        worker.claims.beat(number, process)

    try:
        worker.claims.beat(number, process, now=True)
        while True:
            code = process.poll()  # before the look, which then sees all that was written
            if follow.look():
                if code is None:
                    runs.stop(process, alive)
                return None
            if code is not None:
                return code
            if worker.stop.asked:
                worker.tell(f"trial {number}: stopping; it saves first")
                runs.stop(process, alive)
                raise Stopped
            alive()
            time.sleep(worker.poll)
    finally:
        runs.kill(process)


def _judge(worker: Worker, trial: optuna.Trial, follow: Follower, code: int | None) -> None:
    """Tell the journal how a trial ended."""
    number, sweep = trial.number, worker.sweep
    folder = sweep.trial_folder(number)
    found = runs.best(follow.values, sweep.mode)
    if found:
        trial.set_user_attr("step", found[0])
        trial.set_user_attr("best", found[1])
    if code is None:
        step = max(follow.values)
        trial.set_user_attr("reason", f"pruned at step {step}")
        worker.study.tell(trial, state=TrialState.PRUNED)
        worker.tell(f"trial {number}: pruned at step {step}")
    elif code == STOPPED:
        worker.tell(f"trial {number}: its run was stopped by a signal from elsewhere")
        raise Stopped
    elif code == WRONG:
        _failed(worker, trial, runs.last_words(folder), wrong=True)
    elif code == DIVERGED:
        _failed(worker, trial, "diverged: NaN or Inf", wrong=False)
    elif code != DONE:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = runs.last_words(folder)
        _failed(worker, trial, f"ended with {how}; {folder / runs.LOG} ends\n{words}")
    elif found is None:
        has = ", ".join(runs.names(folder / "metrics.jsonl")) or "nothing"
        reason = f"no finite {follow.metric} in {folder / 'metrics.jsonl'}, which has {has}"
        _failed(worker, trial, reason, wrong=not follow.values)
    else:
        worker.study.tell(trial, found[1])
        worker.tell(f"trial {number}: {follow.metric} {found[1]:.5g} at step {found[0]}")


def _failed(worker: Worker, trial: optuna.Trial, reason: str, *, wrong: bool | None = None) -> None:
    """Record a failure and go on; but stop where it is likely not the trial's own fault.

    Args:
        wrong: True for wrong input, which stops the sweep if no trial worked before; the trial
            stays open then. None for a crash, of which a few in a row do.

    Raises:
        UserError: the sweep stops, with what the run said.
    """
    others = [t for t in worker.study.get_trials(deepcopy=False) if t.number != trial.number]
    worked = any(t.intermediate_values or t.state == TrialState.COMPLETE for t in others)
    if not worked:
        crashes = 1 + sum("crash" in t.user_attrs for t in others)
        if wrong or (wrong is None and crashes >= _FAILURES):
            raise UserError(
                f"trial {trial.number} cannot run, and none did before it, so the sweep stops:\n"
                f"{reason}\nput it right and run the same command again"
            )
    trial.set_user_attr("reason", reason)
    if wrong is None:
        trial.set_user_attr("crash", True)
    worker.study.tell(trial, state=TrialState.FAIL)
    worker.tell(f"trial {trial.number}: failed, {reason}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that somebody has begun and nobody finished."""
    return [t for t in study.get_trials(deepcopy=False) if not t.state.is_finished()]
