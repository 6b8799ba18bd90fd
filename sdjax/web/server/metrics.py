"""The numbers that Prometheus reads of the server: pictures, refusals, the queue, device time."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from sdjax.web.server.service import Service


class _Numbers(Collector):
    """The numbers of one service, as they are when they are asked for."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Return every family of numbers; nothing waits for the device."""
        engine = self._service.engine
        tally = engine.tally
        drawing, waiting = engine.jobs()
        pictures = CounterMetricFamily(
            "sdjax_serve_pictures", "Pictures by what became of them.", labels=["outcome"]
        )
        for outcome in ("drawn", "failed", "stopped", "refused"):
            pictures.add_metric([outcome], getattr(tally, outcome))
        yield pictures
        yield CounterMetricFamily(
            "sdjax_serve_batches", "Batches that the device drew.", value=tally.batches
        )
        yield CounterMetricFamily(
            "sdjax_serve_device_seconds", "Time in which the device drew.", value=tally.seconds
        )
        tokenizers = self._service.loaded.model.tokenizers.values()
        yield CounterMetricFamily(
            "sdjax_serve_truncated",
            "Prompts that were longer than a text encoder reads.",
            value=max((each.truncated for each in tokenizers), default=0),
        )
        yield from self._statistics()
        yield GaugeMetricFamily("sdjax_serve_waiting", "Pictures that wait.", value=len(waiting))
        yield GaugeMetricFamily(
            "sdjax_serve_drawing", "Pictures that are being drawn.", value=len(drawing)
        )
        info = GaugeMetricFamily("sdjax_serve_info", "The model.", labels=["model", "digest"])
        info.add_metric([self._service.loaded.name, self._service.digest], 1.0)
        yield info

    def _statistics(self) -> Iterator[Metric]:
        """Yield times, and what was asked and drawn beside what the model was trained on."""
        own = self._service.statistics
        times = {
            "sdjax_serve_latency_seconds": ("from the request to the picture", own.latency),
            "sdjax_serve_queue_seconds": ("from the request to the beginning", own.queued),
        }
        for name, (about, times_of) in times.items():
            yield HistogramMetricFamily(
                name, f"Time {about}.", buckets=times_of.buckets(), sum_value=times_of.total
            )
        served = HistogramMetricFamily(
            "sdjax_serve_measure",
            "Prompts (tokens) and pictures (shares) that were served.",
            labels=["measure"],
        )
        for name, values in own.measures.items():
            served.add_metric([name], values.buckets(), values.total)
        yield served
        trained = GaugeMetricFamily(
            "sdjax_serve_training_mean", "Mean of the training data.", labels=["measure"]
        )
        for name, expected in own.profile.items():
            trained.add_metric([name], expected.mean)
        yield trained
        drift = GaugeMetricFamily(
            "sdjax_serve_drift",
            "Population stability index of the last pictures against the training data.",
            labels=["measure"],
        )
        for name, index in own.drift():
            drift.add_metric([name], index)
        yield drift


def exposition(service: Service) -> tuple[bytes, str]:
    """Return the numbers in Prometheus' text format, and its media type."""
    registry = CollectorRegistry()
    registry.register(_Numbers(service))
    return generate_latest(registry), CONTENT_TYPE_LATEST
