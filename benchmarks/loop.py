"""What the training loop adds to the bare jitted step: data, metrics, logging, checkpoints.

    python benchmarks/loop.py                                # configs/base.py, its own intervals
    python benchmarks/loop.py --config=FILE --set data.batch_size=8 --set train.log_every=10

Runs the loop of `sdjax.main` in this process and stops it after every --steps steps, until the
device is done. Its peer then takes as many steps: the very same compiled step on a copy of the
state, over and over on the batch at hand, one dispatched after the other. In turn, so that what
slows the machine slows both.

A line of the log falls into the blocks as often as `train.log_every` says. A checkpoint in the
middle of a block comes with every other one, far oftener than `train.checkpoint_every`; what it
adds to its block is divided by the steps between two. What is still being written when the block
ends is waited for off the clock. Pictures, validation and the report are left out: they are looks
at the run, and the log's images/s do not count them either. The target is less than 2 %.

Two copies of the state are in memory. Processor time is that of all threads of this process, which
other programs disturb less; on a GPU or TPU it says little. On a CPU the data is prepared by the
cores that compute.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import runpy
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from measure import Blocks, environment, table, write_json
from ml_collections import ConfigDict

from sdjax.checkpoints.checkpoint import Checkpoints
from sdjax.config import Config, resolve
from sdjax.errors import UserError
from sdjax.system.allocator import use_large_pages
from sdjax.train import loop
from sdjax.train.program import Steps


class Enough(Exception):
    """All blocks are taken; ends the loop."""


class Clock:
    """Takes the blocks, from inside the loop's own calls.

    A block of the loop is `steps` iterations, from the call of one step to that of another. The
    first block begins in the middle between two checkpoints, which come every 2 `steps`.
    """

    def __init__(self, steps: int, pairs: int):
        # A step's (seconds, seconds of processor time); the loop's second, fourth, ... block has a
        # checkpoint.
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self.late = 0.0  # seconds waited for checkpoints off the clock
        self.checkpoints: Checkpoints | None = None
        self._steps, self._pairs = steps, pairs
        self._first, self._calls = steps // 2, 0
        self._began: tuple[float, float] | None = None

    def before(self, steps: Steps, state: Any, frozen: Any, batch: Any) -> None:
        """The loop is about to dispatch a step."""
        done, self._calls = self._calls, self._calls + 1  # iterations that are complete
        if done < self._first or (done - self._first) % self._steps:
            return
        jax.block_until_ready(state)
        if self._began is not None:
            self.loop.append(self._since(self._began))
            begin = time.perf_counter()
            assert self.checkpoints is not None
            self.checkpoints.wait()
            self.late += time.perf_counter() - begin
            self.bare.append(self._bare(steps, state, frozen, batch))
            if len(self.bare) == 2 * self._pairs:
                raise Enough
        self._began = time.perf_counter(), time.process_time()

    def _since(self, began: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        return (now[0] - began[0]) / self._steps, (now[1] - began[1]) / self._steps

    def _bare(self, steps: Steps, state: Any, frozen: Any, batch: Any) -> tuple[float, float]:
        own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        begin = time.perf_counter(), time.process_time()
        for _ in range(self._steps):
            own, _ = Steps.__call__(steps, own, frozen, batch)
        jax.block_until_ready(own)
        return self._since(begin)


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """The loop's step tells the clock of every call; nothing else of the loop is changed."""

    class Told(Steps):
        def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
            clock.before(self, state, frozen, batch)
            return super().__call__(state, frozen, batch)

    class Known(Checkpoints):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            clock.checkpoints = self

    with mock.patch.object(loop, "Steps", Told), mock.patch.object(loop, "Checkpoints", Known):
        yield


