"""How fast a run is, against what the device could do, and the memory it takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax


class Throughput:
    """Images per second between steps, without compilation and pauses.

    The clock starts when the first step is done, so its compilation does not count.
    """

    def __init__(self, batch_size: int, *, clock: Callable[[], float] = time.monotonic):
        self._batch_size, self._clock = batch_size, clock
        self._mark: tuple[int, float] | None = None  # step and time the interval began at
        self._last: tuple[int, float] | None = None
        self._paused = 0.0

    def done(self, step: int) -> None:
        """`step` is complete on the device."""
        self._last = (step, self._clock())
        if self._mark is None:
            self._mark, self._paused = self._last, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def measure(self) -> float | None:
        """Images per second since the last call; None if no step was done since."""
        if self._mark is None or self._last is None or self._last[0] <= self._mark[0]:
            return None
        steps = self._last[0] - self._mark[0]
        seconds = self._last[1] - self._mark[1] - self._paused
        self._mark, self._paused = self._last, 0.0
        return steps * self._batch_size / max(seconds, 1e-9)


def device_memory() -> dict[str, float]:
    """Largest use over the local devices, in GiB; empty where the backend does not tell (CPU)."""
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    names = {
        "bytes_in_use": "memory_gib",
        "peak_bytes_in_use": "memory_peak_gib",
        "bytes_limit": "memory_limit_gib",
    }
    return {
        name: max(s[key] for s in stats) / 2**30
        for key, name in names.items()
        if stats and all(key in s for s in stats)
    }
