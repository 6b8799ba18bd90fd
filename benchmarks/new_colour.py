"""A LoRA is taught a colour that its base has never seen: what it learned, and what it forgot.

    python benchmarks/new_colour.py make runs/pink        # 20 pictures of pink shapes, captioned
    python -m sdjax.main --config=configs/shapes_lora.py --workdir=runs/pink_lora \\
        --config.init_from=runs/base --config.data.path=runs/pink
    python benchmarks/new_colour.py judge --model=runs/base --lora=runs/pink_lora

runs/base is the model of `make train`. The last command draws prompts of single pink shapes and
held-out prompts of the dataset, with the base and with the LoRA, and reads the pictures back, as
sdjax/data/builders/shape_reader.py reads those of a run's end.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from read_back import HEADER, drawn, line

from sdjax.data.builders import shapes
from sdjax.data.builders.shapes import POSITIONS, SHAPES, WIDTHS, Placed, Scene, Wanted

COLOUR, RGB = "pink", (255, 105, 180)  # CSS's hotpink; the nearest of the palette is purple
PICTURES, HELD_OUT = 20, 128


def make(folder: Path, seed: int = 0) -> None:
    """Write the pictures, each with its caption beside it: 20 of the 72 combinations."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (shape, size, position) in enumerate(_chosen()):
        width = float(rng.uniform(*WIDTHS[size]))
        x, y = (_place(rng, column, width) for column in POSITIONS[position])
        background = tuple(int(v) for v in rng.integers(*shapes.BACKGROUND, 3))
        scene = Scene((Placed(COLOUR, shape, size, position, x, y, width, RGB),), "", background)
        Image.fromarray(shapes.draw(scene)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(_prompt(shape, size, position) + "\n")


def _combinations() -> list[tuple[str, str, str]]:
    every = list(itertools.product(SHAPES, WIDTHS, POSITIONS))
    return [every[i] for i in np.random.default_rng(7).permutation(len(every))]


def _chosen() -> list[tuple[str, str, str]]:
    return _combinations()[:PICTURES]


def _others() -> list[tuple[str, str, str]]:
    """The combinations that are judged: none of those in the pictures."""
    return _combinations()[PICTURES:]


def _place(rng: np.random.Generator, column: int, width: float) -> float:
    low = shapes.MARGIN + width / 2
    middle = shapes.IMAGE_SIZE / 2
    start = (low, middle - 2, 2 * middle - low - shapes.POSITION_JITTER)[column]
    return float(start + rng.uniform(0, shapes.POSITION_JITTER))


def _prompt(shape: str, size: str, position: str, colour: str = COLOUR) -> str:
    return f"a {size} {colour} {shape} {position}"


def judge(model: str, lora: str | None, keep: Path | None) -> None:
    """Print a table of the shares of pictures that are right, before and after."""
    new = [(_prompt(*one), Wanted(COLOUR, one[0], one[1], one[2])) for one in _others()]
    old = []
    for i in range(HELD_OUT):
        caption = shapes.make_example(0, "test", i, pair_fraction=0.0)[1]
        old.append((caption, shapes.parse_caption(caption)[0]))
    shapes.PALETTE[COLOUR] = RGB  # from here on the reader knows it, too
    print(HEADER)
    for name, options in (("base", []), ("with the LoRA", [f"--lora={lora}"])):
        if lora is None and options:
            continue
        for what, pairs in ((f"new: {COLOUR}", new), ("held-out prompts", old)):
            images = drawn(model, [p for p, _ in pairs], options, keep and keep / name / what[:3])
            print(line(f"{name}, {what}", [[wanted] for _, wanted in pairs], images), flush=True)


def main() -> None:
    """Make or judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("make", help="draw the pictures").add_argument("folder", type=Path)
    judging = verbs.add_parser("judge", help="draw with a model and read the pictures back")
    judging.add_argument("--model", required=True)
    judging.add_argument("--lora")
    judging.add_argument("--keep", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    if args.verb == "make":
        make(args.folder)
    else:
        judge(args.model, args.lora, args.keep)


if __name__ == "__main__":
    main()
