"""Find good values of a configuration's fields by training with many: a sweep.

    python -m sdjax.sweep --config=configs/base.py --space=space.yaml --workdir=sweeps/first
        [--trials=20] [--folds=5] [--config.field=value ...]

A space file says which fields are tried, within what, and when a trial is given up:

    fields:
      optim.learning_rate: {low: 1e-5, high: 1e-2, log: true}
      data.batch_size: {low: 32, high: 256, step: 32}
      objective.weighting: {choices: [uniform, min_snr]}
    pruner: {name: median, startup_trials: 5}

Each trial is a run of `python -m sdjax.main` in WORKDIR/trials/NNNN. Optuna chooses its values by
what the trials before it gave, and it is stopped early where its validation loss falls behind
theirs. A trial counts by its best validation, whose checkpoint is kept.

Stop the sweep at any time; the same command goes on where it was, within a trial too. To run
several trials at once start the same command several times, on one machine or on several that share
WORKDIR: each takes the next trial, and those that another left behind by dying.

--folds=K is cross-validation: each setting is trained K times, each time on all but one of K equal
parts of the training split, and validated on that part. It gives the mean, the standard deviation
and the interval over the folds. Without --space it does so for the recipe as it is.

At the end: a table with the best first, which fields mattered, WORKDIR/sweep.json with all of it,
and WORKDIR/best.py, a recipe for `python -m sdjax.main --config=WORKDIR/best.py --workdir=DIR`.

Exit codes: 0 done, or the rest is with other workers; 2 wrong input; 3 no trial came to its end; 75
stopped by SIGTERM or Ctrl-C, to go on with the same command.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command goes on")

import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from sdjax import verbs
from sdjax.errors import UserError

if TYPE_CHECKING:
    import optuna

    from sdjax.sweeps.study import Sweep

# Flags of its own: those of `sdjax.main` say how processes of one run find each other.
FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file(
    "config", None, f"All trials start from it. {verbs.CONFIG_HELP}", flag_values=FLAGS
)
_SPACE = flags.DEFINE_string(
    "space", None, "YAML file with the fields to try; see above and docs/sweeps.md. --folds can do "
    "without.",
    flag_values=FLAGS,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the sweep, local or on NFS; made if it is not there.",
    flag_values=FLAGS,
)  # fmt: skip
_TRIALS = flags.DEFINE_integer(
    "trials", 20, "How many, of all workers together; more can be had later by the same command.",
    flag_values=FLAGS,
)  # fmt: skip
_FOLDS = flags.DEFINE_integer(
    "folds", 0, "Of cross-validation, 2 or more: every setting that is tried is trained so often. "
    "Then --trials counts settings, of which there is one without --space.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("help", False, "Show this and stop.", short_name="h", flag_values=FLAGS)

NOTHING, STOPPED = 3, 75


def main(argv: Sequence[str]) -> int:
    """The verb; `argv` with the program's name first."""
    return verbs.run(argv, FLAGS, __name__, __doc__ or "", _run)


def _check_flags() -> None:
    """Raise UserError for what is missing or too much."""
    if not _SPACE.value and not _FOLDS.value:
        raise UserError("--space is missing, a YAML file with the fields to try; see --help")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for instance --workdir=sweeps/first")
    if _TRIALS.value < 1:
        raise UserError(f"--trials={_TRIALS.value}: expected 1 or more")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("a sweep takes another package: pip install 'sdjax[sweep]' (it is Optuna)")


def _run() -> int:
    """With the flags parsed."""
    recipe = verbs.recipe(FLAGS, "base")
    _check_flags()
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.captureWarnings(True)  # Optuna warns of what it calls experimental
    from sdjax.config import resolve
    from sdjax.sweeps.folds import check_base
    from sdjax.sweeps.space import no_space, read_space
    from sdjax.sweeps.study import make_sweep
    from sdjax.sweeps.worker import Stopped, work

    base = resolve(recipe)
    space = read_space(_SPACE.value, base) if _SPACE.value else no_space()
    trials = _TRIALS.value if _SPACE.value else 1
    if _FOLDS.value:
        check_base(base, _FOLDS.value, space.pruner["name"])
        trials *= _FOLDS.value
    sweep = make_sweep(_WORKDIR.value or "", base, space, _FOLDS.value)
    try:
        study = work(sweep, trials, tell=lambda line: print(line, flush=True))
    except Stopped:
        print(f"stopped; the same command goes on ({sweep.folder})", file=sys.stderr)
        return STOPPED
    return _show(sweep, study)


def _show(sweep: Sweep, study: optuna.Study) -> int:
    """The ranking and where everything is."""
    from rich.console import Console

    from sdjax.sweeps import ranking
    from sdjax.sweeps.worker import unfinished

    console = Console(width=None if Console().is_terminal else 120)
    console.print(ranking.table(sweep, study))
    if found := ranking.importances(study):
        console.print(ranking.importance_table(found))
    if left := unfinished(study):
        numbers = ", ".join(str(trial.number) for trial in left)
        print(f"not finished yet: {numbers}. If no other worker has them, run the same command")
    print(f"all of it: {sweep.folder / ranking.RESULT}")
    if ranking.best_config(sweep, study) is None:
        print("no setting has all of its folds" if sweep.folds else "no trial came to its end")
        return 0 if left else NOTHING
    if not sweep.folds:
        best = ranking.ranking(sweep, study)[0]
        print(f"the best model: {sweep.trial_folder(best.number)}")
    recipe = f"--config={sweep.folder / ranking.BEST}"
    again = [sys.executable, "-m", "sdjax.main", recipe, "--workdir=DIR"]
    print(f"train it again: {shlex.join(again)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
