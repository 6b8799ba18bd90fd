"""A worker of a sweep: takes one trial after another, runs it, and writes down how it ended.

A trial is its worker's who holds its lock (`sdjax/system/locks.py`). Of a process that was killed
the kernel gives the lock back at once; its run, which is asked to stop, holds the lock until it has
saved. On another machine a worker is dead when its lock has stood still for `study.SILENT` seconds.

The journal and the locks may be a stranger's. No process that a file names gets a signal.
"""

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
from sdjax.sweeps.ranking import write
from sdjax.sweeps.space import changed
from sdjax.sweeps.study import Sweep, begin_trial, open_study
from sdjax.system import locks, paths
from sdjax.system.interrupts import StopSignal

MAIN = (sys.executable, "-u", "-m", "sdjax.main")
# Exit codes of sdjax.main: finished; wrong input; diverged; stopped after saving.
DONE, WRONG, DIVERGED, STOPPED = 0, 2, 3, 75
_FAILURES = 3  # trials that may fail for no reason of theirs before the first good one

Tell = Callable[[str], None]


class Stopped(Exception):
    """The worker was asked to stop, and all is saved."""


class Lost(Exception):
    """Another worker has taken this one for dead, and has its trial."""


@dataclasses.dataclass
class Worker:
    """One of the processes that work on a sweep.

    command: of a run; it is given --config, --workdir and --cluster=none.
    poll: seconds between looks at the metrics of a run.
    locks: of the trials that this worker has, or has seen with others, by number.
    """

    sweep: Sweep
    study: optuna.Study
    stop: StopSignal
    tell: Tell
    command: Sequence[str]
    poll: float
    locks: dict[int, locks.Lock] = dataclasses.field(default_factory=dict)

    def trials(self) -> list[FrozenTrial]:
        """All trials as the journal has them now, by number."""
        return self.study.get_trials(deepcopy=False)


def work(
    sweep: Sweep,
    trials: int,
    *,
    tell: Tell = print,
    command: Sequence[str] = MAIN,
    poll: float = 1.0,
) -> optuna.Study:
    """Run trials until there are `trials`, or other workers have the rest.

    Trials that were interrupted come first. Returns the study, for the ranking.

    Raises:
        UserError: the first trials cannot run, with what they said.
        Stopped: by SIGTERM or Ctrl-C; the same call goes on.
    """
    with locks.held(sweep.folder, "--workdir", "sdjax.sweep", shared=True):
        study = open_study(sweep)
        with StopSignal() as stop:
            worker = Worker(sweep, study, stop, tell, command, poll)
            while (number := _next(worker, trials)) is not None:
                try:
                    _run(worker, number)
                except Lost:
                    tell(f"trial {number}: another worker took this one for dead, and has it now")
                finally:
                    worker.locks.pop(number).release()
                with sweep.alone():
                    write(sweep, study)
    return study


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that somebody has begun and nobody finished."""
    return [t for t in study.get_trials(deepcopy=False) if not t.state.is_finished()]


def _next(worker: Worker, trials: int) -> int | None:
    """Take the next trial; return its number, or None if there is nothing left for this worker.

    The trials of dead workers come first, so that an interruption changes nothing of what later
    trials are suggested by. So it must be known of every other trial that its worker lives.
    """
    while not worker.stop.asked:
        with worker.sweep.alone():
            lives: dict[int, str] = {}
            begun = [trial.number for trial in unfinished(worker.study)]
            for number in begun:
                lock = worker.locks.setdefault(number, worker.sweep.lock(number))
                try:
                    if not lock.take():
                        continue
                except locks.LockedError as refused:
                    # With a dead holder, its run has the lock.
                    if refused.holder is None or not refused.holder.has_ended:
                        lives[number] = str(refused.holder or "another")
                    continue
                if not worker.trials()[number].state.is_finished():
                    return number
                worker.locks.pop(number).release()  # its worker ended it since we looked
            if len(lives) == len(begun):
                if len(worker.trials()) >= trials:
                    for number, holder in lives.items():
                        worker.tell(f"trial {number} is left to {holder}")
                    return None
                begin_trial(worker.sweep, worker.study)
                continue
        time.sleep(worker.poll)
    raise Stopped


def _run(worker: Worker, number: int) -> None:
    """Bring one trial from wherever it is to its end."""
    sweep = worker.sweep
    trial = optuna.Trial(worker.study, worker.trials()[number]._trial_id)
    values = sweep.values(worker.trials()[number])
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
    if not worker.locks[number].is_mine():
        raise Lost
    trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
    _judge(worker, trial, follow, code)


class Follower:
    """Reports each value of the metric to Optuna once, and asks the pruner whether it is enough.

    Values are judged in the order of their steps and none after the pruner's word, so the outcome
    does not depend on when they are seen.
    """

    def __init__(self, worker: Worker, trial: optuna.Trial, config: Config):
        self._worker, self._trial, self._steps = worker, trial, config.train.steps
        self.metric = worker.sweep.metric_of(config)
        self.file = worker.sweep.trial_folder(trial.number) / "metrics.jsonl"
        self.values = dict(worker.trials()[trial.number].intermediate_values)
        self.pruned = bool(self.values) and self._is_hopeless()

    def _is_hopeless(self) -> bool:
        return max(self.values) < self._steps and self._trial.should_prune()

    def look(self) -> bool:
        """Read what is new. Returns whether the trial is pruned."""
        for step, value in runs.read_values(self.file, self.metric).items():
            if self.pruned:
                break
            if step not in self.values:
                self._trial.report(value, step)
                self.values[step] = value
                number = self._trial.number
                self._worker.tell(f"trial {number}: step {step}, {self.metric} {value:.5g}")
                self.pruned = self._is_hopeless()
        return self.pruned


def _watch(worker: Worker, number: int, follow: Follower) -> int | None:
    """Run `sdjax.main`. Returns its exit code, None if it was stopped by the pruner.

    Raises:
        Stopped: the worker was asked to stop; the run has saved.
        Lost: another worker has the trial; the run is killed.
    """
    folder, lock = worker.sweep.trial_folder(number), worker.locks[number]
    process = runs.start(
        # A worker may be one of several tasks of a scheduler, but its run is alone.
        [*worker.command, f"--config={folder / 'recipe.py'}", f"--workdir={folder}",
         "--cluster=none"], folder, lock.handle,
    )  # fmt: skip
    try:
        while True:
            code = process.poll()  # before the look, which then sees all that was written
            pruned = follow.look()
            if not lock.is_mine():
                raise Lost
            if pruned:
                runs.stop(process)
                return None
            if code is not None:
                return code
            if worker.stop.asked:
                worker.tell(f"trial {number}: stopping; it saves first")
                runs.stop(process)
                raise Stopped
            time.sleep(worker.poll)
    finally:
        runs.kill(process)


def _judge(worker: Worker, trial: optuna.Trial, follow: Follower, code: int | None) -> None:
    """Write down how a trial ended, by the exit code of its run."""
    number, folder = trial.number, worker.sweep.trial_folder(trial.number)
    found = runs.best(follow.values, worker.sweep.mode)
    if code is None:
        reason = f"pruned at step {max(follow.values)}"
        trial.set_user_attr("reason", reason)
        worker.study.tell(trial, state=TrialState.PRUNED)
        worker.tell(f"trial {number}: {reason}")
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
        has = ", ".join(runs.names(follow.file)) or "nothing"
        reason = f"no finite {follow.metric} in {follow.file}, which has {has}"
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
    others = [t for t in worker.trials() if t.number != trial.number]
    if not any(t.intermediate_values or t.state == TrialState.COMPLETE for t in others):
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
