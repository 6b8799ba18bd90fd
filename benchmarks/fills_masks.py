"""Masked coloured shapes: how often the prompted shape comes back, and what changes around it.

    python -m sdjax.main --config=configs/inpaint_tiny.py --workdir=runs/inpaint \\
        --config.init_from=runs/base
    python benchmarks/fills_masks.py --model=runs/base --inpainting=runs/inpaint

runs/base is the model of `make train`, which keeps what is not masked by blending; the UNet of
runs/inpaint reads the mask and the masked picture. A mask covers one shape of a picture of the test
split whole. The prompt says what the picture showed, or another colour and shape in its place. The
reader of shapes says what the results show, and whether the shape that was not masked is as it was.
Outside of the mask a picture is held beside what the VAE alone makes of it, in levels of 255: all
of it, and what is a latent or more away from the mask, since the VAE's decoder sees neighbours.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from read_back import HEADER, drawn, line

from sdjax.data.builders import shapes
from sdjax.data.builders.shapes import PALETTE, SHAPES, Placed, Wanted

PICTURES = 128
PATCH = 8  # pixels of a latent: masks end where latents do
AROUND = 2  # pixels at least between a shape and the edge of its mask


class Case(NamedTuple):
    """Pictures uint8 [N, 64, 64, 3], masks bool [N, 64, 64], and what the results are to show."""

    images: np.ndarray
    masks: np.ndarray
    wanted: list[list[Wanted]]


def main() -> None:
    """Print a row for each model and case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--inpainting", required=True)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        print(HEADER, f"{'outside':>9}{'farther':>9}")
        for what, case in cases().items():
            files = written(case, folder / what)
            prompts = [" ".join(said(scene)) for scene in case.wanted]
            black = [f"--mask_image={folder / what / 'black.png'}"] * len(prompts)
            kept = drawn(args.model, prompts, [*files[0], *black, "--steps=1"], None)
            alone = np.abs(kept.astype(float) - case.images).mean()
            print(f"the VAE alone changes '{what}' by {alone:.1f}")
            for name, model in (("blending", args.model), ("inpainting", args.inpainting)):
                own = [*files[0], *files[1], "--guidance=3"]
                made = drawn(model, prompts, own, folder / name / what)
                apart = np.abs(made.astype(float) - kept).mean(axis=-1)
                changes = [apart[~mask].mean() for mask in (case.masks, grown(case.masks))]
                shown = "".join(f"{change:9.1f}" for change in changes)
                print(line(f"{name}, {what}", case.wanted, made), shown, flush=True)


def cases() -> dict[str, Case]:
    """Return the cases by name: a shape alone, the same with another said, one of two."""
    alone = [shapes.make_example(0, "test", i, pair_fraction=0.0) for i in range(PICTURES)]
    pairs = [shapes.make_example(0, "test", i, pair_fraction=1.0) for i in range(PICTURES)]
    masked = masks([scene.objects[0] for _, _, scene in alone])
    images = np.stack([image for image, _, _ in alone])
    same = [shapes.parse_caption(caption) for _, caption, _ in alone]
    return {
        "one, the same said": Case(images, masked, same),
        "one, another said": Case(
            images, masked, [[another(one) for one in each] for each in same]
        ),
        "two, one masked": Case(
            np.stack([image for image, _, _ in pairs]),
            masks([scene.objects[0] for _, _, scene in pairs]),
            [shapes.parse_caption(caption) for _, caption, _ in pairs],
        ),
    }


def masks(objects: Sequence[Placed]) -> np.ndarray:
    """Return masks of whole patches round objects, bool [N, 64, 64]."""
    found = np.zeros((len(objects), shapes.IMAGE_SIZE, shapes.IMAGE_SIZE), bool)
    for mask, one in zip(found, objects, strict=True):
        reach = one.width / 2 + AROUND
        x, y = (
            slice(max(0, int((c - reach) // PATCH) * PATCH), int(-((c + reach) // -PATCH)) * PATCH)
            for c in (one.x, one.y)
        )
        mask[y, x] = True
    return found


def grown(found: np.ndarray) -> np.ndarray:
    """Return masks [N, H, W] with a patch more on each side."""
    for axis in (1, 2):
        for step in (-PATCH, PATCH):
            moved = np.roll(found, step, axis)
            edge = [slice(None)] * 3
            edge[axis] = slice(None, PATCH) if step > 0 else slice(-PATCH, None)
            moved[tuple(edge)] = False
            found = found | moved
    return found


def another(one: Wanted) -> Wanted:
    """Return what is wanted with the next colour and the next shape."""
    colours = list(PALETTE)
    colour = colours[(colours.index(one.colour) + 1) % len(colours)]
    shape = SHAPES[(SHAPES.index(one.shape) + 1) % len(SHAPES)]
    return dataclasses.replace(one, colour=colour, shape=shape)


def said(scene: Sequence[Wanted]) -> list[str]:
    """Return the words of a caption."""
    words = []
    for one in scene:
        name = f"{one.size} {one.colour} {one.shape}".strip()
        words += [f"{'an' if name[0] in 'aeiou' else 'a'} {name}", one.position or one.relation]
    return [word for word in words if word]


def written(case: Case, folder: Path) -> tuple[list[str], list[str]]:
    """Write the pictures and masks of a case; return them as options of `sdjax.sample`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, covers = [], []
    for i, (image, mask) in enumerate(zip(case.images, case.masks, strict=True)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        Image.fromarray(mask).save(folder / f"{i:03d}_mask.png")
        pictures.append(f"--init_image={folder / f'{i:03d}.png'}")
        covers.append(f"--mask_image={folder / f'{i:03d}_mask.png'}")
    Image.new("L", case.images.shape[2:0:-1]).save(folder / "black.png")
    return pictures, covers


if __name__ == "__main__":
    main()
