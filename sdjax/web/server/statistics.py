"""Numbers of the pictures that a server drew: times, lengths of prompts, and drift."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import time
from collections.abc import Iterator, Mapping

import numpy as np

from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.train.monitoring.data_profile import (
    MEASURES,
    PROMPT_TOKENS,
    Distribution,
    picture_measures,
    prompt_lengths,
)
from sdjax.web.server.engine import Job

WINDOW = 500  # pictures that drift is measured over, the last ones
FEWEST = 250  # below which chance alone gives an index of over 0.1 now and then
SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 77.0, 128.0, 256.0, 512.0)
SHARES = tuple(i / 10 for i in range(1, 10))


class Histogram:
    """Counts of values up to and with each bound, and above the last."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, int]]:
        """Return [(bound, values up to it)], as Prometheus has them."""
        names = (*(f"{bound:g}" for bound in self._bounds), "+Inf")
        return list(zip(names, np.cumsum(self._counts).tolist(), strict=True))


@dataclasses.dataclass
class Statistics:
    """Numbers of the pictures that were drawn since the start; `observe` is called by one thread.

    profile: {measure: its distribution in the training data}; see `data_profile`.
    tokenizer: that of the training data's profile.
    latency: seconds from the request to the picture; queued: those before drawing began.
    """

    tokenizer: TextTokenizer | None = None
    profile: Mapping[str, Distribution] = dataclasses.field(default_factory=dict)
    latency: Histogram = dataclasses.field(default_factory=lambda: Histogram(SECONDS))
    queued: Histogram = dataclasses.field(default_factory=lambda: Histogram(SECONDS))
    measures: dict[str, Histogram] = dataclasses.field(
        default_factory=lambda: {
            name: Histogram(TOKENS if name == PROMPT_TOKENS else SHARES) for name in MEASURES
        }
    )

    def __post_init__(self) -> None:
        if self.tokenizer is not None:  # with a count of its own of prompts that are cut
            self.tokenizer = self.tokenizer.of_length(self.tokenizer.context_length)
        self._last = {name: collections.deque[float](maxlen=WINDOW) for name in self.measures}

    def observe(self, job: Job, picture: np.ndarray) -> None:
        """Count a picture, uint8 [H, W, 3], that has just been drawn."""
        now = time.monotonic()
        self.latency.add(now - job.asked)
        self.queued.add((job.began or now) - job.asked)
        found = {
            name: float(values[0])
            for name, values in picture_measures(picture[None].astype(np.float32) / 255).items()
        }
        if self.tokenizer is not None:
            tokens = self.tokenizer.encode([job.request.prompt])
            found[PROMPT_TOKENS] = float(prompt_lengths(tokens, self.tokenizer)[0])
        for name, value in found.items():
            self.measures[name].add(value)
            self._last[name].append(value)

    def drift(self) -> Iterator[tuple[str, float]]:
        """Yield (measure, population stability index) of the last pictures, where it can be had."""
        for name, expected in self.profile.items():
            values = list(self._last[name])
            if len(values) >= FEWEST:
                yield name, expected.psi(values)
