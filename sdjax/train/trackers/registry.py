"""The trackers that there are, and which of them a run has."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import jax

from sdjax.config import Config, to_dict
from sdjax.errors import UserError
from sdjax.monitor_config import MonitorConfig
from sdjax.system import paths
from sdjax.train.trackers.tracker import TrackedRun, Tracker, TrackerThread

# {name, also of the package and of the extra: module with `open_tracker`, an OpenTracker}
MODULES = {
    "wandb": "sdjax.train.trackers.wandb_runs",
    "mlflow": "sdjax.train.trackers.mlflow_runs",
    "trackio": "sdjax.train.trackers.trackio_runs",
}


def check(monitor: MonitorConfig) -> None:
    """Raise UserError, before anything is compiled, if a tracker is not installed here."""
    for name in monitor.trackers if jax.process_index() == 0 else ():
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"config.monitor.trackers has {name!r}, whose package is not installed: "
                f"pip install 'sdjax[{name}]'"
            )


def open_trackers(config: Config, folder: paths.Path) -> list[TrackerThread]:
    """Return the trackers of a run on process 0, each in a thread that opens it; [] elsewhere."""
    if jax.process_index() != 0:
        return []
    monitor, fields = config.monitor, to_dict(config)
    say = functools.partial(print, flush=True)
    return [
        TrackerThread(
            TrackedRun(name, folder, monitor.project, monitor.name or folder.name, fields),
            functools.partial(_open, name),
            say,
        )
        for name in monitor.trackers
    ]


def _open(name: str, run: TrackedRun, say: Callable[[str], None]) -> Tracker:
    """Open a tracker; its package takes seconds to import, which the thread waits for."""
    return importlib.import_module(MODULES[name]).open_tracker(run, say)
