"""The announcement of a run: a few lines at its start, in full under `--dry_run`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from sdjax.checkpoints.assemble import Assembled, assemble
from sdjax.config import Config, to_dict
from sdjax.config_model import blank_method
from sdjax.data.summary import Summary
from sdjax.methods.method import COPY
from sdjax.parallel import xla
from sdjax.parallel.batches import shares
from sdjax.parallel.sharding import param_spec
from sdjax.train.monitoring.speed import device_memory
from sdjax.train.monitoring.telemetry import Telemetry
from sdjax.train.program import Compiled, Program, Split, build


def announce(
    config: Config,
    assembled: Assembled,
    split: Split,
    mesh: Mesh,
    folder: Path,
    start: int,
    compiled: Compiled,
) -> None:
    """Mesh, devices, precision, batch, sizes, compile time: what to check before leaving it be."""
    if jax.process_index() != 0:
        return
    batch, share = config.data.batch_size, shares(mesh)[jax.process_index()]
    parts = config.train.accumulation
    lines = [
        f"{config.method.name} in {folder}, "
        + (f"resumed at step {start}" if start else "from step 0"),
        f"mesh {_axes(mesh)}: {mesh.size} x {jax.devices()[0].device_kind}, "
        f"{jax.process_count()} host(s)",
        f"{_millions(split.trained)} parameters trained, {_millions(split.frozen)} frozen; "
        f"compute in {config.model.dtype}, moments in {config.optim.moments}, "
        "parameters, EMA and gradient sums in float32",
        f"batch {batch} ({batch // share.count} per host"
        + (f", in {parts} parts" if parts > 1 else "")
        + f"), {config.train.steps} steps, {config.train.steps * batch:,} images",
        f"step compiled in {compiled.seconds:.1f} s{_costs(compiled)}",
        *filter(None, [xla.describe(compiled.options)]),
    ]
    print("\n".join([*lines, *assembled.notes]), flush=True)


def announce_line(text: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def announce_data(summary: Summary, telemetry: Telemetry, start: int) -> None:
    """The datasets and buckets, what is left out and why; once a run also as scalars."""
    telemetry.message("\n".join(summary.lines))
    if start == 0:
        telemetry.scalars(0, {"data": summary.scalars})


def announce_shape(shape: tuple[int, int], compiled: Compiled, telemetry: Telemetry) -> None:
    """The first batch of pictures of another (height, width) has come."""
    height, width = shape
    telemetry.message(
        f"step for pictures of {width}x{height} compiled in {compiled.seconds:.1f} s"
        f"{_costs(compiled)}"
    )


def _axes(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _costs(compiled: Compiled) -> str:
    """Return the compiler's figures of the step, as far as it gives any."""
    parts = []
    if compiled.flops_per_image:
        parts.append(f"{compiled.flops_per_image / 1e9:.2f} GFLOP per image")
    if compiled.argument_bytes is not None and compiled.temporary_bytes is not None:
        arguments, temporaries = compiled.argument_bytes / 2**30, compiled.temporary_bytes / 2**30
        limit = device_memory().get("memory_limit_gib")
        parts.append(
            f"{arguments + temporaries:.2f} GiB per device ({arguments:.2f} state and batch, "
            f"{temporaries:.2f} temporaries)" + (f" of {limit:.2f}" if limit else "")
        )
    return "".join(f", {part}" for part in parts)


def describe(config: Config, mesh: Mesh) -> int:
    """Print the resolved configuration, parameter counts, memory and shardings; train nothing."""
    notes: tuple[str, ...] = ()
    if config.init_from or config.vae_from or config.text_encoder_from:
        assembled = assemble(config, with_tokenizer=False)
        config, notes = assembled.config, assembled.notes
    method = blank_method(config)
    program = build(config, method, mesh)
    if jax.process_index() != 0:
        return 0
    console = Console(width=None if Console().is_terminal else 120)
    console.print(json.dumps(to_dict(config), indent=2), markup=False, highlight=False)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    console.print(_counts(method.abstract, program.split))
    console.print(_memory(program))
    console.print(_shardings(program.split, mesh))
    return 0


def _counts(abstract: Mapping[str, Any], split: Split) -> Table:
    table = Table("network", "parameters", "trained", title="parameters")
    for name in dict.fromkeys(path.split(".")[0] for path in abstract):
        every = {p: v for p, v in abstract.items() if p.startswith(name + ".")}
        trained = {p: v for p, v in every.items() if p in split.trained}
        table.add_row(name, f"{_count(every):,}", f"{_count(trained):,}")
    return table


def bytes_on_device(tree: Any) -> int:
    """Return the bytes that abstract arrays with shardings take on a device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory_classes(program: Program) -> dict[str, int]:
    """Bytes on each device of everything whose size is known without compiling the step."""
    params = bytes_on_device(program.state["params"])
    return {
        "parameters": params,
        "gradients": params,
        "optimizer": bytes_on_device(program.state["opt_state"]),
        "EMA": bytes_on_device(program.state["ema"]),
        **({COPY: bytes_on_device(program.state[COPY])} if COPY in program.state else {}),
        "frozen networks": bytes_on_device(program.frozen),
        "batch": bytes_on_device(program.batch),
    }


def _memory(program: Program) -> Table:
    rows = memory_classes(program)
    table = Table(
        "class", "GiB per device", title="memory", caption="activations and temporaries come on top"
    )
    for name, size in rows.items():
        table.add_row(name, f"{size / 2**30:.3f}")
    table.add_row("total", f"{sum(rows.values()) / 2**30:.3f}", style="bold")
    if program.encoders:  # alone, while they encode the captions of pictures
        size = bytes_on_device(program.encoders)
        table.add_row("text encoders, before the first step", f"{size / 2**30:.3f}")
    return table


def _shardings(split: Split, mesh: Mesh) -> Table:
    """A line for each parameter, or a single one where the mesh splits none."""
    table = Table("parameter", "shape", "spec", title=f"shardings on {dict(mesh.shape)}")
    shapes = {path: value.shape for path, value in (split.trained | split.frozen).items()}
    specs = {path: param_spec(path, shape, mesh) for path, shape in shapes.items()}
    if not any(axis for spec in specs.values() for axis in spec):
        table.add_row(f"all {len(specs)}", "", "whole on every device")
        return table
    for path, spec in specs.items():
        table.add_row(path, str(shapes[path]), str(tuple(spec)))
    return table


def _count(params: Mapping[str, Any]) -> int:
    return sum(int(np.prod(v.shape)) for v in params.values())


def _millions(params: Mapping[str, Any]) -> str:
    return f"{_count(params) / 1e6:.2f} M"
