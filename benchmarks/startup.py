"""How long a run takes to its first step: fresh, cold, and with XLA's compilation cache.

    python benchmarks/startup.py [--config=configs/base.py] [--repeats=3] [--set=FIELD=VALUE ...]

Starts `python -m sdjax.main` as a process of its own, in a new workdir, and reads its output until
the line of step 1 says that the step is complete; then ends it. Fresh is with an empty cache and no
dataset, which it generates (where the recipe has one that can be); cold with an empty cache alone;
and warm right after, with the cache that the cold run left; in turn, --repeats times. A run that is
not timed comes first: it prepares the dataset, and leaves Python's own caches filled.

Phases, as the output tells them: all until the step is compiled, without its compilation (imports,
devices, weights, the dataset opened, the state drawn); the compilation of the step, or its reading
from the cache; the log files opened and the data described; the first batch and step. The state is
drawn while the step compiles. Beside the seconds that pass stand those that
processors worked, which say more on a busy machine. Imports are also timed alone, in a process that
does nothing else.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Blocks, environment, table, write_json

ROOT = Path(__file__).parents[1]
# What `sdjax.main` prints once the step is compiled, once the data is described, after step 1.
COMPILED = re.compile(r"step compiled in ([\d.]+) s")
DATA = re.compile(r"data: ")
STEP = re.compile(r"step 1/")
PHASES = ("before, compilation aside", "compilation", "log and data", "first step")
WORKED, IMPORTS = "processors worked", "imports alone"
KINDS = ("fresh", "cold", "warm")
IMPORT_ALL = "import ml_collections, sdjax.main; from sdjax.train import loop"
TIMEOUT = 1800.0


def first_step(command: Sequence[str], timeout: float = TIMEOUT) -> dict[str, float]:
    """Seconds of each phase of a run, of all, and of its processors; it ends after its first step.

    Raises:
        SystemExit: it ended, or `timeout` seconds passed, before that.
    """
    begin, worked = time.monotonic(), _worked()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        )
        alarm = threading.Timer(timeout, process.kill)
        alarm.start()
        try:
            seen: dict[re.Pattern[str], float] = {}
            compilation = 0.0
            assert process.stdout is not None
            for line in process.stdout:
                for pattern in (COMPILED, DATA, STEP):
                    found = pattern.match(line)
                    if found and pattern not in seen:
                        seen[pattern] = time.monotonic() - begin
                        compilation = float(found[1]) if pattern is COMPILED else compilation
                if STEP in seen:
                    break
        finally:
            alarm.cancel()
            process.kill()
            process.wait()
        if len(seen) < 3:
            errors.seek(0)
            raise SystemExit(
                f"error: {' '.join(command)} ended within {time.monotonic() - begin:.0f} s without "
                f"a first step (at most {timeout:.0f} s were given):\n{errors.read()[-2000:]}"
            )
    marks = seen[COMPILED] - compilation, seen[COMPILED], seen[DATA], seen[STEP]
    phases = [marks[0], compilation, marks[2] - marks[1], marks[3] - marks[2]]
    totals = {"total": marks[3], WORKED: _worked() - worked}
    return dict(zip(PHASES, phases, strict=True)) | totals


def _worked() -> float:
    """Seconds that processors worked for processes of this one that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def command(
    config: str, changes: Sequence[str], work: Path, workdir: str, cache: str, data: str = "data"
) -> list[str]:
    """The run: `config` but for one step, no looks, and data and cache in `work`."""
    fixed = {
        "train.steps": 1,
        "train.log_every": 1,
        "train.sample_every": 0,
        "validation.examples": 0,
        "compilation_cache": work / cache,
    }
    if not any(change.startswith("data.data_dir=") for change in changes):
        fixed["data.data_dir"] = work / data
    flags = [f"--config.{change}" for change in changes]
    flags += [f"--config.{field}={value}" for field, value in fixed.items()]
    main = [sys.executable, "-m", "sdjax.main", f"--config={config}", f"--workdir={work / workdir}"]
    return [*main, *flags]


def time_imports() -> float:
    """Seconds of a process that imports what training does."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORT_ALL], check=True, cwd=ROOT)
    return time.monotonic() - begin


def measure(config: str, changes: Sequence[str], repeats: int) -> dict[str, Any]:
    """Starts of all kinds in turn; the result as it goes to the file."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        first_step(command(config, changes, work, "before", "cache"))
        for i in range(repeats):
            for kind, taken in runs.items():
                own = kind == "fresh"
                cache, data = (
                    (f"{kind}{i}_cache", f"{kind}{i}_data") if own else (f"cache{i}", "data")
                )
                run = command(config, changes, work, f"{kind}{i}", cache, data)
                taken.append(first_step(run) | {IMPORTS: time_imports()})
    return {
        "config": config,
        "set": list(changes),
        **{
            kind: {name: Blocks(tuple(run[name] for run in taken)).json() for name in taken[0]}
            for kind, taken in runs.items()
        },
        "environment": environment("orbax-checkpoint", "grain", "tensorflow-cpu"),
    }


def show(result: dict[str, Any]) -> str:
    """The table of a result."""
    rows = []
    for name in (*PHASES, "total", WORKED, IMPORTS):
        fresh, cold, warm = (Blocks(tuple(result[kind][name]["blocks"])) for kind in KINDS)
        rows.append([name, fresh.text(), cold.text(), warm.text(), warm.over(cold).text()])
    where = result["environment"]
    heading = (
        f"{result['config']} {' '.join(result['set'])}; {', '.join(where['devices'])}, "
        f"{where['processor']}, {where['cores']} cores, load {where['load']:.1f}"
    )
    return f"{heading}\n\n{table(['seconds', *KINDS, 'warm over cold'], rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/base.py", help="recipe (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="change a field of the recipe, as --config.FIELD=VALUE of sdjax.main does",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="of all kinds (%(default)s)")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: expected at least 1")
    result = measure(str(Path(args.config).absolute()), args.set, args.repeats)
    result["config"] = args.config
    print(show(result))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
