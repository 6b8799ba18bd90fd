"""The numbers of a run for Prometheus: over HTTP, and as a file for node_exporter.

The loop tells an `Exporter` what happens, which costs it some additions. A thread of the exporter
keeps the counters in the workdir and only then publishes them: what Prometheus has read never falls
when a run is killed and resumed. Nothing here stops a run: what fails is said once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from sdjax.config import Config, to_dict
from sdjax.errors import UserError
from sdjax.machine_settings import of_model
from sdjax.monitor_config import MonitorConfig
from sdjax.system import paths, text_files
from sdjax.system.source import commit
from sdjax.train.exporting.numbers import Counters, Numbers, counters_from, families
from sdjax.train.exporting.server import MetricsServer

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PUBLISH_SECONDS, REMOTE_SECONDS = 5.0, 60.0  # between two publications; to a bucket
_CLOSE_SECONDS = 10.0
_GAUGES = {
    "train/loss": "sdjax_loss",
    "train/grad_norm": "sdjax_grad_norm",
    "train/learning_rate": "sdjax_learning_rate",
    "train/mfu": "sdjax_mfu_ratio",
}
_VALIDATION = re.compile(r"(validation\w*)/(.+)/loss")


def check(monitor: MonitorConfig) -> None:
    """Raise UserError if numbers are wanted and cannot be had here."""
    if not (monitor.prometheus_port or monitor.textfile):
        return
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise UserError(
            "config.monitor.prometheus_port and config.monitor.textfile take another package: "
            "pip install 'sdjax[prometheus]'"
        ) from error
    if monitor.textfile and not os.path.isdir(os.path.expanduser(monitor.textfile)):
        raise UserError(
            f"config.monitor.textfile is {monitor.textfile!r}, which is no folder; give the one of "
            "node_exporter's --collector.textfile.directory"
        )


def open_exporter(
    config: Config, folder: paths.Path, *, batch_size: int, start: int
) -> Exporter | None:
    """Return the exporter of this process as the configuration has it; None without one.

    Args:
        batch_size: images of a step, over all processes.
        start: optimizer steps done before.
    """
    monitor = config.monitor
    if not (monitor.prometheus_port or monitor.textfile):
        return None
    model = json.dumps(to_dict(of_model(config)), sort_keys=True)
    info = {
        "run": monitor.name or folder.name,
        "config": hashlib.sha256(model.encode()).hexdigest()[:12],
        "git": commit(),
        "sdjax": importlib.metadata.version("sdjax"),
        "family": config.model.family,
        "method": config.method.name,
    }
    several, process = jax.process_count() > 1, jax.process_index()

    def say(text: str) -> None:
        print(f"process {process}: {text}" if several else text, flush=True)

    return Exporter(
        monitor, folder, info, say,
        start=start, planned=config.train.steps, images=batch_size,
        interval=config.train.checkpoint_every,
    )  # fmt: skip


class Exporter:
    """The numbers of this process, and who reads them. Its methods return at once.

    Args:
        folder: the workdir, which keeps the counters of each process.
        info: labels of `sdjax_run_info`, among them `run`, the run's name.
        say: prints a line.
        start: optimizer steps done before; planned: of the whole run.
        images: of a step, over all processes.
        interval: optimizer steps between checkpoints.
    """

    def __init__(
        self,
        monitor: MonitorConfig,
        folder: paths.Path,
        info: Mapping[str, str],
        say: Callable[[str], None],
        *,
        start: int,
        planned: int,
        images: int,
        interval: int,
    ):
        process = jax.process_index()
        self._say, self._images = say, images
        self._every = REMOTE_SECONDS if paths.is_remote(folder) else PUBLISH_SECONDS
        self._file = folder / "prometheus" / f"process_{process}.json"
        self._text = _textfile(monitor, folder, info["run"], process)
        self._numbers = Numbers({**info, "process": str(process)}, first=process == 0)
        self._numbers.counters = self._kept()
        self._numbers.gauges |= {
            "sdjax_step": start,
            "sdjax_planned_steps": planned,
            "sdjax_checkpoint_interval_steps": interval,
        }
        self._published = self._numbers.copy()
        self._waited = self._paused = 0.0
        self._last: float | None = None  # time.monotonic() of the last step
        self._sent = 0.0
        self._saving: tuple[int, float] | None = None  # a step, and time.time() then
        self._slot: queue.Queue[Numbers | None] = queue.Queue(2)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed: set[str] = set()
        self._server: MetricsServer | None = None
        self._thread = threading.Thread(target=self._work, name="exporter", daemon=True)
        self._thread.start()
        if monitor.prometheus_port:
            self._serve(monitor)

    def _kept(self) -> Counters:
        """The counters of this process in the workdir, from 0 where there are none."""
        if not paths.exists(self._file):
            return Counters()
        try:
            return counters_from(text_files.read_json(self._file))
        except text_files.TextError as error:
            self._say(f"warning: {error}; the counters for Prometheus begin at 0")
            return Counters()

    def _serve(self, monitor: MonitorConfig) -> None:
        host, port = monitor.prometheus_host, monitor.prometheus_port
        try:
            self._server = MetricsServer(host, port, self.collect)
        except OSError as error:
            self._say(
                f"warning: no numbers for Prometheus: {host}:{port} cannot be listened at: "
                f"{error.strerror or error}; the run goes on without"
            )
            return
        taken = "" if self._server.port == port else f" (port {port} is taken)"
        self._say(f"numbers for Prometheus at http://{host}:{self._server.port}/metrics{taken}")

    def collect(self) -> Iterator[Metric]:
        """Yield what was published last; called by other threads, waits for nothing."""
        return families(self._published)

    # ---- what happens ------------------------------------------------------------------------

    def dispatched(self, waited: float) -> None:
        """A step was dispatched; `waited`: seconds so far in which devices waited for data."""
        now = time.monotonic()
        if self._last is not None:
            self._numbers.counters.took(max(now - self._last - self._paused, 0.0))
        self._last, self._paused = now, 0.0
        self._numbers.counters.data_wait += waited - self._waited
        self._waited = waited

    def paused(self, seconds: float) -> None:
        """So long something else than training was done."""
        self._paused += seconds

    def done(self, step: int, finite: bool = True) -> None:
        """A step is complete on the devices; not `finite`: it changed nothing."""
        counters = self._numbers.counters
        counters.steps += 1
        counters.images += self._images
        counters.skipped += not finite
        self._numbers.gauges["sdjax_step"] = step
        self._numbers.gauges["sdjax_last_step_timestamp_seconds"] = time.time()
        if time.monotonic() - self._sent > self._every:
            self.publish()

    def saving(self, step: int, began: float) -> None:
        """The save of a checkpoint began at that Unix time; the one before is complete."""
        self.saved()
        self._saving = step, began

    def saved(self) -> None:
        """No save is under way."""
        if self._saving is None:
            return
        counters, now = self._numbers.counters, time.time()
        (counters.last_saved, began), self._saving = self._saving, None
        counters.saves += 1
        counters.save_seconds += max(now - began, 0.0)
        counters.last_save = now
        self.publish()

    def scalars(self, values: Mapping[str, float]) -> None:
        """Numbers of the log have come, by their names there."""
        for name, value in values.items():
            if name in _GAUGES:
                self._numbers.gauges[_GAUGES[name]] = value
            elif found := _VALIDATION.fullmatch(name):
                self._numbers.validation[found[1], found[2]] = value
        for device in jax.local_devices():
            stats = device.memory_stats() or {}
            if "bytes_in_use" in stats:
                memory = stats["bytes_in_use"], stats.get("bytes_limit")
                self._numbers.memory[str(device.id)] = memory

    # ---- publishing --------------------------------------------------------------------------

    def publish(self) -> None:
        """Hand the numbers to the thread, unless it still writes earlier ones."""
        while not self._news.empty():
            self._say(self._news.get())
        self._sent = time.monotonic()
        with contextlib.suppress(queue.Full):
            self._slot.put_nowait(self._numbers.copy())

    def close(self) -> None:
        """Publish what there is, free the port, end the thread."""
        with contextlib.suppress(queue.Full):
            self._slot.put(self._numbers.copy(), timeout=_CLOSE_SECONDS)
            self._slot.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)
        while not self._news.empty():
            self._say(self._news.get())
        if self._server is not None:
            self._server.close()

    def _work(self) -> None:
        while (numbers := self._slot.get()) is not None:
            self._trying(functools.partial(self._keep, numbers.counters))
            self._published = numbers
            if self._text is not None:
                self._trying(functools.partial(write_textfile, self._text, numbers))

    def _keep(self, counters: Counters) -> None:
        paths.make_folder(self._file.parent)
        paths.write_text(self._file, json.dumps(dataclasses.asdict(counters)) + "\n")

    def _trying(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            said = f"warning: numbers for Prometheus: {error}"
            if said not in self._failed and len(self._failed) < 8:
                self._failed.add(said)
                self._news.put(said)


def _textfile(monitor: MonitorConfig, folder: paths.Path, run: str, process: int) -> Path | None:
    """Return the file for node_exporter; runs of one name in other workdirs have others."""
    if not monitor.textfile:
        return None
    digest = hashlib.sha256(str(paths.absolute(folder)).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", run)
    return Path(monitor.textfile).expanduser() / f"sdjax_{name}_{digest}_{process}.prom"


def write_textfile(file: Path, numbers: Numbers) -> None:
    """Write numbers in Prometheus' text format, whole or not at all, readable for every user."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry: Any = CollectorRegistry()
    registry.collect = lambda: families(numbers)
    # node_exporter reads *.prom alone, as another user.
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(generate_latest(registry))
    partial.chmod(0o644)
    os.replace(partial, file)
