"""Give hostile inputs to every reader for so long: `python -m tests.fuzz --seconds=60`.

Each target runs in a process of its own, which is replaced when an input kills it. Exits with 1 if
an input was a fault; the command that repeats it is in the folder of --faults.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz import targets
from tests.fuzz.runner import run
from tests.fuzz.trial import Bounds, Outcome, attempt


def main() -> int:
    args = _arguments()
    there = targets()
    unknown = set(args.target) - set(there)
    if unknown or not there:
        print(f"no target {sorted(unknown)}; there are: {', '.join(there)}", file=sys.stderr)
        return 2
    bounds = Bounds(args.time_bound, args.memory_bound * 2**20)
    if args.keep is not None:
        return _once(args, bounds)
    code = 0
    print(f"first seed {args.seed}; {args.seconds:g} s for each target", flush=True)
    for name in args.target or there:
        tally = run(name, args.seed, args.seconds, args.inputs, bounds)
        print(f"{name}: {tally.line()}", flush=True)
        for outcome in tally.faults:
            code = 1
            last = "\n  ".join(outcome.fault.strip().splitlines()[-3:])
            print(f"{name}, seed {outcome.seed}:\n  {last[:2000]}", flush=True)
            print(f"  to repeat: {_save(args.faults, name, outcome)}", flush=True)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--inputs", type=int, default=None, help="at most so many of each target")
    parser.add_argument("--target", action="append", default=[], help="may be repeated")
    parser.add_argument("--seed", type=int, default=None,
                        help="of the first input; the next count up; default: now")  # fmt: skip
    parser.add_argument("--time-bound", type=float, default=Bounds.seconds, help="seconds an input")
    parser.add_argument("--memory-bound", type=int, default=Bounds.memory // 2**20,
                        help="MiB an input")  # fmt: skip
    parser.add_argument("--faults", type=Path, default=Path("runs/fuzz"), help="folder for faults")
    parser.add_argument("--keep", type=Path, default=None,
                        help="run one input in this process and keep its files here")  # fmt: skip
    args = parser.parse_args()
    if args.seed is None:
        args.seed = int(time.time()) * 1000
    return args


def _once(args: argparse.Namespace, bounds: Bounds) -> int:
    """Run the input of one target and seed, with its files kept."""
    if len(args.target) != 1:
        print("--keep needs one --target", file=sys.stderr)
        return 2
    args.keep.mkdir(parents=True, exist_ok=False)
    outcome = attempt(targets()[args.target[0]], args.seed, bounds, args.keep)
    print(outcome.fault or outcome.word)
    print(f"{outcome.memory / 2**20:.0f} MiB, {outcome.seconds:.2f} s")
    return int(bool(outcome.fault))


def _save(folder: Path, name: str, outcome: Outcome) -> str:
    """Write a fault to a file, and return the command that repeats it."""
    command = f"python -m tests.fuzz --target={name} --seed={outcome.seed} --keep=FOLDER"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{outcome.seed}.txt").write_text(f"{command}\n\n{outcome.fault}\n")
    return command


if __name__ == "__main__":
    sys.exit(main())
