"""The numbers of a run that Prometheus reads, and their names.

Names are in base units; what only grows ends in `_total` (https://prometheus.io/docs/practices/
naming). Counters count work: a step that is taken again, after a kill or a rollback, counts again.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# Upper bounds of the histogram of step times, in seconds.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# {name: (its type, its description)}. Those of `OF_FIRST` only process 0 has.
METRICS = {
    "sdjax_run_info": ("gauge", "1; its labels say what runs."),
    "sdjax_steps_total": ("counter", "Optimizer steps taken."),
    "sdjax_step": ("gauge", "Optimizer steps done of the run."),
    "sdjax_planned_steps": ("gauge", "Optimizer steps of the whole run."),
    "sdjax_last_step_timestamp_seconds": ("gauge", "When the last step was done."),
    "sdjax_images_total": ("counter", "Images trained on, by all processes."),
    "sdjax_step_seconds": ("histogram", "Time from one step to the next, without pauses."),
    "sdjax_data_wait_seconds_total": ("counter", "Time in which devices waited for data."),
    "sdjax_skipped_steps_total": ("counter", "Steps skipped for a NaN or an infinity."),
    "sdjax_loss": ("gauge", "Training loss, the mean since the last line of the log."),
    "sdjax_validation_loss": ("gauge", "Loss on held-out (or, set=validation_train, own) data."),
    "sdjax_grad_norm": ("gauge", "Gradient norm, the mean since the last line of the log."),
    "sdjax_learning_rate": ("gauge", "Learning rate."),
    "sdjax_mfu_ratio": ("gauge", "Share of the devices' peak arithmetic that is used."),
    "sdjax_checkpoint_seconds": ("summary", "Time from the start of a save until it is complete."),
    "sdjax_checkpoint_last_success_timestamp_seconds": ("gauge", "When a save was complete."),
    "sdjax_checkpoint_last_step": ("gauge", "Optimizer steps done at the last complete save."),
    "sdjax_checkpoint_interval_steps": ("gauge", "Optimizer steps between saves."),
    "sdjax_device_memory_bytes": ("gauge", "Memory in use on a device of this process."),
    "sdjax_device_memory_limit_bytes": ("gauge", "Memory that a device has."),
}
OF_FIRST = frozenset({
    "sdjax_images_total", "sdjax_loss", "sdjax_validation_loss", "sdjax_grad_norm",
    "sdjax_learning_rate", "sdjax_mfu_ratio", "sdjax_checkpoint_seconds",
    "sdjax_checkpoint_last_success_timestamp_seconds", "sdjax_checkpoint_last_step",
    "sdjax_checkpoint_interval_steps",
})  # fmt: skip


@dataclasses.dataclass
class Counters:
    """Numbers that only grow, over resumes too: they are kept in the workdir as JSON.

    buckets: steps by their time, [len(SECONDS) + 1]; `step_seconds` is the sum of these times.
    last_save, last_saved: time and step of the last complete save.
    """

    steps: int = 0
    images: int = 0
    skipped: int = 0
    data_wait: float = 0.0
    buckets: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    step_seconds: float = 0.0
    saves: int = 0
    save_seconds: float = 0.0
    last_save: float | None = None
    last_saved: int | None = None

    def took(self, seconds: float) -> None:
        """Count the time of a step."""
        self.buckets[bisect.bisect_left(SECONDS, seconds)] += 1
        self.step_seconds += seconds


def counters_from(values: Any) -> Counters:
    """Return counters out of JSON; those that are no numbers, or of other buckets, begin at 0."""
    fresh = Counters()
    if not isinstance(values, Mapping):
        return fresh
    for field in dataclasses.fields(Counters):
        value = values.get(field.name)
        if field.name == "buckets":
            counts = value if isinstance(value, list) else []
            good = [type(count) for count in counts] == [int] * len(fresh.buckets)
        else:
            good = type(value) in (int, float)
        if good:
            setattr(fresh, field.name, value)
    return fresh


@dataclasses.dataclass
class Numbers:
    """All numbers of a process at one moment.

    gauges: {name: value}; validation: {(set, weights): loss}; memory: {device: (used, limit)}.
    info: labels of `sdjax_run_info`.
    """

    info: dict[str, str]
    first: bool
    counters: Counters = dataclasses.field(default_factory=Counters)
    gauges: dict[str, float] = dataclasses.field(default_factory=dict)
    validation: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    memory: dict[str, tuple[float, float | None]] = dataclasses.field(default_factory=dict)

    def copy(self) -> Numbers:
        """Return numbers that do not change with these."""
        counters = dataclasses.replace(self.counters, buckets=list(self.counters.buckets))
        return dataclasses.replace(
            self,
            counters=counters,
            gauges=dict(self.gauges),
            validation=dict(self.validation),
            memory=dict(self.memory),
        )


def families(numbers: Numbers) -> Iterator[Metric]:
    """Yield what prometheus_client writes of the numbers, all with the labels run and process."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        SummaryMetricFamily,
    )

    kinds = {
        "counter": CounterMetricFamily, "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily, "summary": SummaryMetricFamily,
    }  # fmt: skip
    own = {name: numbers.info[name] for name in ("run", "process")}
    for name, samples in _samples(numbers).items():
        if not samples or name in OF_FIRST and not numbers.first:
            continue
        kind, about = METRICS[name]
        labels = [*own, *(label for label in samples[0][0] if label not in own)]
        family: Any = kinds[kind](name, about, labels=labels)
        for more, values in samples:
            every = own | more
            family.add_metric([every[label] for label in labels], *values)
        yield family


def _samples(numbers: Numbers) -> dict[str, list[tuple[dict[str, str], tuple[Any, ...]]]]:
    """Return {name: [(labels, what `add_metric` takes)]} in the order of `METRICS`."""
    counters = numbers.counters
    cumulative, below = [], 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), counters.buckets, strict=True):
        below += count
        cumulative.append((bound, below))
    single: dict[str, tuple[Any, ...]] = {
        "sdjax_steps_total": (counters.steps,),
        "sdjax_images_total": (counters.images,),
        "sdjax_data_wait_seconds_total": (counters.data_wait,),
        "sdjax_skipped_steps_total": (counters.skipped,),
        "sdjax_step_seconds": (cumulative, counters.step_seconds),
        "sdjax_checkpoint_seconds": (counters.saves, counters.save_seconds),
    }
    gauges = dict(numbers.gauges)
    if counters.last_save is not None and counters.last_saved is not None:
        gauges["sdjax_checkpoint_last_success_timestamp_seconds"] = counters.last_save
        gauges["sdjax_checkpoint_last_step"] = counters.last_saved
    single |= {name: (value,) for name, value in gauges.items()}
    found: dict[str, list[tuple[dict[str, str], tuple[Any, ...]]]] = {
        name: [({}, single[name])] if name in single else [] for name in METRICS
    }
    found["sdjax_run_info"] = [(numbers.info, (1,))]
    found["sdjax_validation_loss"] = [
        ({"set": kind, "weights": weights}, (loss,))
        for (kind, weights), loss in numbers.validation.items()
    ]
    for device, (used, limit) in numbers.memory.items():
        found["sdjax_device_memory_bytes"].append(({"device": device}, (used,)))
        if limit is not None:
            found["sdjax_device_memory_limit_bytes"].append(({"device": device}, (limit,)))
    return found
