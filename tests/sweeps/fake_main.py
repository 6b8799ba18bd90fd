"""Stands in for `sdjax.main` in the tests of sweeps: writes metrics.jsonl, no training.

The loss falls to (log10(learning rate) + 3)^2 from more, plus a tenth of the fold's number. It goes
on where its metrics end and saves on SIGTERM (75). $FAKE says which trials do something else, as in
"diverge@2 wrong@*", $FAKE_SECONDS how long a validation takes.
"""

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
assert options["cluster"] == "none"
folder = Path(options["workdir"])
recipe = Path(options["config"]).read_text()


def field(name, default):
    found = re.search(rf"c\.{name} = (.+)", recipe)
    return float(found[1]) if found else default


rate, steps = field("optim.learning_rate", 1e-4), int(field("train.steps", 1000))
fold_of = re.search(r"c\.data\.fold = '(\d+)/", recipe)
fold = int(fold_of[1]) if fold_of else 0
assert not fold or "c.data.eval_split = 'validation'" in recipe
behaviour = ""
for name, trial in re.findall(r"(\w+)@(\S+)", os.environ.get("FAKE", "")):
    if trial == "*" or int(trial) == int(folder.name):
        behaviour = name
profile = re.search(r"c\.ema\.profiles = \['([^']+)'", recipe)
name = f"validation/{profile[1] if profile else 'warmup-0.9999'}/loss"
file = folder / "metrics.jsonl"
done = len(file.read_text().splitlines()) if file.exists() else 0
with open(folder / "starts", "a") as starts:
    starts.write(f"{os.getpid()} {done}\n")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
if behaviour == "wrong":
    print("something else\nerror: config.optim is not to its taste", flush=True)
    sys.exit(2)
if behaviour == "crash":
    raise RuntimeError("a bug")
while done * 10 < steps:
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if asked:
        (folder / "saved").touch()
        sys.exit(75)
    done += 1
    loss = (math.log10(rate) + 3) ** 2 + 1 / done + fold / 10
    value = "NaN" if behaviour == "diverge" else loss
    with open(file, "a") as metrics:
        row = {"step": done * 10, "train/loss": 1.0, name: value}
        metrics.write(json.dumps(row) + "\n")
    if behaviour == "diverge":
        sys.exit(3)
sys.exit(0)
