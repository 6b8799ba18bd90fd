"""Muon's update of a recipe's matrices: ours against optax's, in turn.

    python benchmarks/muon.py                        # configs/base.py
    python benchmarks/muon.py --config=FILE

Momentum and the five Newton-Schulz steps, float32, without the learning rate. The updates of the
two are compared first; if they differ by more than 1e-4 of the largest the script ends with exit
code 1. Compilation is timed once.
"""

from __future__ import annotations

import argparse
import math
import runpy
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import environment, in_turn, table, write_json
from optax import contrib

from sdjax.checkpoints import assemble
from sdjax.config import Config, resolve
from sdjax.config_model import method_of_run
from sdjax.optim.muon import scale_by_muon
from sdjax.optim.optimizers import is_muons

OURS, THEIRS = "sdjax", "optax"
TOLERANCE = 1e-4  # of the largest element of a matrix
RMS, MOMENTUM, EPS = 0.2, 0.95, 1e-8


def matrices(config: Config) -> dict[str, jax.Array]:
    """Random gradients [..., outputs] of what muon takes among the trained parameters."""
    assembled = assemble.assemble(config)
    method = method_of_run(assembled.config, assembled.tokenizers)
    rng = np.random.default_rng(0)
    return {
        path: jnp.asarray(rng.standard_normal(leaf.shape, np.float32))
        for path, leaf in method.abstract.items()
        if method.trainable(path) and is_muons(path, leaf.ndim)
    }


def optimizers(grads: dict[str, jax.Array]) -> dict[str, Any]:
    """{library: optax transformation}, with the same update of these matrices."""
    theirs = contrib.scale_by_muon(
        beta=MOMENTUM,
        eps=EPS,
        weight_dimension_numbers={
            path: contrib.MuonDimensionNumbers(tuple(range(g.ndim - 1)), g.ndim - 1)
            for path, g in grads.items()
        },
    )
    return {OURS: scale_by_muon(momentum=MOMENTUM, eps=EPS, rms=RMS), THEIRS: theirs}


def measure(grads: dict[str, jax.Array], blocks: int, seconds: float) -> dict[str, Any]:
    """Seconds of compiling and of one update, for each library.

    Raises:
        SystemExit: the two updates are not the same.
    """
    programs, compiling = {}, {}
    for name, tx in optimizers(grads).items():
        state = tx.init(grads)
        begin = time.perf_counter()
        program = jax.jit(tx.update).lower(grads, state).compile()
        compiling[name] = time.perf_counter() - begin
        programs[name] = lambda program=program, state=state: jax.block_until_ready(
            program(grads, state)[0]
        )
    ours, theirs = (programs[name]() for name in (OURS, THEIRS))
    for path, update in ours.items():
        scale = RMS * math.sqrt(max(update.size // update.shape[-1], update.shape[-1]))
        difference = float(jnp.abs(update - scale * theirs[path]).max() / jnp.abs(update).max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"{path}: the updates differ by {difference:.2g}")
    taken = in_turn(programs, blocks=blocks, seconds=seconds)
    return {
        "matrices": len(grads),
        "parameters": sum(g.size for g in grads.values()),
        "compiling": compiling,
        "update": {name: one.json() for name, one in taken.items()},
        "ours_over_optax": taken[OURS].over(taken[THEIRS]).json(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/base.py", help="recipe (%(default)s)")
    parser.add_argument("--blocks", type=int, default=5, help="rounds of timing (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each block (%(default)s)")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    grads = matrices(resolve(runpy.run_path(args.config)["get_config"]()))
    found = measure(grads, args.blocks, args.seconds)
    where = environment()
    print(f"{where['processor']}, {where['cores']} cores, load {where['load']:.1f}")
    print(f"{found['parameters'] / 1e6:.1f} M parameters in {found['matrices']} matrices\n")
    cells = [
        [f"{name} {where['versions'].get(name) or ''}".strip(),
         f"{found['compiling'][name]:.1f} s", f"{found['update'][name]['median'] * 1e3:.0f} ms"]
        for name in (OURS, THEIRS)
    ]  # fmt: skip
    print(table(["", "compiling", "an update"], cells))
    print(f"\nours over optax's, block by block: {found['ours_over_optax']['median']:.2f}")
    write_json(args.json, {**found, "environment": where})


if __name__ == "__main__":
    main()