def measure(config: ConfigDict, *, steps: int, pairs: int) -> dict[str, Any]:
    """Overheads as shares of the bare step; the result as it goes to the file.

    Args:
        config: not resolved; its looks are taken out.
        steps: of a block, even. pairs: of blocks without and with a checkpoint.

    Raises:
        UserError: the configuration cannot run.
    """
    interval = config.train.checkpoint_every
    config = config.copy_and_resolve_references()
    with tempfile.TemporaryDirectory() as folder:
        config.train.update(
            steps=10**6, checkpoint_every=2 * steps, sample_every=0, export=False, report=False
        )
        config.validation.update(examples=0, maxima_every=0)
        config.ema.snapshot_every = 0
        resolved: Config = resolve(config)
        clock = Clock(steps, pairs)
        with watched(clock), contextlib.suppress(Enough):
            loop.run(resolved, folder)
    return {
        "steps": steps,
        "log_every": resolved.train.log_every,
        "checkpoint_every": interval,
        "batch_size": resolved.data.batch_size,
        "elapsed": overhead(clock, 0, interval=interval, steps=steps),
        "processor": overhead(clock, 1, interval=interval, steps=steps),
        "late_seconds": clock.late,
        "environment": environment("orbax-checkpoint", "grain", "clu"),
    }


def overhead(clock: Clock, which: int, *, interval: int, steps: int) -> dict[str, Any]:
    """Of elapsed (0) or processor time (1): both, and what the loop adds as shares of the bare."""
    loop_, bare = (
        Blocks(tuple(pair[which] for pair in taken)) for taken in (clock.loop, clock.bare)
    )
    over = loop_.over(bare).values
    each = Blocks(tuple(value - 1 for value in over[::2]))
    # What a checkpoint adds to the steps of its block, over the steps between two checkpoints.
    pairs = zip(over[::2], over[1::2], strict=True)
    saved = Blocks(tuple((saving - plain) * steps / interval for plain, saving in pairs))
    return {
        "loop_seconds": loop_.json(),
        "bare_seconds": bare.json(),
        "each_step": each.json(),
        "checkpoints": saved.json(),
        "overhead": each.median + saved.median,
    }


def show(result: dict[str, Any]) -> str:
    """The table of a result."""

    def text(blocks: dict[str, Any], unit: str) -> str:
        scale, digits = (100.0, 2) if unit == "%" else (1.0, 3)
        return f"{Blocks(tuple(blocks['blocks'])).text(scale, digits)} {unit}"

    where = result["environment"]
    kinds = result["elapsed"], result["processor"]
    what = {
        "bare step": ("bare_seconds", "s"),
        "an iteration of the loop": ("loop_seconds", "s"),
        f"added: data, metrics, a log every {result['log_every']}": ("each_step", "%"),
        f"added: a checkpoint every {result['checkpoint_every']}": ("checkpoints", "%"),
    }
    rows = [
        [name, *(text(kind[key], unit) for kind in kinds)] for name, (key, unit) in what.items()
    ]
    rows.append(["together (target: under 2 %)", *(f"{kind['overhead']:.2%}" for kind in kinds)])
    header = ["median (least to most)", "elapsed", "processor time"]
    heading = (
        f"batch {result['batch_size']}, blocks of {result['steps']} steps; "
        f"{', '.join(where['devices'])}, {where['processor']}, {where['cores']} cores, load "
        f"{where['load']:.1f}; {result['late_seconds']:.1f} s waited for checkpoints off the clock"
    )
    return f"{heading}\n\n{table(header, rows)}"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/base.py", help="recipe (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="change a field of the recipe, as --config.FIELD=VALUE of sdjax.main does",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, help="of a block (%(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=3,
        help="blocks without a checkpoint, and as many with one (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.steps % 2:
        parser.error(f"--steps={args.steps}: expected an even number of at least 2")
    if args.pairs < 1:
        parser.error(f"--pairs={args.pairs}: expected at least 1")
    try:
        config = runpy.run_path(args.config)["get_config"]()
    except (OSError, KeyError) as error:
        parser.error(f"--config={args.config} is no recipe ({error!r}); see configs/")
    for change in args.set:
        field, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.update_from_flattened_dict({field: value})
        except (AttributeError, KeyError, TypeError) as error:
            parser.error(f"--set {change}: {error}")
    return args, config


def main(argv: list[str] | None = None) -> None:
    args, config = parse(argv)
    try:
        result = measure(config, steps=args.steps, pairs=args.pairs)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(show(result))
    write_json(args.json, result)


if __name__ == "__main__":
    use_large_pages()  # as the trainer does
    main()
