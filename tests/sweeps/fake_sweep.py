"""A sweep over the fake main; as a process of its own, a worker of it: FOLDER TRIALS."""

import dataclasses
import sys
from pathlib import Path

from sdjax.config import Config
from sdjax.sweeps.space import no_space, read_space
from sdjax.sweeps.study import make_sweep
from sdjax.sweeps.worker import Stopped, work

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-S", "-E", str(Path(__file__).with_name("fake_main.py")))
SPACE = """
fields:
  optim.learning_rate: {low: 1e-6, high: 1, log: true}
  data.batch_size: {low: 8, high: 32, step: 8}
  ema.profiles: {choices: [[warmup-0.9999], [warmup-0.9999, power-0.05]]}
pruner: none
sampler: {name: tpe, seed: 1, startup_trials: 3}
"""


def base(**train):
    default = Config()
    return dataclasses.replace(
        default,
        train=dataclasses.replace(default.train, **{"steps": 30, **train}),
        validation=dataclasses.replace(default.validation, every=10),
    )


def make(folder, space=SPACE, config=None, folds=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(space)
    config = config or base()
    found = read_space(folder / "space.yaml", config) if space else no_space()
    return make_sweep(folder, config, found, folds)


if __name__ == "__main__":
    try:
        work(make(Path(sys.argv[1])), int(sys.argv[2]), command=COMMAND, poll=0.02)
    except Stopped:
        sys.exit(75)
