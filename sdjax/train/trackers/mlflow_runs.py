"""Runs in MLflow. Where they are kept is its own matter: MLFLOW_TRACKING_URI."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence

import mlflow
import numpy as np
from mlflow.entities import Metric, Param, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from sdjax.train.trackers.tracker import TrackedRun

_BATCH = 100  # parameters of a call, MLflow's limit
_LONGEST = 500  # characters of a parameter's value, that of older servers


def open_tracker(run: TrackedRun, say: Callable[[str], None]) -> MlflowRun:
    """Open the run, the same one again if the workdir has been in it. See `OpenTracker`."""
    client = MlflowClient()
    id = run.id()
    if id is not None:
        try:
            client.update_run(id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            say(f"MLflow: {mlflow.get_tracking_uri()} has no run {id}; this is a new one there")
            id = None
    if id is None:
        experiment = mlflow.set_experiment(run.project).experiment_id
        id = client.create_run(experiment, run_name=run.name).info.run_id
        run.remember(id)
    _log_config(client, id, run.config)
    say(f"MLflow: run {id} at {mlflow.get_tracking_uri()}")
    return MlflowRun(client, id)


def _log_config(client: MlflowClient, id: str, config: Mapping[str, object]) -> None:
    """Log all fields as parameters, and as config.json.

    MLflow refuses to change a parameter: those that the run has already stay.
    """
    had = client.get_run(id).data.params
    fields = {name: value for name, value in _flat(config).items() if name not in had}
    params = [Param(name, value[:_LONGEST]) for name, value in fields.items()]
    for first in range(0, len(params), _BATCH):
        client.log_batch(id, params=params[first : first + _BATCH])
    client.log_dict(id, json.loads(json.dumps(config, default=str)), "config.json")


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return {dotted name: value as text}."""
    found: dict[str, str] = {}
    for name, value in config.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {}
        found |= inner or {f"{prefix}{name}": str(value)}
    return found


def _key(name: str) -> str:
    """Return a name as MLflow allows it: letters, digits, and some signs."""
    return re.sub(r"[^\w\-. :/]", "_", name)


class MlflowRun:
    """See `Tracker`."""

    def __init__(self, client: MlflowClient, id: str):
        self._client, self._id = client, id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        metrics = [Metric(_key(name), float(value), now, step) for name, value in values.items()]
        # In this thread, as the run does not wait for it and errors are seen here.
        self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def images(self, step: int, name: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """See `Tracker`."""
        for i, image in enumerate(images):
            key = f"{_key(name)}_{i + 1}"
            self._client.log_image(self._id, image, key=key, step=step, synchronous=True)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status=RunStatus.to_string(RunStatus.FINISHED))
