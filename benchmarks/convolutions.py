"""3 x 3 convolutions of a small UNet on the CPU: XLA's against torch's, in turn.

    python benchmarks/convolutions.py

Forward, the gradient towards the input and towards the kernel, float32, in GFLOP/s. The results of
the two are compared first; if they differ by more than 1e-4 of their size the script ends with exit
code 1. Convolutions are what holds `benchmarks/vs_torch.py` back on CPUs. Needs torch.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import environment, in_turn, table, write_json

from sdjax.system.allocator import use_large_pages

# (side, channels in, channels out) of the UNet `small` of benchmarks/sizes.py.
SHAPES = ((32, 64, 64), (32, 128, 64), (16, 128, 128), (16, 384, 128), (8, 256, 256))
PARTS = ("forward", "towards the input", "towards the kernel")
OURS, THEIRS = "jax", "torch"
TOLERANCE = 1e-4  # of the largest value


def pair(
    side: int, inputs: int, outputs: int, batch: int
) -> dict[str, dict[str, Callable[[], np.ndarray]]]:
    """{part: {library: computes it}} on the same numbers; results as NHWC and HWIO."""
    import torch

    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((batch, side, side, c), np.float32) for c in (inputs, outputs))
    kernel = rng.standard_normal((3, 3, inputs, outputs), np.float32)

    @jax.jit
    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def pull(argument: int, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(forward, x, kernel)[1](dy)[argument]

    on_device = tuple(map(jnp.asarray, (x, kernel, dy)))
    programs = [functools.partial(forward, *on_device[:2])]
    programs += [functools.partial(jax.jit(functools.partial(pull, i)), *on_device) for i in (0, 1)]
    nchw = [torch.from_numpy(a).permute(0, 3, 1, 2).contiguous() for a in (x, dy)]
    oihw = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()
    convolve = functools.partial(torch.nn.functional.conv2d, nchw[0], oihw, padding=1)
    back = torch.ops.aten.convolution_backward
    arguments = (nchw[1], nchw[0], oihw, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)

    def torchs(part: int) -> np.ndarray:
        with torch.no_grad():
            if part == 0:
                return convolve().permute(0, 2, 3, 1).numpy()
            found = back(*arguments, [part == 1, part == 2, False])[part - 1]
            return found.permute(*((0, 2, 3, 1) if part == 1 else (2, 3, 1, 0))).numpy()

    return {
        name: {
            OURS: lambda i=i: np.asarray(jax.block_until_ready(programs[i]())),  # type: ignore[misc]
            THEIRS: functools.partial(torchs, i),
        }
        for i, name in enumerate(PARTS)
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each shape and part.

    Raises:
        SystemExit: the two libraries do not agree.
    """
    rows = []
    for shape in args.shapes:
        side, inputs, outputs = shape
        flops = 2 * 9 * args.batch * side * side * inputs * outputs
        for part, contenders in pair(*shape, args.batch).items():
            ours, theirs = (contenders[name]() for name in (OURS, THEIRS))
            difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            if not difference <= TOLERANCE:
                raise SystemExit(f"{shape}, {part}: they differ by {difference:.2g}")
            taken = in_turn(contenders, blocks=args.blocks, seconds=args.seconds)
            rows.append(
                {"shape": shape, "part": part, "difference": difference,
                 "gflops": {name: flops / one.median / 1e9 for name, one in taken.items()},
                 "torch_over_jax": taken[THEIRS].over(taken[OURS]).json()}
            )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="images (%(default)s)")
    parser.add_argument("--blocks", type=int, default=5, help="rounds of timing (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each block (%(default)s)")
    parser.add_argument("--json", help="file for the results")
    parser.set_defaults(shapes=SHAPES)
    args = parser.parse_args(argv)
    rows = measure(args)
    where = environment("torch")
    print(f"{where['processor']}, {where['cores']} cores, load {where['load']:.1f}\n")
    cells = [
        [f"{s[0]} x {s[0]}, {s[1]} to {s[2]}", row["part"],
         *(f"{row['gflops'][name]:.0f}" for name in (OURS, THEIRS)),
         f"{row['torch_over_jax']['median']:.2f}"]
        for row in rows for s in [row["shape"]]
    ]  # fmt: skip
    versions = [f"{name} {where['versions'][name]}, GFLOP/s" for name in (OURS, THEIRS)]
    print(table(["channels", "", *versions, "torch's time over jax's"], cells))
    write_json(args.json, {"rows": rows, "batch": args.batch, "environment": where})


if __name__ == "__main__":
    use_large_pages()  # as the trainer does
    main()
