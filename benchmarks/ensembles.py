"""One model, experts by noise level, averaged predictions and averaged weights, in one table.

    python -m sdjax.main --config=configs/shapes_expert.py --config.init_from=runs/base \\
        --workdir=runs/noisy --config.objective.timestep_min=500
    python -m sdjax.main --config=configs/shapes_expert.py --config.init_from=runs/base \\
        --workdir=runs/clear --config.objective.timestep_max=500
    python benchmarks/ensembles.py --model=runs/base --experts runs/noisy runs/clear \\
        --models runs/a runs/b --output=out -- --num_samples=256

All are drawn by `sdjax.evaluate` from the same prompts and noise. What follows -- goes to each of
its commands. The rows: --model by the average that it keeps and by its raw weights; --experts
together; each of --models, runs of one descent, of which --model may be one; the mean of their
predictions; and the model whose weights are their mean, which `sdjax.convert --average` makes.
Columns of scores have, in brackets, how often pictures are better than those of --model, a tie
counting half, with the interval. A row's seconds are those of its command, with compiling.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Draw all, and print a table for Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="what the others are compared with")
    parser.add_argument("--experts", nargs="*", default=[], metavar="DIR[:FROM:TO]")
    parser.add_argument("--models", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--scores", nargs="+", default=["fidelity_exact", "fidelity_relation"],
        help="columns, of comparison.json (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--guidance", default="3", help="(%(default)s)")
    parser.add_argument("--steps", default="25", help="(%(default)s)")
    parser.add_argument("options", nargs="*", help="after --, of sdjax.evaluate")
    args = parser.parse_args()
    rows = {"one model": [f"--model={args.model}"]}
    rows["its raw weights"] = [f"--model={args.model}", "--weights=raw"]
    if args.experts:
        experts = [f"--expert={one}" for one in args.experts]
        rows["experts"] = [f"--model={args.model}", *experts]
    for place in args.models:
        if place != args.model:
            rows[Path(place).name] = [f"--model={place}"]
    if len(args.models) > 1:
        rows["mean of predictions"] = [f"--model={place}" for place in args.models]
        average = args.output / "average"
        if not average.exists():
            run("convert", [f"--output={average}", "--average", *args.models])
        rows["mean of weights"] = [f"--model={average}"]
    print("| | " + " | ".join(args.scores) + " | seconds |\n|" + " --- |" * (len(args.scores) + 2))
    base = args.output / "one_model"
    for name, models in rows.items():
        folder = args.output / name.replace(" ", "_")
        begin = time.monotonic()
        options = [
            *models, f"--output={folder}", "--dataset=captioned_shapes", "--metrics=fidelity",
            f"--guidance={args.guidance}", f"--steps={args.steps}", *args.options,
        ]  # fmt: skip
        if name != "one model":
            options.append(f"--against={base}")
        run("evaluate", options)
        seconds = time.monotonic() - begin
        print(line(name, folder, base, args.scores, seconds), flush=True)


def run(verb: str, options: list[str]) -> None:
    """Run a verb of sdjax; what it prints is kept from the table."""
    subprocess.run(
        [sys.executable, "-m", f"sdjax.{verb}", *options], check=True, stdout=subprocess.DEVNULL
    )


def line(name: str, folder: Path, base: Path, scores: list[str], seconds: float) -> str:
    """A row of the table."""
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    wins = {}
    if folder != base:
        wins = json.loads((folder / "comparison.json").read_text())[str(base)]["win_rate"]
    cells = []
    for score in scores:
        shown = f"{100 * metrics[score]['value']:.1f} %" if score in metrics else "-"
        if score in wins:
            rate = wins[score]
            shown += f" ({rate['value']:.2f}, {rate['low']:.2f} to {rate['high']:.2f})"
        cells.append(shown)
    return f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |"


if __name__ == "__main__":
    main()
