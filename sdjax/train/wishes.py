"""The wishes of those who watch a run, as the loop hears them; see `sdjax.system.wishes`."""

from __future__ import annotations

import threading
from typing import Self

from sdjax.parallel import hosts
from sdjax.system import paths
from sdjax.system.wishes import FOLDER, SAMPLE, STOP, pending

EVERY = 1.0  # seconds between two looks; in a bucket, where each costs a request, 30 times that


class Wishes:
    """A context in which a thread of process 0 looks for wishes; what an earlier run left is void.

    Args:
        every: seconds between two looks, in place of `EVERY`.
    """

    def __init__(self, workdir: paths.Path, *, every: float | None = None):
        self._workdir = workdir
        self._every = every or (30 * EVERY if paths.is_remote(workdir) else EVERY)
        self._over = threading.Event()
        self._heard: set[str] = set()
        self._drawn = 0  # wishes for pictures that were fulfilled
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if hosts.is_first():
            self._look()
            self._heard.clear()
            self._thread = threading.Thread(target=self._listen, name="wishes", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(2.0)  # a network file system may hang

    def stops_after(self, step: int) -> bool:
        """Return whether to stop after `step`: the same on all hosts, which all ask."""
        return hosts.agreed("wish/stop", step, asked=STOP in self._heard)

    def draws_after(self, step: int) -> bool:
        """Return whether to draw after `step`, once a wish: the same on all hosts."""
        draws = hosts.agreed(f"wish/sample/{self._drawn}", step, asked=SAMPLE in self._heard)
        if draws:
            self._heard.discard(SAMPLE)
            self._drawn += 1
        return draws

    def _listen(self) -> None:
        while not self._over.wait(self._every):
            self._look()

    def _look(self) -> None:
        """Read and remove what is there."""
        try:
            for wish in pending(self._workdir):
                (self._workdir / FOLDER / wish).unlink()
                self._heard.add(wish)
        except paths.storage_errors():
            pass  # a wish can wait, a run cannot
