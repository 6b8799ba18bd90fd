"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sdjax.planning.planner import Plan

GIB = 2**30


def show(plan: Plan, console: Console) -> None:
    """Print one plan: verdict, memory, time, collectives, temporaries and advice."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    batch = plan["batch"]
    line = (
        f"{plan['topology']}: {plan['chips']} {plan['chip']} chips, mesh {mesh}, batch "
        f"{batch['global']} ({batch['per_chip']:g} a chip"
        + (f", in {batch['accumulation']} parts" if batch["accumulation"] > 1 else "")
        + f"); {plan['basis']}"
    )
    _text(console, line)
    console.print(_memory(plan))
    if "time" in plan:
        console.print(_time(plan))
        console.print(_collectives(plan))
    if plan["temporaries"]:
        console.print(_temporaries(plan))
    for warning in plan["warnings"]:
        _text(console, f"note: {warning}")
    if not plan["fits"]:
        _text(console, f"IT DOES NOT FIT. {plan.get('error', '')}".strip())
        for number, advice in enumerate(plan["advice"], 1):
            _text(console, f"  {number}. {advice}")


def show_search(tried: Sequence[Plan], best: Plan | None, console: Console) -> None:
    """Print the plans of a search, and the command line of the best."""
    table = Table("mesh", "batch", "a chip", "GiB", "ms a step", "images/s/chip", "MFU",
                  title="tried")  # fmt: skip
    for plan in tried:
        mesh = " x ".join(str(size) for size in plan["mesh"].values())
        start = (mesh, str(plan["batch"]["global"]), f"{plan['batch']['per_chip']:g}")
        if plan["fits"]:
            rest = (f"{plan['memory']['total'] / GIB:.1f}", f"{plan['time']['step'] * 1e3:.0f}",
                    f"{plan['images_per_second_per_chip']:.2f}", f"{plan['mfu']:.1%}")  # fmt: skip
        else:
            rest = ("over", "", "", "")
        table.add_row(*start, *rest, style="bold" if plan is best else "")
    console.print(table)
    if best is None:
        _text(console, "nothing fits: see the advice for the smallest that was tried")
        return
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best["mesh"].items())
    _text(console, f"best: {mesh} --config.data.batch_size={best['batch']['global']}")


def _text(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False)


def _memory(plan: Plan) -> Table:
    memory = plan["memory"]
    device = "chip" if plan["devices"] == plan["chips"] else "device (half a chip)"
    table = Table("class", f"GiB per {device}", title="memory")
    for name, size in memory["classes"].items():
        table.add_row(name, f"{size / GIB:.3f}")
    total = memory["total"]
    if total is not None:
        table.add_row("total", f"{total / GIB:.3f}", style="bold")
    elif memory["needed"] is not None:
        table.add_row("needed, says the compiler", f"{memory['needed'] / GIB:.3f}", style="bold")
    table.add_row("there is", f"{memory['limit'] / GIB:.3f}")
    return table


def _time(plan: Plan) -> Table:
    took = plan["time"]
    table = Table("of a step", "", title="time", caption="an estimate; FLOPs and bytes per device")
    rows = [
        ("FLOPs, with what is computed twice", f"{plan['flops'] / 1e12:.3f} T"),
        ("HBM traffic", f"{plan['hbm_bytes'] / 1e9:.1f} GB"),
        ("arithmetic intensity (the chip's balance)",
         f"{plan['intensity'] or 0:.0f} ({plan['balance']:.0f}) FLOPs/byte"),
        ("operations, one after the other", _ms(took["operations"])),
        ("kernels, by their declared cost", _ms(took["kernels"])),
        ("collectives, all / that nothing hides",
         f"{_ms(took['collectives'])} / {_ms(took['exposed'])}"),
        ("estimated step time", _ms(took["step"])),
        ("roofline of its FLOPs and traffic", _ms(took["roofline"])),
        ("images/s", f"{plan['images_per_second']:.1f}"),
        ("images/s/chip", f"{plan['images_per_second_per_chip']:.2f}"),
        ("MFU", f"{plan['mfu']:.1%} of {plan['model_flops_per_image'] / 1e12:.4g} TFLOP an image"),
    ]  # fmt: skip
    optimal = took["optimal_seconds"]
    if optimal is not None:
        doubt = "" if took["optimal_seconds_plausible"] else ", not to be believed"
        rows.insert(8, ("the compiler's optimal_seconds, without collectives",
                        _ms(optimal) + doubt))  # fmt: skip
    if not plan["kernels"]:
        rows = [row for row in rows if not row[0].startswith("kernels")]
    for row in rows:
        table.add_row(*row, style="bold" if row[0] in ("estimated step time", "MFU") else "")
    return table


def _collectives(plan: Plan) -> Table:
    table = Table("collective", "of devices", "a step", "MiB", "ms", "runs", title="collectives")
    for row in plan["collectives"]:
        runs = "beside other work" if row["asynchronous"] else "alone"
        runs += ", in a loop" if row["in_loop"] else ""
        runs += f", over {row['islands']} islands" if row["islands"] > 1 else ""
        size, took = f"{row['bytes'] / 2**20:.1f}", f"{row['seconds'] * 1e3:.3f}"
        table.add_row(row["kind"], str(row["group"]), str(row["count"]), size, took, runs)
    return table


def _temporaries(plan: Plan) -> Table:
    table = Table("array", "MiB", "times", "from", title="largest temporaries, as padded")
    for row in plan["temporaries"]:
        table.add_row(
            row["shape"], f"{row['bytes'] / 2**20:.1f}", str(row["count"]), row["op_name"][-70:]
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
