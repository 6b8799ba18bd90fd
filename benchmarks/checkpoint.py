"""How long a checkpoint holds up the training loop, against the time between two.

    python benchmarks/checkpoint.py [--millions=100] [--step_seconds=1.0] [--every=1000]

Saves a state of AdamW with one average (four float32 copies of the parameters) three times while
"training" goes on, and prints how long each `Checkpoints.save` blocked, what the same save takes
when waited for (its peer: what a synchronous one would cost), and the share of an interval of
`every` steps (the default of `train.checkpoint_every`) that the loop stands still.
"""

import argparse
import tempfile
import time

import jax
import jax.numpy as jnp

from sdjax.checkpoints.checkpoint import Checkpoints
from sdjax.config import TrainConfig


def make_state(millions: float) -> dict:
    side = 1024
    count = max(1, round(millions * 1e6 / side**2))
    names = [f"unet.block.{i}.kernel" for i in range(count)]

    @jax.jit
    def draw(key):
        return {n: jax.random.normal(k, (side, side)) for n, k in
                zip(names, jax.random.split(key, count), strict=True)}  # fmt: skip

    keys = jax.random.split(jax.random.key(0), 4)
    return dict(zip(("params", "mu", "nu", "ema"), map(draw, keys), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=100.0, help="of parameters")
    parser.add_argument("--step_seconds", type=float, default=1.0, help="of the step to compare")
    parser.add_argument("--every", type=int, default=TrainConfig().checkpoint_every)
    args = parser.parse_args()
    state = jax.block_until_ready(make_state(args.millions))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**30
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * jnp.float32(0.999), s), donate_argnums=0)
    interval = args.every * args.step_seconds
    print(f"{size:.2f} GiB, {jax.devices()[0].device_kind}; a checkpoint every {interval:.0f} s")
    print("save  blocks (s)  complete (s)  loop stands still")
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        for number in range(1, 4):
            begin = time.monotonic()
            checkpoints.save(number, state, {}, {})
            blocked = time.monotonic() - begin
            state = jax.block_until_ready(step(state))  # as the loop does: the buffers are donated
            checkpoints.wait()
            whole = time.monotonic() - begin
            print(f"{number:4}  {blocked:10.2f}  {whole:12.2f}  {blocked / interval:16.2%}")


if __name__ == "__main__":
    main()
