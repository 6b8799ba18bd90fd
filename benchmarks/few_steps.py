"""How right pictures of coloured shapes are after few steps: a model, and the same one distilled.

    python -m sdjax.main --config=configs/shapes_lcm.py --workdir=runs/lcm \\
        --config.init_from=runs/base
    python benchmarks/few_steps.py --model=runs/base --distilled=runs/lcm

runs/base is the model of `make train`. Both draw the same held-out prompts from the same noise, and
the reader of shapes says what the pictures show. The model is drawn with its own sampler (DDIM,
trailing) and a guidance of 3; the distilled one as its workdir says, but for the steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from read_back import HEADER, drawn, line

from sdjax.data.builders import shapes

STEPS = (1, 2, 4, 8, 25)


def main() -> None:
    """Print a row for each model and number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--distilled", required=True)
    parser.add_argument("--guidance", default="3", help="of the model (%(default)s)")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    prompts = [shapes.make_example(0, "test", i)[1] for i in range(args.pictures)]
    wanted = [shapes.parse_caption(prompt) for prompt in prompts]
    print(HEADER, f"{'seconds':>9}")
    for name, folder, own in (
        ("model", args.model, [f"--guidance={args.guidance}"]),
        ("distilled", args.distilled, [f"--embedded_guidance={args.guidance}"]),
    ):
        for steps in STEPS:
            begin = time.monotonic()
            kept = args.keep and args.keep / f"{name}_{steps}"
            images = drawn(folder, prompts, [f"--steps={steps}", *own], kept)
            seconds = time.monotonic() - begin
            print(line(f"{name}, {steps} steps", wanted, images), f"{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
