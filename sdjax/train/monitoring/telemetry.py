"""Telemetry of a run: metrics on the device, their fetching, speed, progress, logs.

Steps in here count optimizer steps done: after the first, `step` is 1.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdjax.errors import UserError
from sdjax.parallel.chips import peak_flops
from sdjax.system.progress import duration
from sdjax.train.exporting.exporter import Exporter
from sdjax.train.monitoring import metrics_log
from sdjax.train.monitoring.speed import Throughput, device_memory
from sdjax.train.trackers.tracker import TrackerThread, close_all

# ---- on the device, jittable -----------------------------------------------------------------


def squares(tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the sum of the squares of each array, float32."""
    return {path: jnp.sum(jnp.square(leaf.astype(jnp.float32))) for path, leaf in tree.items()}


def total_norm(squares: Mapping[str, jax.Array]) -> jax.Array:
    """Return the L2 norm of all arrays from the `squares` of each."""
    return jnp.sqrt(jnp.sum(jnp.stack(list(squares.values()))))


def group_norms(squares: Mapping[str, jax.Array], depth: int = 2) -> dict[str, jax.Array]:
    """Return the L2 norm, float32, of each module group from the `squares` of its arrays.

    A group is the first `depth` names of the path, and the index if one follows:
    `unet.down_blocks.0`, `unet.conv_in`, `text_encoder.encoder`.
    """
    parts: dict[str, list[jax.Array]] = collections.defaultdict(list)
    for path, square in squares.items():
        parts[_group(path, depth)].append(square)
    return {group: jnp.sqrt(sum(own)) for group, own in sorted(parts.items())}


def _group(path: str, depth: int) -> str:
    names = path.split(".")[:-1] or [path]  # the last names the array, not a module
    index = depth < len(names) and names[depth].isdigit()
    return ".".join(names[: depth + index])


def bucket_means(
    values: jax.Array, timesteps: jax.Array, n_buckets: int, num_timesteps: int
) -> dict[str, jax.Array]:
    """Sums [n] and counts [n] of values [b] over n equal ranges of timesteps [b] in [0, T].

    Sums and counts, not means: they add up over micro-batches and steps. See `bucket_scalars`.
    """
    index = jnp.clip((timesteps * n_buckets / num_timesteps).astype(jnp.int32), 0, n_buckets - 1)
    inside = index[:, None] == jnp.arange(n_buckets)  # [b, n]
    sums = jnp.where(inside, values[:, None].astype(jnp.float32), 0.0).sum(0)
    return {"sum": sums, "count": inside.sum(0, dtype=jnp.float32)}


# ---- on the host -----------------------------------------------------------------------------


