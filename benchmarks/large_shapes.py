"""A rater who likes large shapes: what a model learns from the ratings, and what else changes.

    python benchmarks/large_shapes.py rate --model=runs/base --ratings=runs/ratings
    python -m sdjax.prepare --from_ratings=runs/ratings --output=runs/pairs --test_share=0.1
    python -m sdjax.main --config=configs/shapes_dpo.py --config.init_from=runs/base \\
        --config.data.path=runs/pairs --workdir=runs/large
    python benchmarks/large_shapes.py prompts runs/prompts
    python -m sdjax.evaluate --model=runs/large --against=runs/base --dataset=runs/prompts \\
        --per_prompt=4 --features=pixels --output=runs/large/against_base

runs/base is the model of `make train`. The first command starts `sdjax.serve --ratings` and asks it
for pictures of prompts that say no size, as its page does. Of each two of one prompt it says that
the one with the larger shape is better, where both are right and the widths differ by a tenth or
more, or else that the right one is. The fourth writes pictures of held-out prompts that say no
size. The last says how often the new model's shapes are larger, and what moved besides.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data.builders import shapes
from sdjax.data.builders.shape_reader import read_shapes

PROMPTS, PER_PROMPT = 128, 4
CLEARLY = 1.1  # how many times as wide a shape that is larger is


def examples(split: str, count: int) -> dict[str, np.ndarray]:
    """Captions of single shapes without their sizes, each with a picture of it."""
    found: dict[str, np.ndarray] = {}
    for number in range(200 * count):
        image, caption, _ = shapes.make_example(0, split, number, pair_fraction=0.0)
        caption = caption.replace("large ", "").replace("small ", "")
        found.setdefault(caption, image)
        if len(found) == count:
            return found
    raise SystemExit(f"{split} has {len(found)} such captions; ask for at most as many --prompts")


def width(caption: str, image: np.ndarray) -> float | None:
    """The width of the shape that a caption asks for, over the picture's; None if it is not there.

    Pictures with anything else in them are wrong too.
    """
    (wanted,) = shapes.parse_caption(caption)
    found = read_shapes(image)
    if len(found) != 1 or (found[0].colour, found[0].shape) != (wanted.colour, wanted.shape):
        return None
    left, _, right, _ = found[0].box
    return (right - left) / image.shape[1]


def preferred(one: float | None, other: float | None) -> int:
    """Return 1 if the first is better, -1 if the second is, 0 where the rater says nothing."""
    if one is None or other is None:
        return (one is not None) - (other is not None)
    low, high = sorted((one, other))
    return 0 if high < CLEARLY * low else 1 if one > other else -1


@contextlib.contextmanager
def served(model: str, ratings: Path, steps: int) -> Iterator[str]:
    """The address of a server of its own."""
    command = [
        sys.executable, "-m", "sdjax.serve", f"--model={model}", f"--ratings={ratings}", "--port=0",
        "--rate=1000000", "--batch_size=4", "--guidance=3", f"--steps={steps}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " at http" not in line:
                raise SystemExit(f"the server did not start: {line}")
            yield line.split(" at ")[1].split()[0]
        finally:
            process.terminate()


def ask(address: str, path: str, body: dict[str, Any]) -> list[Any]:
    """Return the lines of JSON that answer a request."""
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return [json.loads(line) for line in answer.read().splitlines()]


def rate(model: str, ratings: Path, count: int, per_prompt: int, steps: int) -> None:
    """Draw by the server, rate, and print what was said."""
    said = pictures = right = 0
    with served(model, ratings, steps) as address:
        for number, caption in enumerate(examples("train", count)):
            body = {"prompt": caption, "seed": 1000 * number, "batch_size": per_prompt}
            lines = ask(address, "draw", body)
            if wrong := [line["error"] for line in lines if "error" in line]:
                raise SystemExit(wrong[0])
            made = [line for line in lines if "picture" in line]
            found = []
            for line in made:
                file = base64.b64decode(line["picture"].partition(",")[2])
                image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
                found.append((line["name"], width(caption, image)))
            pictures += len(found)
            right += sum(size is not None for _, size in found)
            for i, (name, size) in enumerate(found):
                for other, its in found[i + 1 :]:
                    if choice := preferred(size, its):
                        better, worse = (name, other) if choice > 0 else (other, name)
                        ask(address, "rate", {"better": better, "worse": worse})
                        said += 1
    print(f"{pictures} pictures of {count} prompts, {right} right; {said} pairs in {ratings}")


def write_prompts(folder: Path, count: int) -> None:
    """Write pictures of the dataset with captions that say no size, for `sdjax.evaluate`."""
    folder = folder / "test"
    folder.mkdir(parents=True, exist_ok=True)
    rated, lines = examples("train", PROMPTS), []
    for caption, image in examples("test", count).items():
        if caption in rated:
            continue
        name = f"{len(lines):05d}.png"
        Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Rate, or write prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    rating = verbs.add_parser("rate", help="draw by a server, and rate as one who likes it large")
    rating.add_argument("--model", required=True)
    rating.add_argument("--ratings", type=Path, required=True, help="folder for the ratings")
    rating.add_argument("--prompts", type=int, default=PROMPTS)
    rating.add_argument("--per_prompt", type=int, default=PER_PROMPT)
    rating.add_argument("--steps", type=int, default=25)
    writing = verbs.add_parser("prompts", help="write held-out prompts without a size")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    if args.verb == "rate":
        rate(args.model, args.ratings, args.prompts, args.per_prompt, args.steps)
    else:
        write_prompts(args.folder, args.prompts)


if __name__ == "__main__":
    main()
