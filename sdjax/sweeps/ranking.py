"""The outcome of a sweep: the ranking, which fields mattered, sweep.json and best.py."""

from __future__ import annotations

import json
import math
import shlex
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table

from sdjax.config import Config, to_dict
from sdjax.recipes import recipe
from sdjax.sweeps import folds
from sdjax.sweeps.runs import best
from sdjax.sweeps.space import changed
from sdjax.sweeps.study import Sweep
from sdjax.system import paths

RESULT, BEST = "sweep.json", "best.py"
METHOD = "PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), as optuna.importance has it"
_TOP = 5  # trials that PED-ANOVA takes for good ones, at least


def ranking(sweep: Sweep, study: optuna.Study) -> list[FrozenTrial]:
    """Rank what is finished: complete by value, then pruned by how far it came, then failed."""
    sign = 1 if sweep.mode == "min" else -1
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]

    def key(trial: FrozenTrial) -> tuple:
        reached = max(trial.intermediate_values, default=-1)
        found = best(trial.intermediate_values, sweep.mode)
        came = 0 if trial.state == TrialState.COMPLETE else -reached
        return order.index(trial.state), came, sign * found[1] if found else math.inf, trial.number

    return sorted((t for t in study.get_trials(deepcopy=False) if t.state.is_finished()), key=key)


def importances(study: optuna.Study) -> dict[str, float]:
    """{field: share of what made trials good, summing to 1}; {} if too few trials tell it.

    A trial is good if it is among the best tenth, or the best five (at most half of all).
    """
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    values = {t.value for t in complete}
    if len(complete) < 4 or len(values) < 2 or not complete[0].params:
        return {}
    quantile = min(0.5, max(0.1, _TOP / len(complete)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, which the docs say
        found = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=quantile)
        )
    return {name: float(share) for name, share in found.items()}


def best_config(sweep: Sweep, study: optuna.Study) -> Config | None:
    """Return the configuration of the best trial, None if none is complete.

    With folds it is that of the best setting, for a run on the whole training split.
    """
    if sweep.folds:
        best_setting = next(iter(folds.settings(sweep, study)), None)
        if best_setting is None or not best_setting.is_complete:
            return None
        return changed(sweep.base, best_setting.fields)
    first = next(iter(ranking(sweep, study)), None)
    if first is None or first.state != TrialState.COMPLETE:
        return None
    return changed(sweep.base, sweep.space.values(first.params))


def write(sweep: Sweep, study: optuna.Study) -> None:
    """Write sweep.json, and best.py once a trial is complete; each whole or not at all.

    With folds, best.py waits for all of a setting.
    """
    ranked = ranking(sweep, study)
    rows = {trial.number: _row(sweep, trial) for trial in study.get_trials(deepcopy=False)}
    content = {
        "metric": sweep.metric,
        "mode": sweep.mode,
        "space": sweep.space.to_dict(),
        "ranking": [trial.number for trial in ranked],
        "trials": [*rows.values()],
        "importances": importances(study),
        "importances_by": METHOD,
        "config": to_dict(sweep.base),
    }
    if sweep.folds:
        content["folds"] = sweep.folds
        content["settings"] = [one.to_dict() for one in folds.settings(sweep, study)]
    config = best_config(sweep, study)
    if config is not None:
        if sweep.folds:
            row = content["best"] = content["settings"][0]
            about = (
                f"Setting {row['number']}, the best of {len(content['settings'])} of the sweep in "
                f"{sweep.folder}.\n\n{sweep.metric} {row['mean']:.6g}, the mean of {sweep.folds} "
                f"folds with a standard deviation of {row['deviation']:.3g}."
            )
        else:
            row = content["best"] = rows[ranked[0].number]
            about = (
                f"Trial {row['number']}, the best of {len(ranked)} of the sweep in {sweep.folder}."
                f"\n\n{sweep.metric} {row['value']:.6g} at step {row['step']}."
            )
        recipe_flag = shlex.quote(f"--config={sweep.folder / BEST}")
        about += f"\n\n    python -m sdjax.main {recipe_flag} --workdir=DIR\n"
        paths.write_text(sweep.folder / BEST, recipe(to_dict(config), about))
    paths.write_text(sweep.folder / RESULT, json.dumps(content, indent=2) + "\n")


def _row(sweep: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    curve = sorted(trial.intermediate_values.items())
    step, value = best(trial.intermediate_values, sweep.mode) or (None, None)
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": value,
        "step": step,
        "fields": sweep.values(trial),
        "reason": trial.user_attrs.get("reason", ""),
        "seconds": trial.user_attrs.get("seconds"),
        "workdir": str(sweep.trial_folder(trial.number)),
        # JSON has neither NaN nor Inf.
        "curve": [[at, now if math.isfinite(now) else None] for at, now in curve],
    }


def table(sweep: Sweep, study: optuna.Study) -> Table:
    """Return the ranking as a table, the best first; with folds, that of the settings."""
    if sweep.folds:
        return folds.table(sweep, study)
    title = f"{sweep.folder}: {sweep.metric}, {sweep.mode}imum first"
    shown = Table(title=escape(title))  # "[v2]" in a name would be taken for a style
    for name in ("trial", "state", "value", "at step", *sweep.space.fields):
        shown.add_column(name, justify="right", overflow="fold")
    for trial in ranking(sweep, study):
        row = _row(sweep, trial)
        reason = "".join(filter(str.isprintable, row["reason"].split("\n")[0]))[:40]
        shown.add_row(
            str(trial.number),
            escape(reason) or row["state"],
            "" if row["value"] is None else f"{row['value']:.5g}",
            "" if row["step"] is None else str(row["step"]),
            *(_text(row["fields"][name]) for name in sweep.space.fields),
        )
    return shown


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def importance_table(found: Mapping[str, float]) -> Table:
    """Return the fields as a table, by how much they mattered."""
    shown = Table(title="which fields mattered (PED-ANOVA; few trials tell little)")
    shown.add_column("field")
    shown.add_column("share", justify="right")
    for name, share in found.items():
        shown.add_row(name, f"{share:.2f}")
    return shown
