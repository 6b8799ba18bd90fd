"""The next run: a recipe that begins from the best checkpoint, and `sdjax.main` on it."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sdjax.checkpoints.checkpoint import all_steps, latest_step
from sdjax.checkpoints.workdir import CONFIG_FILE
from sdjax.config import Config, resolve, to_dict
from sdjax.data.config import DataConfig
from sdjax.errors import UserError
from sdjax.formats.folders import read_json
from sdjax.recipes import recipe
from sdjax.sweeps import runs
from sdjax.system import locks, paths
from sdjax.system.interrupts import StopSignal

RECIPE, RUN, LOG = "recipe.py", "run", "improve.log"
MAIN = (sys.executable, "-u", "-m", "sdjax.main")
DONE, STOPPED = 0, 75  # exit codes of sdjax.main
_POLL = 0.5  # seconds between looks at the run


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


def read_base(workdir: str) -> Config:
    """Return the configuration of the run that is to be improved, which is the user's own.

    Raises:
        UserError: there is no such run, or it trains no whole denoiser.
    """
    folder = paths.to_path(workdir)
    if not (folder / CONFIG_FILE).exists() or latest_step(folder) is None:
        raise UserError(
            f"--workdir={workdir}: expected the --workdir of a run of sdjax.main that has a "
            "checkpoint"
        )
    config = resolve(read_json(folder / CONFIG_FILE))
    if config.method.name != "denoise":
        raise UserError(
            f"--workdir={workdir} is a run of method {config.method.name!r}; expected 'denoise', "
            "whose model the next run can begin from (make one of adapters by sdjax.convert, and "
            "train it on)"
        )
    return config


def best_step(workdir: str) -> int:
    """The step of the best checkpoint by the run's own validations; the newest without any."""
    folder = paths.to_path(workdir)
    there, newest = set(all_steps(folder)), latest_step(folder)
    assert newest is not None
    found = runs.read_values(Path(folder) / "metrics.jsonl", "validation/best_step")
    kept = [int(step) for _, step in sorted(found.items()) if int(step) in there]
    return kept[-1] if kept else newest


def next_config(
    base: Config, data: DataConfig, *, workdir: str, step: int, steps: int, rate: float
) -> Config:
    """Return the configuration of the next run.

    Args:
        data: what it reads.
        workdir, step: of the checkpoint that it begins from.
        steps: optimizer steps.
        rate: its learning rate, relative to the base's.
    """
    every = max(1, steps)
    return dataclasses.replace(
        base,
        seed=base.seed + 1,
        init_from=str(paths.absolute(paths.to_path(workdir)) / "checkpoints" / str(step)),
        init_prediction_type="",
        init_zero_terminal_snr=False,
        vae_from="",
        text_encoder_from="",
        stages=(),
        data=data,
        optim=dataclasses.replace(
            base.optim,
            learning_rate=base.optim.learning_rate * rate,
            warmup_steps=min(base.optim.warmup_steps, steps // 10),
        ),
        train=dataclasses.replace(
            base.train,
            steps=steps,
            checkpoint_every=min(base.train.checkpoint_every, every),
            sample_every=min(base.train.sample_every, every),
        ),
        validation=dataclasses.replace(base.validation, every=min(base.validation.every, every)),
        sample=dataclasses.replace(base.sample, fidelity=0 if data.mixture else
                                   base.sample.fidelity),
    )  # fmt: skip


def write_recipe(folder: paths.Path, config: Config, about: str) -> None:
    """Write the recipe of the next run."""
    command = f"python -m sdjax.main --config={folder / RECIPE} --workdir={folder / RUN}"
    text = recipe(to_dict(config), f"{about}\n\n    {command}\n")
    paths.write_text(folder / RECIPE, text)


def train(folder: Path, tell: Callable[[str], None]) -> None:
    """Run `sdjax.main` on the recipe to its end, from wherever it is.

    Raises:
        UserError: it cannot run, with what it said.
        Stopped: it was asked to stop, and has saved.
    """
    workdir = folder / RUN
    with StopSignal() as stop:
        lock = _taken(locks.Lock(folder / f"{RUN}.lock", f"--output={folder}", "sdjax.improve"),
                      stop, tell)  # fmt: skip
        try:
            process = runs.start(
                [*MAIN, f"--config={folder / RECIPE}", f"--workdir={workdir}", "--cluster=none"],
                workdir, lock.handle, log=LOG,
            )  # fmt: skip
            try:
                while (code := process.poll()) is None:
                    if stop.asked:
                        tell("stopping; the run saves first")
                        runs.stop(process)
                        raise Stopped
                    time.sleep(_POLL)
            finally:
                runs.kill(process)
        finally:
            lock.release()
    if code == STOPPED:
        raise Stopped
    if code != DONE:
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        raise UserError(
            f"the next run ended {how}; {workdir / LOG} ends\n{runs.last_words(workdir, log=LOG)}"
        )


def _taken(lock: locks.Lock, stop: StopSignal, tell: Callable[[str], None]) -> locks.Lock:
    """Take the lock of the run, which one that was left behind by a kill has until it has saved."""
    until, told = time.monotonic() + runs.GRACE, False
    while not stop.asked:
        try:
            if lock.take():
                return lock
        except locks.LockedError:
            if time.monotonic() > until:
                raise
            if not told:
                tell("waiting for the run that was left behind, which saves and ends")
            told = True
        time.sleep(_POLL)
    raise Stopped
