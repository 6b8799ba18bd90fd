"""Experts by noise level: which model an option names, and for which levels.

A noise level is t / T, 1 for noise and 0 for a picture.
"""

from __future__ import annotations

import math

from sdjax.checkpoints.checkpoint import latest_step
from sdjax.checkpoints.workdir import read_run_config
from sdjax.errors import UserError
from sdjax.formats.folders import folder_kind
from sdjax.system import paths
from sdjax.system.untrusted import is_number


def read_expert_option(text: str) -> tuple[str, tuple[float, float]]:
    """Return the place and the noise levels of "DIR[:FROM:TO]".

    A path that exists is a place as it stands; its levels are then those of its run.

    Raises:
        UserError: the levels are no interval within 0 and 1, or nothing says them.
        ModelError: a workdir's configuration cannot be read.
    """
    option = f"--expert={text}"
    if not paths.exists(paths.to_path(text)) and text.count(":") >= 2:
        place, *words = text.rsplit(":", 2)
        low, high = (_number(word) for word in words)
        if not 0.0 <= low < high <= 1.0:
            raise UserError(f"{option} ends in no interval; expected DIR:FROM:TO, as DIR:0:0.5")
        return place, (low, high)
    levels = trained_levels(text)
    if levels is None:
        raise UserError(
            f"{option} is no workdir, and does not say for which noise levels it is; give them, as "
            f"--expert={text}:0:0.5"
        )
    if levels == (0.0, 1.0):
        raise UserError(
            f"{option} was trained at all noise levels; give those that it is to draw at, as "
            f"--expert={text}:0:0.5"
        )
    return text, levels


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def trained_levels(path: paths.PathLike) -> tuple[float, float] | None:
    """Return the noise levels that a run trained at, from the least; None if it is no workdir.

    They follow from objective.timestep_min and timestep_max, as they were at the checkpoint.

    Raises:
        ModelError: the workdir's configuration cannot be read.
    """
    path, step = paths.to_path(path), None
    if folder_kind(path) != "workdir":
        return None
    if path.parent.name == "checkpoints" and is_number(path.name):
        path, step = path.parents[1], int(path.name)
    config = read_run_config(path)
    step = latest_step(path) if step is None else step
    config = config.at_step(max((step or 0) - 1, 0))  # a stage that begins there has not trained
    total, objective = config.schedule.num_train_timesteps, config.objective
    return objective.timestep_min / total, (objective.timestep_max or total) / total
