"""How right, real and different pictures of coloured shapes are after few steps.

    python -m sdjax.main --config=configs/shapes_lcm.py --workdir=runs/lcm \\
        --config.init_from=runs/base
    python benchmarks/few_steps.py --model=runs/base --distilled lcm=runs/lcm

runs/base is the model of `make train`; each of --distilled is a name, a workdir or one of its
checkpoints, and after an @ the numbers of steps to draw it with (1,2,4,8,25 without). All draw the
same held-out prompts from the same noise: the model with its own sampler (DDIM, trailing) and a
guidance of 3, distilled ones as their workdirs say, but for the steps and, where they read it,
that guidance.

Columns: what the reader of shapes finds right; `distance`, the Frechet distance of the means of the
VAE's latents to those of the held-out pictures, as FID is of Inception's features; `diversity`, the
mean cosine distance of the latents of four pictures of one prompt, 0 where they are the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from read_back import HEADER, drawn, line

from sdjax.checkpoints.reading import read_any
from sdjax.data.builders import shapes
from sdjax.evaluation.metrics import frechet, similarity
from sdjax.families.bind import bind

STEPS = (1, 2, 4, 8, 25)
REPEATED, TIMES = 64, 4  # prompts that are drawn again, and how often in all


def main() -> None:
    """Print a row for each model and number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--distilled", nargs="*", default=[], metavar="NAME=WORKDIR[@STEPS,...]", type=_distilled
    )
    parser.add_argument("--guidance", default="3", help="of the model (%(default)s)")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    real = [shapes.make_example(0, "test", i)[:2] for i in range(2 * args.pictures)]
    prompts = [prompt for _, prompt in real[: args.pictures]]
    wanted = [shapes.parse_caption(prompt) for prompt in prompts]
    features = latents(args.model)
    own, others = (
        features(np.stack([image for image, _ in part]))
        for part in (real[: args.pictures], real[args.pictures :])
    )
    reference = frechet.moments(own)
    floor = frechet.distance(frechet.moments(others), reference)
    print(HEADER, f"{'distance':>9}{'diversity':>10}{'seconds':>9}")
    print(f"{'as many other held-out pictures':82}{floor:9.2f}", flush=True)
    again = [*prompts, *prompts[:REPEATED] * (TIMES - 1)]
    numbers = np.arange(len(again)) % args.pictures
    numbers[args.pictures :] = np.tile(np.arange(REPEATED), TIMES - 1)
    models = [("model", args.model, STEPS, [f"--guidance={args.guidance}"])]
    models += [
        (name, folder, steps, [f"--embedded_guidance={args.guidance}"] * reads_guidance(folder))
        for name, folder, steps in args.distilled
    ]
    for name, folder, every, options in models:
        for steps in every:
            begin = time.monotonic()
            kept = args.keep and args.keep / f"{name}_{steps}"
            images = drawn(folder, again, [f"--steps={steps}", *options], kept)
            seconds = time.monotonic() - begin
            found = features(images)
            distance = frechet.distance(frechet.moments(found[: args.pictures]), reference)
            apart = similarity.diversity(found, numbers, resamples=0).value
            row = line(f"{name}, {steps} steps", wanted, images[: args.pictures])
            print(row, f"{distance:9.2f}{apart:10.3f}{seconds:9.0f}", flush=True)


def reads_guidance(folder: str) -> bool:
    """Whether a model reads the guidance scale."""
    model = read_any(folder, with_weights=False)
    return model.family.reads_guidance(model.networks)


def latents(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return what gives the means of latents, [N, D] float32, of pictures [N, H, W, 3] uint8."""
    model = read_any(folder, components=("vae",))
    channels = model.vae.latent_channels
    networks = bind(model, ("vae",))

    @jax.jit
    def encode(images: jax.Array) -> jax.Array:
        vae = networks.module("vae", model.params)
        return vae.encode(images / 127.5 - 1.0)[..., :channels].reshape(len(images), -1)

    def every(images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + 64] for i in range(0, len(images), 64)]
        return np.concatenate([np.asarray(encode(part.astype(np.float32))) for part in parts])

    return every


def _distilled(text: str) -> tuple[str, str, tuple[int, ...]]:
    """Read NAME=WORKDIR[@STEPS,...]."""
    name, _, rest = text.partition("=")
    folder, _, steps = rest.partition("@")
    return name, folder, tuple(int(n) for n in steps.split(",")) if steps else STEPS


if __name__ == "__main__":
    main()
