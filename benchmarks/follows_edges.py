"""A ControlNet of edges on coloured shapes: how far pictures follow the edges that they are given.

    python -m sdjax.main --config=configs/control_tiny.py --workdir=runs/control \\
        --config.init_from=runs/base
    python benchmarks/follows_edges.py --model=runs/base --controlnet=runs/control

runs/base is the model of `make train`. The edges are those of pictures of the test split with one
shape. The prompts name its colour, and its shape or another one than the edges show; never the size
and the place, which are in the edges alone. The reader of shapes says whether the pictures have the
colour and the shape of the prompt, and the size and the place of the edges.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from PIL import Image
from read_back import HEADER, drawn, line

from sdjax.data.builders import shapes
from sdjax.data.builders.shapes import SHAPES, Wanted
from sdjax.data.conditions import canny

PICTURES = 128


def main() -> None:
    """Print the shares, without and with the network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--controlnet", required=True)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        wanted, edges = scenes(folder / "edges")
        follow = [f"--controlnet={args.controlnet}", *(f"--control_image={file}" for file in edges)]
        said = {"shape": wanted, "another shape": [_another(one) for one in wanted]}
        print(HEADER)
        for name, options in (("without", []), ("with edges", follow)):
            for what, scenes_said in said.items():
                prompts = [_prompt(one) for one in scenes_said]
                images = drawn(args.model, prompts, options, folder / name / what)
                right = [[one] for one in scenes_said]
                print(line(f"{name}, said: {what}", right, images), flush=True)


def scenes(folder: Path) -> tuple[list[Wanted], list[Path]]:
    """What pictures of the test split show, and files of their edges, written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, files = [], []
    for i in range(PICTURES):
        image, caption, _ = shapes.make_example(0, "test", i, pair_fraction=0.0)
        wanted.append(shapes.parse_caption(caption)[0])
        files.append(folder / f"{i:03d}.png")
        Image.fromarray(canny(image)).save(files[-1])
    return wanted, files


def _prompt(one: Wanted) -> str:
    return f"{'an' if one.colour[0] in 'aeiou' else 'a'} {one.colour} {one.shape}"


def _another(one: Wanted) -> Wanted:
    following = SHAPES[(SHAPES.index(one.shape) + 1) % len(SHAPES)]
    return dataclasses.replace(one, shape=following)


if __name__ == "__main__":
    main()
