"""A search for the best length of average: post-hoc EMA (EDM2, arXiv 2312.02696, section 3).

A run with a power-function profile and `ema.snapshot_every` keeps snapshots. The average of any
other relative width can be made from them. Each width of a range is evaluated in the same way.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.averages import with_averages
from sdjax.errors import UserError
from sdjax.evaluation import evaluation_output
from sdjax.evaluation.evaluation import Inputs, Results
from sdjax.evaluation.loading import Loaded
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.evaluation.session import Session
from sdjax.optim import ema
from sdjax.system import paths

CURVE = "ema_length"


def parse(text: str) -> tuple[float, ...]:
    """The relative widths of "0.02:0.2:10": ten of them from 0.02 to 0.2, at equal ratios.

    Raises:
        UserError: it is not of this form, or no profile can have one of the widths.
    """
    parts = text.split(":")
    try:
        low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
        if len(parts) != 3 or not 0 < low <= high or count < 1:
            raise ValueError("out of range")
        found = tuple(float(f"{width:.4g}") for width in np.geomspace(low, high, count))
        for width in found:
            ema.gamma_from_sigma_rel(width)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"--ema_lengths={text}: expected LOW:HIGH:COUNT, relative widths between 0 and 0.2887, "
            f"such as 0.02:0.2:10 ({error})"
        ) from error
    return found


def check(loaded: Loaded | None) -> tuple[list[ema.Snapshot], paths.Path]:
    """The snapshots of a run, and its workdir.

    Raises:
        UserError: it has none.
    """
    workdir = loaded.workdir if loaded is not None else None
    found = ema.list_snapshots(workdir) if workdir is not None else []
    if loaded is None or workdir is None or not found:
        where = f"{workdir} has none in {ema.snapshot_folder(workdir).name}/" if workdir else "none"
        raise UserError(
            f"--ema_lengths takes the EMA snapshots of a run ({where}): train with "
            "--config.ema.profiles=\"('power-0.05','power-0.1')\" and --config.ema.snapshot_every=N"
        )
    return found, workdir


@dataclasses.dataclass(frozen=True)
class Best:
    """The best length, its estimate, and the command that makes a model with that average."""

    length: float
    metric: str
    estimate: Estimate
    command: str


def search(
    session: Session,
    lengths: tuple[float, ...],
    folder: paths.Path,
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Results, Best]:
    """Evaluate each length by the session's first metric.

    Writes metrics.json and ema_length.png. The evaluation of each length is in lengths/LENGTH,
    where a stopped search continues.

    Args:
        tell: takes a line about each length.

    Raises:
        UserError: the run has no snapshots, or they lack some of its trained networks.
    """
    loaded = session.loaded
    snapshots, workdir = check(loaded)
    assert loaded is not None
    step = _newest(snapshots, session.request.step, workdir)
    found: list[tuple[float, Estimate]] = []
    name = ""
    warnings: tuple[str, ...] = ()
    for length in lengths:
        params = with_averages(loaded.found, workdir, ema.reconstruct(snapshots, length, step))
        about = {"weights": f"power-{length:g}", "step": step}
        results = session.run(folder / "lengths" / f"{length:g}", params=params, about=about)
        name = name or next(iter(results.metrics))
        found.append((length, results.metrics[name]))
        tell(f"width {length:g}: {name} {evaluation_output.number(found[-1][1].value)}")
        warnings = results.warnings
    more = found[0][1].higher_is_better
    length, estimate = (max if more else min)(found, key=lambda pair: pair[1].value)
    best = Best(length, name, estimate, convert_command(workdir, folder, length, step))
    results = Results({name: estimate}, {CURVE: _curve(found, name)}, warnings)
    if jax.process_index() == 0:
        about = session.about() | {"weights": f"power-{length:g}", "step": step}
        about["best_ema_length"] = {
            "length": length, "metric": name, "value": estimate.value, "command": best.command,
        }  # fmt: skip
        evaluation_output.write(folder, about, Inputs(), results)
    return results, best


def convert_command(workdir: paths.Path, folder: paths.Path, length: float, step: int) -> str:
    """The command that writes the model with the average of this length as a diffusers folder."""
    options = (f"--input={workdir}", f"--output={folder / 'diffusers'}")
    return shlex.join(
        ["python", "-m", "sdjax.convert", *options, f"--ema_length={length:g}", f"--step={step}"]
    )


def _newest(snapshots: list[ema.Snapshot], limit: int | None, workdir: paths.Path) -> int:
    """The step of the newest snapshot, or of the last one up to the step `limit`."""
    steps = [s.step for s in snapshots if limit is None or s.step <= limit]
    if not steps:
        raise UserError(
            f"the first EMA snapshot in {workdir} is of step {min(s.step for s in snapshots)}; "
            f"--step={limit} is before it"
        )
    return max(steps)


def _curve(found: list[tuple[float, Estimate]], name: str) -> dict[str, Any]:
    """The metric over the length, as `Results.curves` has it."""
    return {
        "x": [length for length, _ in found],
        "y": [one.value for _, one in found],
        "low": [one.low for _, one in found],
        "high": [one.high for _, one in found],
        "x_label": "relative width of the average",
        "y_label": name,
        "log_x": True,
    }
