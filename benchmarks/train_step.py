"""The jitted train step of the UNet alone: images per second, TFLOP/s, MFU, memory.

    python benchmarks/train_step.py                       # tiny, as a first look, on any backend
    python benchmarks/train_step.py --size=sd21 --batch=32,64 --dtype=bfloat16 --remat=none,block

It is the trainer's own step (loss, gradients, AdamW, EMA, metrics), from random latents and text
features in place of encoded pictures and captions, on every device of this process. Options that
take several values, with commas between, make a row of each combination. There is no peer in here;
benchmarks/vs_torch.py has one.

Model FLOPs are counted over the mathematics of the step, without what rematerialisation computes
again. MFU is their rate over two ceilings: the fastest of a few square matrix products, timed in
the same run and dtype, and the data sheet of the chip, which is that of bfloat16 whatever the dtype
of the row. Peak memory is the device's own count where it keeps one and this row has raised it, and
the compiler's plan (arguments, results and temporaries) otherwise; the table says which.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from measure import Blocks, environment, in_turn, table, write_json
from sizes import SIZES
from train_program import Bench, Row, make_bench, make_config, own_resolution

from sdjax.config import Config
from sdjax.parallel.batches import check_batch
from sdjax.parallel.chips import peak_flops
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.system.allocator import use_large_pages
from sdjax.train.monitoring.model_flops import denoiser_flops, train_flops
from sdjax.train.program import compile_step

GIB = 2**30
PRODUCTS = 8  # matrix products in one call, so that starting it costs little
SIDES = {"cpu": (512, 1024, 2048), "accelerator": (4096, 8192, 16384)}
DEVICE, PLAN = "device", "plan"  # where a peak comes from
HEADER = ("size", "px", "dtype", "remat", "attention", "batch", "micro-batches", "ms a step",
          "images/s", "TFLOP/s", "MFU of matmul", "MFU of data sheet", "peak GiB",
          "compile s")  # fmt: skip


class OutOfMemory(Exception):
    """The step needs `peak` bytes on a device, which is more than there is."""

    def __init__(self, message: str, peak: int):
        super().__init__(message)
        self.peak = peak


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        settings = [(row, make_config(row)) for row in _rows(args)]
        for row, _ in settings:
            check_batch(row.batch, row.accumulation, make_mesh(MeshConfig()))
    except ValueError as error:
        parser.error(str(error))
    before = environment("numpy")
    ceilings = {
        dtype: matmul_ceiling(dtype, _sides(args), blocks=args.blocks, seconds=args.seconds / 4)
        for dtype in dict.fromkeys(args.dtype)
    }
    print(_preface(before, ceilings), end="\n\n", flush=True)
    print(table(HEADER, []), flush=True)
    result: dict[str, Any] = {
        "environment": before,
        "optimizer": "adamw",
        "matmul_flops_per_s": ceilings,
        "data_sheet_flops_per_s": peak_flops(jax.devices()[0].device_kind),
        "rows": [],
    }
    for row, config in settings:
        best = max(ceilings[row.dtype].values())
        found = measure(row, config, best, blocks=args.blocks, seconds=args.seconds)
        print(table(cells(found), []).splitlines()[0], flush=True)
        result["rows"].append(found | {"load_after": os.getloadavg()[0]})
        write_json(args.json, result)  # so far: the next row may take long, or never end


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        def read(text: str) -> list[Any]:
            return [kind(value) for value in text.split(",")]

        read.__name__ = f"comma-separated {kind.__name__}"  # for argparse's message
        return read

    add = functools.partial(parser.add_argument, metavar="A[,B]")
    add("--size", type=several(_size), default=["tiny"], help=f"UNets, of {', '.join(SIZES)}")
    add("--resolution", type=several(_count), help="pixels a side; by default the UNet's own")
    add("--dtype", type=several(str), default=["float32"], help="float32 or bfloat16")
    add("--remat", type=several(str), default=["none"],
        help="none, block, full, or the name of a policy of jax.checkpoint")  # fmt: skip
    add("--attention", type=several(str), default=["auto"], help="as `model.attention`")
    add("--batch", type=several(_count), default=[4], help="images a step, over all devices")
    add("--accumulation", type=several(_count), default=[1], help="micro-batches of a step")
    parser.add_argument("--no-ema", action="store_true", help="keep no average of the weights")
    parser.add_argument("--blocks", type=_count, default=5, help="timings that a median is of")
    parser.add_argument("--seconds", type=float, default=2.0, help="a timing takes about as long")
    parser.add_argument("--matmul", type=several(_count), metavar="N[,M]",
                        help="sides of the matrices of the measured ceiling")  # fmt: skip
    parser.add_argument("--json", help="file for all numbers")
    return parser


def _size(text: str) -> str:
    if text not in SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected {', '.join(SIZES)}")
    return text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of 1 or more")
    return int(text)


def _rows(args: argparse.Namespace) -> list[Row]:
    """Every combination, the first options varying least."""
    options = itertools.product(
        args.size, args.resolution or [0], args.dtype, args.remat, args.attention,
        args.batch, args.accumulation,
    )  # fmt: skip
    return [
        Row(size, resolution or own_resolution(size), *rest, ema=not args.no_ema)
        for size, resolution, *rest in options
    ]


def _sides(args: argparse.Namespace) -> tuple[int, ...]:
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    return tuple(args.matmul or SIDES[kind])


# ---- measuring -----------------------------------------------------------------------------------


def matmul_ceiling(
    dtype: str, sides: Sequence[int], *, blocks: int, seconds: float
) -> dict[int, float]:
    """{side: FLOP/s of one device} of square matrix products, median over the blocks.

    Each product's left side is the last one's result, and all are random numbers: zeros take a chip
    less power, and so less time.
    """

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ b, a)

    functions = {}
    for side in sides:
        keys = jax.random.split(jax.random.key(side))
        a, b = (jax.random.normal(key, (side, side)).astype(dtype) for key in keys)
        b = b * side**-0.5  # so that the variance stays
        functions[str(side)] = functools.partial(_waited, products, a, b)
    timed = in_turn(functions, blocks=blocks, seconds=seconds)
    return {side: PRODUCTS * 2 * side**3 / timed[str(side)].median for side in sides}


def _waited(function: Callable[..., Any], *args: Any) -> None:
    jax.block_until_ready(function(*args))


def measure(
    row: Row, config: Config, ceiling: float, *, blocks: int, seconds: float
) -> dict[str, Any]:
    """All that is known of a row, for JSON; where memory is short, "error" and no timing.

    Args:
        ceiling: measured FLOP/s of one device, in the row's dtype.
        blocks, seconds: timings, and about how long each takes.
    """
    train, forward = model_flops(row.size, row.resolution)
    found = dataclasses.asdict(row) | {
        "devices": jax.device_count(),
        "flops_per_image": train,
        "unet_forward_flops_per_image": forward,
    }
    try:
        return found | _timed(make_bench(config), train, ceiling, blocks, seconds)
    except OutOfMemory as error:
        peak = {"peak_bytes": error.peak, "peak_from": PLAN}
        return found | peak | {"error": f"out of memory: {error}"}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return found | {"error": f"out of memory: {str(error).splitlines()[0][:200]}"}


@functools.cache
def model_flops(size: str, resolution: int) -> tuple[float, float]:
    """FLOPs of training on one image, and of the UNet's forward; the same for every other option.

    MLPerf counts three forwards; the step saves the gradient with respect to its inputs.
    """
    config = make_config(Row(size, resolution, "float32", "none", "dense", 1, 1))
    latent = (resolution // 8, resolution // 8, config.model.unet.in_channels)
    return train_flops(config), denoiser_flops(config, latent)


def _timed(
    bench: Bench, flops: float, ceiling: float, blocks: int, seconds: float
) -> dict[str, Any]:
    compiled = compile_step(bench.program, bench.config)
    plan = planned_bytes(compiled.step)
    if plan is not None:
        check_room(plan)
    state, frozen, batch = bench.state(), bench.frozen(), bench.batch()
    raised = device_peak()  # by earlier rows, and by the compiler where it tries kernels out
    times, metrics = time_steps(compiled.step, state, frozen, batch, blocks=blocks, seconds=seconds)
    del state
    peak = device_peak()
    counted = peak is not None and raised is not None and peak > raised
    size, devices = bench.config.data.batch_size, jax.device_count()
    rate = size * flops / times.median / devices
    sheet = peak_flops(jax.devices()[0].device_kind)
    return {
        "compile_seconds": compiled.seconds,
        "step_seconds": times.json(),
        "images_per_s": size / times.median,
        "flops_per_s_per_device": rate,
        "mfu_matmul": rate / ceiling,
        "mfu_data_sheet": rate / sheet if sheet else None,
        "peak_bytes": peak if counted else plan,
        "peak_from": DEVICE if counted else PLAN,
        "loss": float(metrics["loss"]),
        "finite": bool(metrics["finite"]),
    }


def time_steps(
    step: Any, state: Any, frozen: Any, batch: Any, *, blocks: int, seconds: float
) -> tuple[Blocks, dict[str, Any]]:
    """Seconds of a step, and the metrics of the last one.

    As in training, steps are started one after the other and the host waits for none of them, until
    the last of a block. The first two are not timed: one warms up, one says how many make a block.
    """

    def run(count: int) -> tuple[float, dict[str, Any]]:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - begin) / count, metrics

    run(1)
    count = max(1, round(seconds / run(1)[0]))
    taken = [run(count) for _ in range(blocks)]
    return Blocks(tuple(seconds for seconds, _ in taken)), taken[-1][1]


# ---- memory --------------------------------------------------------------------------------------


def device_peak() -> int | None:
    """Bytes in use at most, so far in this process, on the fullest device; None if not counted."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return max(peaks, default=None)


