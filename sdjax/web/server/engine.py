"""The thread that owns the device: it draws the pictures of a queue, those that are alike together.

Whoever asks puts jobs into the queue and waits for them. A job can be stopped at any time: one that
waits is dropped, one that is being drawn ends after its current step, as it is estimated there.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from absl import logging

from sdjax.errors import UserError
from sdjax.web.server.requests import PictureRequest

Watch = Callable[[int, np.ndarray], np.ndarray]


class BusyError(UserError):
    """The queue is full; `seconds` says when it may have room."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"{waiting} pictures are waiting; try again in {seconds} s")
        self.seconds = seconds


class StoppedError(RuntimeError):
    """A picture that was stopped before its drawing began."""


class Drawer(Protocol):
    """Draws batches; see `LoadedModel`."""

    @property
    def batch_size(self) -> int:
        """Return the most pictures of a batch."""

    def draw(self, requests: Sequence[PictureRequest], watch: Watch) -> np.ndarray:
        """Return uint8 [N, H, W, 3] of requests that are all alike."""

    def evaluations(self, request: PictureRequest) -> int:
        """Return how often the denoiser is evaluated."""


@dataclasses.dataclass(eq=False)
class Job:
    """A picture on its way.

    done: the picture, uint8 [H, W, 3]; or the error.
    step: evaluations done, of `steps`; estimate: what the last one takes the latents [h, w, C] for.
    asked: time.monotonic() when it was; began: at the beginning of its drawing, or None while it
        waits.
    stopped: whether it was asked to stop.
    """

    request: PictureRequest
    steps: int
    done: Future[np.ndarray] = dataclasses.field(default_factory=Future)
    step: int = 0
    estimate: np.ndarray | None = None
    asked: float = dataclasses.field(default_factory=time.monotonic)
    began: float | None = None
    stopped: bool = False


@dataclasses.dataclass
class Tally:
    """Numbers of all pictures since the start.

    drawn, failed, stopped, refused: pictures; batches: draws of the device.
    seconds: in which the device drew.
    """

    drawn: int = 0
    failed: int = 0
    stopped: int = 0
    refused: int = 0
    batches: int = 0
    seconds: float = 0.0


class Observe(Protocol):
    """Takes note of a picture, uint8 [H, W, 3], that was drawn."""

    def __call__(self, job: Job, picture: np.ndarray, /) -> None: ...


class Engine:
    """A queue of jobs, and the thread that draws them.

    Args:
        observe: called by that thread with every picture that was drawn.
    """

    def __init__(self, drawer: Drawer, *, queue: int, observe: Observe | None = None):
        self.tally = Tally()
        self._observe = observe
        self._drawer, self._most = drawer, queue
        self._waiting: collections.deque[Job] = collections.deque()
        self._drawing: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[PictureRequest]) -> list[Job]:
        """Put pictures into the queue, all or none.

        Raises:
            BusyError: the queue has no room for all of them, or the server is stopping.
        """
        jobs = [Job(request, self._drawer.evaluations(request)) for request in requests]
        with self._changed:
            if self._closing or len(self._waiting) + len(jobs) > self._most:
                self.tally.refused += len(jobs)
                raise BusyError(len(self._waiting), self._patience())
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return jobs

    def stop(self, jobs: Sequence[Job] | None = None) -> int:
        """Stop jobs (by default those that are being drawn); return how many were on their way."""
        with self._changed:
            chosen = self._drawing if jobs is None else jobs
            alive = [job for job in chosen if not job.done.done() and not job.stopped]
            for job in alive:
                job.stopped = True
            gone = [job for job in self._waiting if job.stopped]
            self._waiting = collections.deque(job for job in self._waiting if not job.stopped)
            self.tally.stopped += len(alive)
        for job in gone:
            job.done.set_exception(StoppedError("stopped before its turn"))
        return len(alive)

    def jobs(self) -> tuple[list[Job], list[Job]]:
        """Return the jobs that are being drawn, and those that wait."""
        with self._changed:
            return list(self._drawing), list(self._waiting)

    def close(self, seconds: float) -> bool:
        """Take no more jobs and wait so long for those there are; return whether all are done."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._waiting or self._drawing:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            left = [*self._waiting, *self._drawing]
        self.stop(left)
        return not left

    def _patience(self) -> int:
        """Return seconds after which a picture may be drawn, from the speed up to now."""
        each = self.tally.seconds / self.tally.drawn if self.tally.drawn else 1.0
        return int(min(max(1.0, each * self._drawer.batch_size), 60.0))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
                self._drawing = self._take()
            self._draw(self._drawing)
            with self._changed:
                self._drawing = []
                self._changed.notify_all()

    def _take(self) -> list[Job]:
        """Return the job that waits for longest, and those like it, in their order."""
        wanted = self._waiting[0].request.alike
        chosen: list[Job] = []
        left: list[Job] = []
        for job in self._waiting:
            fits = len(chosen) < self._drawer.batch_size and job.request.alike == wanted
            (chosen if fits else left).append(job)
        self._waiting = collections.deque(left)
        began = time.monotonic()
        for job in chosen:
            job.began = began
        return chosen

    def _draw(self, jobs: Sequence[Job]) -> None:
        def watch(i: int, estimates: np.ndarray) -> np.ndarray:
            for job, estimate in zip(jobs, estimates, strict=True):
                if not job.stopped:
                    job.step, job.estimate = i + 1, estimate
            return np.array([job.stopped for job in jobs])

        began = time.monotonic()
        try:
            pictures = self._drawer.draw([job.request for job in jobs], watch)
        except Exception as error:  # the thread lives on, whatever a picture does to it
            self.tally.failed += len(jobs)
            for job in jobs:
                job.done.set_exception(error)
            return
        finally:
            self.tally.seconds += time.monotonic() - began
            self.tally.batches += 1
        self.tally.drawn += len(jobs)
        for job, picture in zip(jobs, pictures, strict=True):
            job.done.set_result(picture)
            if self._observe is None or job.stopped:
                continue
            try:
                self._observe(job, picture)
            except Exception:  # the thread lives on
                logging.exception("a picture that was drawn is not counted")
