"""Runs in trackio: on this disk, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import trackio

from sdjax.train.trackers.tracker import TrackedRun


def open_tracker(run: TrackedRun, say: Callable[[str], None]) -> TrackioRun:
    """Open the run, the same one again if the workdir has been in it. See `OpenTracker`.

    A run of trackio is resumed by its name, so the name has a part that no other run's has.
    """
    known = run.id()
    name = known or f"{re.sub(r'[^a-zA-Z0-9_-]+', '_', run.name)[:48]}-{uuid.uuid4().hex[:6]}"
    if known is None:
        run.remember(name)
    opened = trackio.init(
        project=run.project, name=name, config=dict(run.config), resume="allow", embed=False
    )
    return TrackioRun(opened)


class TrackioRun:
    """See `Tracker`."""

    def __init__(self, run: trackio.Run):
        self._run = run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, name: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """See `Tracker`."""
        texts = [*captions, *[None] * (len(images) - len(captions))]
        shown = {
            f"{name}/{i + 1}": trackio.Image(image, caption=text)
            for i, (image, text) in enumerate(zip(images, texts, strict=True))
        }
        self._run.log(shown, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