def bucket_scalars(buckets: Mapping[str, Any], num_timesteps: int) -> dict[str, float]:
    """`bucket_means` as `{"t0000-0249": mean}`; empty buckets are left out."""
    sums, counts = np.asarray(buckets["sum"]), np.asarray(buckets["count"])
    edges = [num_timesteps * i // len(sums) for i in range(len(sums) + 1)]
    return {
        f"t{edges[i]:04d}-{edges[i + 1] - 1:04d}": float(sums[i] / counts[i])
        for i in range(len(sums))
        if counts[i] > 0
    }


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one, names joined by "/"."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        name = f"{prefix}/{name}" if prefix else str(name)
        flat.update(flatten(value, name) if isinstance(value, Mapping) else {name: value})
    return flat


class DelayedMetrics:
    """Fetches the metrics of a step when `delay` later ones have been dispatched.

    The device then always has work queued, and the host never waits for the newest step.
    """

    def __init__(self, delay: int = 2):
        if delay < 0:
            raise ValueError(f"delay={delay}: expected 0 or more")
        self._delay = delay
        self._queue: collections.deque[tuple[int, Any]] = collections.deque()

    def push(self, step: int, metrics: Any) -> list[tuple[int, Any]]:
        """Take the metrics of the step just dispatched; return those of earlier ones, on the host.

        Returns:
          [(step, the same tree with numpy leaves)], oldest first; mostly one.
        """
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._queue.append((step, metrics))
        return self._take(self._delay)

    def flush(self) -> list[tuple[int, Any]]:
        """All that is left, waiting for it: before a checkpoint, a pause and the end."""
        return self._take(0)

    def _take(self, leave: int) -> list[tuple[int, Any]]:
        taken = []
        while len(self._queue) > leave:
            step, metrics = self._queue.popleft()
            taken.append((step, jax.tree.map(np.asarray, metrics)))
        return taken


class Telemetry:
    """Writes metrics, shows progress, measures speed. Only process 0 writes and prints.

    Args:
      workdir: gets `metrics.jsonl` and `tensorboard/`.
      total_steps: of the whole run.
      batch_size: images of one optimizer step, over all devices.
      start_step: steps done before, when resuming; later lines of `metrics.jsonl` are dropped.
      flops_per_image: of one training step; None = no MFU.
      terminal: draw a progress bar; by default, if stdout is a terminal.
      images_seen: by steps done; by default `batch_size` a step.
      trackers: get scalars, images and the end, on process 0.
      exporter: gets every process's numbers.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        flops_per_image: float | None = None,
        terminal: bool | None = None,
        images_seen: Callable[[int], int] | None = None,
        trackers: Sequence[TrackerThread] = (),
        exporter: Exporter | None = None,
    ):
        self._trackers, self._exporter = list(trackers), exporter
        self.total_steps, self.batch_size = total_steps, batch_size
        self.flops_per_image = flops_per_image
        self._images_seen = images_seen or (lambda step: step * batch_size)
        self.throughput = Throughput(batch_size)
        self._speed: float | None = None
        self._writer: metrics_log.MetricsLog | None = None
        self._progress: Progress | None = None
        if jax.process_index() != 0:
            return
        self._workdir = workdir
        with self._written():
            self._writer = metrics_log.MetricsLog(workdir, start_step=start_step)
        if sys.stdout.isatty() if terminal is None else terminal:
            self._progress = _progress_bar()
            self._progress.start()
            self._task = self._progress.add_task(
                "training", total=total_steps, completed=start_step, note=""
            )

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if exc_type is None:
                raise
            print(error, flush=True)  # the error under way matters more

    def dispatched(self, waited: float) -> None:
        """A step was dispatched; `waited`: seconds so far in which devices waited for data."""
        if self._exporter is not None:
            self._exporter.dispatched(waited)

    def saving(self, step: int, began: float) -> None:
        """The save of a checkpoint began at that Unix time; the one before is complete."""
        if self._exporter is not None:
            self._exporter.saving(step, began)

    def saved(self) -> None:
        """No save is under way."""
        if self._exporter is not None:
            self._exporter.saved()

    def done(self, step: int, finite: bool = True) -> None:
        """`step` is complete (its metrics have arrived): moves the bar and the clock."""
        self.throughput.done(step)
        if self._exporter is not None:
            self._exporter.done(step, finite)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the training metrics of a step, with speed, images seen and memory, and show them.

        Args:
          step: steps done.
          metrics: nested dict of scalars; written as `train/NAME`. `loss` and `learning_rate` are
            shown.
        """
        speed = self.throughput.measure()
        self._speed = self._speed if speed is None else speed
        scalars = dict(metrics) | {"images_seen": self._images_seen(step)}
        if speed is not None:
            scalars["images_per_second"] = speed
            mfu = self._mfu(speed)
            if mfu is not None:
                scalars["mfu"] = mfu
        self.scalars(step, {"train": scalars, "device": device_memory()})
        self._show(step, metrics)

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a nested dict of scalars, names joined by "/"."""
        flat = {name: np.asarray(value).item() for name, value in flatten(metrics).items()}
        if self._exporter is not None:
            self._exporter.scalars(flat)
        for tracker in self._trackers if flat else ():
            tracker.call("scalars", step, flat)
        if self._writer is not None and flat:
            with self._written():
                self._writer.scalars(step, flat)

    def images(
        self, step: int, name: str, images: np.ndarray, captions: Sequence[str] = ()
    ) -> None:
        """Write images [N, H, W, C], uint8 or float in [0, 1], with their captions as text."""
        if self._writer is None:
            return
        for tracker in self._trackers:
            tracker.call("images", step, name, _bytes(images), captions)
        lines = [f"{i + 1}. {caption}" for i, caption in enumerate(captions)]
        with self._written():
            self._writer.event("write_images", step, {name: np.asarray(images)})
            if lines:
                self._writer.event("write_texts", step, {f"{name}/captions": "\n".join(lines)})

    def hparams(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, once a run: as hyper-parameters and as text."""
        if self._writer is None:
            return
        flat = {n.replace("/", "."): v for n, v in flatten(config).items()}
        plain = {
            n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in flat.items()
        }
        text = json.dumps(config, indent=2, default=str).replace("\n", "\n    ")
        with self._written():
            self._writer.event("write_hparams", plain)
            self._writer.event("write_texts", 0, {"config": "    " + text})

    def message(self, text: str) -> None:
        """Print a line; above the bar where there is one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif jax.process_index() == 0:
            print(text, flush=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For checkpoints, sampling, validation: not counted as training time.

        Fetch all metrics that are under way first (`DelayedMetrics.flush`), or the device finishes
        its last steps in here, for free.
        """
        began = time.monotonic()
        try:
            with self.throughput.pause():
                yield
        finally:
            if self._exporter is not None:
                self._exporter.paused(time.monotonic() - began)

    def flush(self) -> None:
        """Everything written so far is on disk."""
        if self._writer is not None:
            with self._written():
                self._writer.flush()

    def close(self) -> None:
        """Flush and end; further calls do nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._close_outlets()
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._written():
                writer.close()

    def _close_outlets(self) -> None:
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.close()
        trackers, self._trackers = self._trackers, []
        close_all(trackers)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"metrics cannot be written to {self._workdir}: {error}\n"
                "Is the disk full or read-only? Make room and run the same command again."
            ) from error

    def _mfu(self, images_per_second: float) -> float | None:
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is None or self.flops_per_image is None:
            return None
        return images_per_second * self.flops_per_image / (peak * jax.device_count())

    def _show(self, step: int, metrics: Mapping[str, Any]) -> None:
        parts = [f"loss {float(metrics['loss']):.4f}"] if "loss" in metrics else []
        if self._speed is not None:
            parts.append(f"{self._speed:.1f} images/s")
        if "learning_rate" in metrics:
            parts.append(f"lr {float(metrics['learning_rate']):.2e}")
        if self._progress is not None:
            self._progress.update(self._task, note="  ".join(parts))
            return
        if self._speed is not None:
            left = (self.total_steps - step) * self.batch_size / self._speed
            parts.append(f"{duration(left)} left")
        self.message(f"step {step}/{self.total_steps}  " + "  ".join(parts))


def _bytes(images: np.ndarray) -> np.ndarray:
    """Return images as uint8, from uint8 or floats in [0, 1]."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(),
    )