def planned_bytes(step: Any) -> int | None:
    """What the compiled step holds at once on a device; None where the compiler does not say."""
    memory = step.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def check_room(plan: int) -> None:
    """Raises OutOfMemory where a step cannot run on a CPU; all other devices say so themselves.

    The system ends a process that takes more memory than there is, instead of refusing it.
    """
    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = plan * jax.local_device_count()
    if needed > memory:
        raise OutOfMemory(
            f"the step needs {needed / GIB:.1f} GiB, the machine has {memory / GIB:.1f}", plan
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a backend refused memory, as it compiled or as it ran."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")
    )


# ---- the table -----------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, under `HEADER`."""
    setting = [str(row[name]) for name in ("size", "resolution", "dtype", "remat", "attention",
                                           "batch", "accumulation")]  # fmt: skip
    peak = f"{row['peak_bytes'] / GIB:.2f} ({row['peak_from']})" if row.get("peak_bytes") else "-"
    if "error" in row:
        return [*setting, "out of memory", "-", "-", "-", "-", peak, "-"]
    sheet = row["mfu_data_sheet"]
    return [
        *setting,
        Blocks(tuple(row["step_seconds"]["blocks"])).text(1e3, 4),
        f"{row['images_per_s']:.4g}" + ("" if row["finite"] else " (loss not finite)"),
        f"{row['flops_per_s_per_device'] / 1e12:.4g}",
        f"{row['mfu_matmul']:.1%}",
        f"{sheet:.1%}" if sheet else "-",
        peak,
        f"{row['compile_seconds']:.1f}",
    ]


def _preface(where: dict[str, Any], ceilings: dict[str, dict[int, float]]) -> str:
    """The machine, and the ceilings that MFU is of."""
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items() if v)
    lines = [
        f"{len(where['devices'])} x {where['devices'][0]}; {where['processor']}, "
        f"{where['cores']} cores, load {where['load']:.1f}; Python {where['python']}, {versions}"
    ]
    for dtype, rates in ceilings.items():
        each = ", ".join(f"{side}: {rate / 1e12:.4g}" for side, rate in rates.items())
        lines.append(f"Matrix products in {dtype}, TFLOP/s by side: {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    use_large_pages()  # as the trainer does
    main()
