"""Textual inversion on coloured shapes: what a word learned from some pictures, and its cost.

    python benchmarks/new_word.py make runs/thing         # 6 pictures of large orange crosses
    python -m sdjax.main --config=configs/textual_inversion_tiny.py --workdir=runs/word \\
        --config.init_from=runs/base --config.data.path=runs/thing
    python benchmarks/new_word.py judge --model=runs/base --embedding=runs/word

runs/base is the model of `make train`. The word is to mean the colour, the shape and the size
together. Prompts with the word begin as its initializer, "circle", does; the reader of shapes says
what the pictures show before and after, in the places of the pictures and in all others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from read_back import HEADER, drawn, line

from sdjax.data.builders import shapes
from sdjax.data.builders.shapes import PALETTE, POSITIONS, WIDTHS, Placed, Scene, Wanted

THING = {"colour": "orange", "shape": "cross", "size": "large"}
WORD, INITIALIZER = "<thing>", "circle"
PICTURES, EACH = 6, 16


def make(folder: Path, seed: int = 0) -> None:
    """Write the pictures, without captions; the thing stands in as many places."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, place in enumerate(list(POSITIONS)[:PICTURES]):
        width = float(rng.uniform(*WIDTHS[THING["size"]]))
        x, y = (_at(rng, column, width) for column in POSITIONS[place])
        background = tuple(int(v) for v in rng.integers(*shapes.BACKGROUND, 3))
        placed = Placed(**THING, position=place, x=x, y=y, width=width, rgb=PALETTE["orange"])
        Image.fromarray(shapes.draw(Scene((placed,), "", background))).save(folder / f"{i}.png")


def _at(rng: np.random.Generator, column: int, width: float) -> float:
    low = shapes.MARGIN + width / 2
    middle = shapes.IMAGE_SIZE / 2
    start = (low, middle - 2, 2 * middle - low - shapes.POSITION_JITTER)[column]
    return float(start + rng.uniform(0, shapes.POSITION_JITTER))


def judge(model: str, embedding: str, keep: Path | None) -> None:
    """Print the shares of pictures that show the thing, with its initializer and with the word."""
    seen, new = list(POSITIONS)[:PICTURES], list(POSITIONS)[PICTURES:]
    groups = {"no place": [""], "places of the pictures": seen, "other places": new}
    print(HEADER)
    for word, options in ((INITIALIZER, []), (WORD, [f"--embedding={embedding}"])):
        for what, places in groups.items():
            each = EACH * PICTURES // len(places)
            wanted = [Wanted(**THING, position=place) for place in places for _ in range(each)]
            prompts = [f"a {word} {one.position}".strip() for one in wanted]
            images = drawn(model, prompts, options, keep and keep / word / what)
            print(line(f"{word}, {what}", [[one] for one in wanted], images), flush=True)


def main() -> None:
    """Make or judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("make", help="draw the pictures").add_argument("folder", type=Path)
    judging = verbs.add_parser("judge", help="draw with a model and read the pictures back")
    judging.add_argument("--model", required=True)
    judging.add_argument("--embedding", required=True)
    judging.add_argument("--keep", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    if args.verb == "make":
        make(args.folder)
    else:
        judge(args.model, args.embedding, args.keep)


if __name__ == "__main__":
    main()
