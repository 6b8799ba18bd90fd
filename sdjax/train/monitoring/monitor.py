"""The means between two lines of the log, and the batch that is kept when a run goes wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sdjax.config import Config
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.system import paths
from sdjax.train.monitoring.health import Diverged, NonFiniteCounter, SpikeDetector
from sdjax.train.monitoring.telemetry import DelayedMetrics, Telemetry, bucket_scalars
from sdjax.train.rollback import Spike

# What the log has of the newest step alone: a number for each module group.
_OF_LAST_STEP = ("grad_norms", "param_norms", "update_ratios")


class Monitor:
    """Observers at the metrics of every step as they arrive from the device, two steps late.

    It logs their means, tells of spikes, and stops a run whose steps are no longer finite.

    Args:
        tokenizers: of which the first counts the captions that were too long, for the log.
        learning_rate: of an optimizer step, counted from 0.
        examples_per_epoch: of the training data.
        rollbacks: done so far; while there are fewer than the configuration allows, a spike is
            raised as `Spike`.
        first: steps done when the stream of data began.
    """

    def __init__(
        self,
        config: Config,
        telemetry: Telemetry,
        folder: paths.Path,
        tokenizers: Mapping[str, TextTokenizer],
        learning_rate: Callable[[int], Any],
        examples_per_epoch: int,
        rollbacks: int = 0,
        first: int = 0,
    ):
        self._train, self._batch_size = config.train, config.data.batch_size
        self._telemetry, self._folder = telemetry, folder
        self._tokenizer = next(iter(tokenizers.values()), None)
        self._first = first
        self._learning_rate, self._examples_per_epoch = learning_rate, examples_per_epoch
        self._rollbacks, self._rollbacks_left = rollbacks, config.train.rollbacks - rollbacks
        self._spikes = {
            "gradient norm": SpikeDetector(config.train.spike_factor),
            "loss": SpikeDetector(config.train.spike_factor),
        }
        self._nonfinite = NonFiniteCounter(config.train.max_nonfinite)
        self._interval = Interval(config.schedule.num_train_timesteps)
        self._queue = DelayedMetrics()
        self._batches: dict[int, Mapping[str, jax.Array]] = {}  # of the steps in the queue
        self._newest: Any = None  # an output of the step that was dispatched last

    def get_state(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint."""
        return {"spikes": {what: found.get_state() for what, found in self._spikes.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Judge as the run that was saved would have."""
        for what, detector in self._spikes.items():
            if what in state["spikes"]:  # not in the checkpoints of the time before there were two
                detector.set_state(state["spikes"][what])

    def resume(self, health: Mapping[str, jax.Array]) -> None:
        """Count skipped steps on from those of the state."""
        self._nonfinite = NonFiniteCounter(
            self._train.max_nonfinite,
            in_a_row=int(health["in_a_row"]),
            total=int(health["skipped"]),
        )

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Time in here is spent waiting for data, unless a step still runs when the data is there:
        then it has cost nothing."""
        return self._interval.waiting(self._is_busy)

    def _is_busy(self) -> bool:
        return self._newest is not None and not self._newest.is_ready()

    def push(self, done: int, batch: Mapping[str, jax.Array], metrics: Any) -> None:
        """Step `done` was dispatched. Observers at earlier ones; raises Diverged and Spike."""
        self._batches[done] = batch
        self._newest = metrics["finite"]
        self._telemetry.dispatched(self._interval.waited)
        if not self._logs(done):  # most numbers of a step then need not come from the device
            metrics = {name: v for name, v in metrics.items() if name not in _OF_LAST_STEP}
        self._look(self._queue.push(done, metrics))

    def _logs(self, done: int) -> bool:
        return done % self._train.log_every == 0 or done == self._train.steps

    def flush(self) -> None:
        """Look at all that is under way, waiting for it; raises Diverged and Spike."""
        self._look(self._queue.flush())

    def _look(self, arrived: list[tuple[int, Any]]) -> None:
        for done, metrics in arrived:
            self._telemetry.done(done, bool(metrics["finite"]))
            self._interval.add(metrics)
            self._judge(done, metrics, self._batches.pop(done))
            if self._logs(done):
                scalars = self._interval.summary()
                updates = done - self._nonfinite.total  # a skipped step does not move the schedule
                scalars["learning_rate"] = float(self._learning_rate(max(updates - 1, 0)))
                scalars["rollbacks"] = self._rollbacks
                images = (done - self._first) * self._batch_size  # of this stream of data
                scalars["epoch"] = images / self._examples_per_epoch
                if self._tokenizer is not None:  # since the start of this process
                    scalars["truncated_captions"] = self._tokenizer.truncated
                self._telemetry.log(done, scalars)

    def _judge(self, done: int, metrics: Any, batch: Mapping[str, jax.Array]) -> None:
        finite = bool(metrics["finite"])
        values = {"gradient norm": float(metrics["grad_norm"]), "loss": float(metrics["loss"])}
        for what, value in values.items():
            mean = self._spikes[what].mean
            if self._spikes[what].observe(value) and finite:
                if self._rollbacks_left > 0:
                    raise Spike(done, what, value, mean, self._first)
                self._interval.spikes += 1
                self._telemetry.message(
                    f"step {done}: {what} {value:.3g} stands out of its running mean {mean:.3g}"
                )
        if not finite:
            self._telemetry.message(f"step {done}: loss or gradient not finite, update skipped")
        try:
            self._nonfinite.observe(done, not finite)
        except Diverged as error:
            path = dump_batch(self._folder, done, batch)
            self._telemetry.message(f"{error}\nthe batch of step {done} is in {path}")
            raise


class Interval:
    """Means over the steps since the last line: the loss of one batch is mostly noise.

    waited: seconds in which devices waited for data, since the first interval.
    """

    def __init__(self, num_timesteps: int):
        self._num_timesteps = num_timesteps
        self.waited = 0.0
        self._start()

    def _start(self) -> None:
        self._metrics: list[dict[str, Any]] = []
        self._waited = 0.0
        self._began = time.monotonic()
        self.spikes = 0

    @contextlib.contextmanager
    def waiting(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Time in here is spent waiting for data, unless the devices are still busy at its end."""
        begin = time.monotonic()
        yield
        if not busy():
            seconds = time.monotonic() - begin
            self._waited += seconds
            self.waited += seconds

    def add(self, metrics: dict[str, Any]) -> None:
        """The metrics of one step, on the host; norms per module group may be left out."""
        self._metrics.append(metrics)

    def summary(self) -> dict[str, Any]:
        """Nested scalars for the log; starts the next interval.

        Losses and the gradient norm are means over the steps with finite ones (NaN if there was
        none); norms and ratios per module group are those of the last step.
        """
        last = self._metrics[-1]
        good = [m for m in self._metrics if m["finite"]]
        scalars = {
            "loss": _mean([m["loss"] for m in good]),
            "grad_norm": _mean([m["grad_norm"] for m in good]),
            "update_norm": _mean([m["update_norm"] for m in good]),
            "spikes": self.spikes,
            "skipped_steps": int(last["health"]["skipped"]),
            "data_wait": self._waited / max(time.monotonic() - self._began, 1e-9),
            "grad_norms": last["grad_norms"],
            "param_norms": last["param_norms"],
            "update_ratios": last["update_ratios"],
        }
        scalars |= {
            f"{name}_unweighted" if name == "loss" else name: _mean([m["aux"][name] for m in good])
            for name in last["aux"]
        }
        if "phases" in last:
            scalars["phases"] = {
                name: _phase_means([m["phases"][name] for m in good]) for name in last["phases"]
            }
        if "buckets" in last and good:
            total = {k: sum(m["buckets"][k] for m in good) for k in ("sum", "count")}
            scalars["loss_at"] = bucket_scalars(total, self._num_timesteps)
        self._start()
        return scalars


def _mean(values: list) -> float:
    return float(np.mean(values)) if values else float("nan")


def _phase_means(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps at which a phase took one; at others its metrics are NaN."""
    found = {}
    for name in ("loss", "grad_norm", "update_norm"):
        values = [float(step[name]) for step in steps]
        found[name] = _mean([value for value in values if value == value])
    for name in steps[-1]["aux"] if steps else ():
        values = [float(step["aux"][name]) for step in steps]
        found[name if name != "loss" else "loss_unweighted"] = _mean([v for v in values if v == v])
    return found


def dump_batch(folder: paths.Path, step: int, batch: Mapping[str, jax.Array]) -> paths.Path:
    """Write this host's part of a batch to `DIR/bad_batch_STEP_hostN.npz` and give its path."""
    path = folder / f"bad_batch_{step:08d}_host{jax.process_index()}.npz"
    arrays = {
        name: np.concatenate([np.asarray(shard.data) for shard in _distinct(value)])
        for name, value in batch.items()
    }
    with paths.writing(path) as local, open(local, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


def _distinct(array: jax.Array) -> list[Any]:
    """This host's shards in order, one of each where the mesh repeats them."""
    shards = {str(s.index): s for s in array.addressable_shards}
    return sorted(shards.values(), key=lambda s: s.index[0].start or 0)
