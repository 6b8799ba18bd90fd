"""Models that are averages: of checkpoints, of runs, or an EMA of another length than was tracked.

Uniform and weighted means of weights are model soups (Wortsman et al. 2022, arXiv 2203.05482): good
where the models began from the same weights and lie in one basin, such as checkpoints of one run or
runs that were fine-tuned from one model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sdjax.checkpoints import saved_state
from sdjax.checkpoints.checkpoint import all_steps, checkpoint_folder, latest_step
from sdjax.config_changes import MISSING, compare_configs
from sdjax.families.embeddings import tables_with
from sdjax.families.family import Model
from sdjax.families.registry import NETWORKS, TOKENIZERS
from sdjax.formats.folders import ModelError
from sdjax.models.adapters.networks import MARK
from sdjax.optim import ema
from sdjax.system import paths
from sdjax.system.untrusted import is_number, listed

_LAST = re.compile(r"last:(\d+)")


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the models of an average: a folder or file, and which checkpoint of a workdir."""

    path: paths.Path
    step: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.step is None else f"step {self.step} of {self.path}"


def members(source: paths.PathLike | None, names: Sequence[str]) -> list[Member]:
    """Return the members that `--average` names: steps of `source`, `last:N`, folders and files.

    Raises:
        ModelError: they are of both kinds, too few, twice the same, or not there.
    """
    steps = [name for name in names if is_number(name) or _LAST.fullmatch(name)]
    if not steps:
        if source is not None:
            raise ModelError(
                f"--average={' '.join(names)} names the models to average: leave out "
                f"--input={source}, and name it among them if it is one"
            )
        found = [Member(paths.to_path(name)) for name in names]
    else:
        if len(steps) < len(names):
            other = next(name for name in names if name not in steps)
            raise ModelError(
                f"--average={' '.join(names)}: {steps[0]} is a step and {other} is none; give "
                "steps (or last:N) of --input, or folders (./100 is a folder)"
            )
        if source is None:
            raise ModelError(f"--average={' '.join(names)} takes the run as --input=WORKDIR")
        found = [Member(paths.to_path(source), s) for s in _steps(paths.to_path(source), names)]
    if len(set(found)) < len(found):
        raise ModelError(f"--average={' '.join(names)} names a model twice; use weights")
    if len(found) < 2:
        raise ModelError(f"--average={' '.join(names)}: expected two models or more")
    return found


def _steps(workdir: paths.Path, names: Sequence[str]) -> list[int]:
    """Steps of checkpoints, as named."""
    there = all_steps(workdir)
    wanted: list[int] = []
    for name in names:
        last = _LAST.fullmatch(name)
        if last and not 1 < int(last[1]) <= len(there):
            raise ModelError(
                f"--average={name}: {workdir} has {len(there)} checkpoints, of steps "
                f"{_listed(there)}; expected last:N with N from 2 to their number. A run keeps "
                "more of them with train.keep_last and train.keep_every"
            )
        wanted += there[-int(last[1]) :] if last else [int(name)]
    if absent := [step for step in wanted if step not in there]:
        raise ModelError(
            f"--average: {workdir} has no checkpoint of step {absent[0]}; it has those of steps "
            f"{_listed(there)}"
        )
    return wanted


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "(none)"


def shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Weights of `count` models, summing to 1; equal ones by default.

    Raises:
        ModelError: there are not as many, one is not finite, or they add up to nothing.
    """
    if weights is None:
        return [1 / count] * count
    text = f"--average_weights={' '.join(f'{w:g}' for w in weights)}"
    if len(weights) != count:
        raise ModelError(f"{text}: {len(weights)} weights for {count} models; give one each")
    total = math.fsum(weights)
    if not all(math.isfinite(w) for w in weights) or not total > 0:
        raise ModelError(f"{text}: expected finite numbers with a sum above 0")
    return [w / total for w in weights]


def average(
    found: Sequence[Member],
    read: Callable[[Member], Model],
    weights: Sequence[float] | None = None,
) -> Model:
    """The weighted mean of models, summed in float64; all else is that of the first.

    Two models are in memory at once, and the sum, which takes twice the space of one.

    Args:
        read: gives a member, float32.
        weights: one each, of any sum above 0; equal by default.

    Raises:
        ModelError: configs, tokenizers, paths or shapes differ, naming what.
    """
    parts = shares(len(found), weights)
    first = read(found[0])
    total = {path: parts[0] * leaf.astype(np.float64) for path, leaf in first.params.items()}
    for member, share in zip(found[1:], parts[1:], strict=True):
        model = read(member)
        if problems := differences(first, model):
            raise ModelError(
                f"{found[0]} and {member} are different models and have no average:\n  "
                + listed(problems)
            )
        for path, leaf in model.params.items():
            total[path] += share * leaf.astype(np.float64)
    params = {path: leaf.astype(np.float32) for path, leaf in total.items()}
    return dataclasses.replace(first, params=params)


def differences(a: Model, b: Model) -> list[str]:
    """Return the reasons not to average two models, as lines: at most ten, and a count."""
    lines = []
    pairs = {name: (a.networks.get(name), b.networks.get(name)) for name in NETWORKS}
    for field, (one, other) in {**pairs, "schedule": (a.schedule, b.schedule)}.items():
        if one is None or other is None:
            if (one is None) != (other is None):
                lines.append(f"{field}: only one of them has it")
            continue
        found = compare_configs(dataclasses.asdict(one), dataclasses.asdict(other))
        lines += [f"{field}.{d.field}: {_value(d.saved)} and {_value(d.current)}" for d in found]
    if a.prediction_type != b.prediction_type:
        lines.append(f"prediction_type: {a.prediction_type} and {b.prediction_type}")
    for field in sorted(a.settings.keys() & b.settings.keys()):
        if a.settings[field] != b.settings[field]:
            lines.append(f"{field}: {a.settings[field]} and {b.settings[field]}")
    for field in sorted(a.tokenizers.keys() & b.tokenizers.keys()):
        one, other = a.tokenizers[field], b.tokenizers[field]
        if one.identity != other.identity:
            lines.append(
                f"{TOKENIZERS[field]}: another vocabulary or length "
                f"({_tokens(one)}, {_tokens(other)})"
            )
    for path in sorted(a.params.keys() | b.params.keys()):
        if path not in a.params or path not in b.params:
            lines.append(f"{path}: only one of them has it")
        elif a.params[path].shape != b.params[path].shape:
            lines.append(f"{path}: shapes {a.params[path].shape} and {b.params[path].shape}")
    return lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])


def _value(value: object) -> str:
    return "not there" if value == MISSING else repr(value)


def _tokens(tokenizer: object) -> str:
    return f"{getattr(tokenizer, 'vocab_size', '?')} tokens"


def with_ema_length(
    model: Model, workdir: paths.PathLike, length: float, step: int | None = None
) -> tuple[Model, int]:
    """A run's model with its average of relative width `length`, made of its EMA snapshots.

    Args:
        model: of any checkpoint of the run; what was not trained is taken from it.
        length: see `ema.reconstruct`.
        step: of the average; a snapshot's, by default the newest.

    Returns:
        The model, and the step of its average.

    Raises:
        UserError: the run has no snapshots, none up to `step`, or its files are damaged.
    """
    try:
        ema.gamma_from_sigma_rel(length)
    except ValueError as error:
        raise ModelError(f"--ema_length={length:g}: {error}") from error
    snapshots = ema.list_snapshots(workdir)
    if not snapshots:
        raise ModelError(
            f"--ema_length={length:g} takes the EMA snapshots of a run, and {workdir} has none in "
            f"{ema.snapshot_folder(workdir).name}/: train with "
            "--config.ema.profiles=\"('power-0.05','power-0.1')\" and --config.ema.snapshot_every=N"
        )
    at = max(s.step for s in snapshots) if step is None else step
    params = with_averages(model, workdir, ema.reconstruct(snapshots, length, step))
    return dataclasses.replace(model, params=params), at


def with_averages(
    model: Model, workdir: paths.PathLike, averages: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A run's parameters with the averages of its snapshots in place of all that it trained.

    Raises:
        ModelError: the snapshots are of another model, of adapters, or of a part of what was
            trained.
    """
    if any(MARK in path for path in averages):
        raise ModelError(
            f"{ema.snapshot_folder(workdir)}: the run trained adapters, and averages of other "
            "lengths are made of whole networks; take one that it tracked (ema.profiles)"
        )
    whole = tables_with(model.params, averages)
    strange = [
        path
        for path, leaf in whole.items()
        if path not in model.params or leaf.shape != model.params[path].shape
    ]
    if strange:
        raise ModelError(
            f"{ema.snapshot_folder(workdir)}: the snapshots are of another model than the "
            f"checkpoint, which has no {strange[0]} of that shape; were they copied here?"
        )
    trained = saved_state.trained(checkpoint_folder(workdir) / str(latest_step(workdir)))
    if missing := sorted(trained - set(averages)):
        raise ModelError(
            f"{ema.snapshot_folder(workdir)}: the snapshots lack {len(missing)} of the "
            f"{len(trained)} parameters that the run trains, as {missing[0]}, and a mixture is no "
            "model; restore them from a copy, or convert the checkpoint itself"
        )
    return {**model.params, **whole}
