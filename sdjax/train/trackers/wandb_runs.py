"""Runs in Weights & Biases. Server, key and mode are its own: WANDB_API_KEY, WANDB_MODE, ...

W&B drops what comes with a step that is not above the last one, silently but for a warning; a run
that is resumed from a checkpoint, or goes back after a spike, logs steps again. So `step` is data,
an axis by `define_metric`, and W&B counts its own rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import wandb

from sdjax.system import paths
from sdjax.train.trackers.tracker import TrackedRun


def open_tracker(run: TrackedRun, say: Callable[[str], None]) -> WandbRun:
    """Open the run, the same one again if the workdir has been in it. See `OpenTracker`."""
    # Else W&B asks for a key at the terminal, and waits for the answer, where it has none.
    wandb.setup(settings=wandb.Settings(silent=True))
    known = run.id()
    id = known or uuid.uuid4().hex[:8]
    if known is None:
        run.remember(id)  # first, so that a kill leaves no run that nobody resumes
    opened = wandb.init(
        project=run.project,
        name=run.name,
        id=id,
        resume="allow",
        config=dict(run.config),
        dir=None if paths.is_remote(run.folder) else str(run.folder),
        # Its capture of the console would wrap the streams that the progress bar draws on.
        settings=wandb.Settings(console="off", silent=True),
    )
    opened.config.update(dict(run.config), allow_val_change=True)  # may have changed since
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    if opened.url:
        say(f"W&B: {opened.url}")
    return WandbRun(opened)


class WandbRun:
    """See `Tracker`."""

    def __init__(self, run: wandb.Run):
        self._run = run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **values})

    def images(self, step: int, name: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """See `Tracker`."""
        texts = [*captions, *[None] * (len(images) - len(captions))]
        shown = [
            wandb.Image(image, caption=text) for image, text in zip(images, texts, strict=True)
        ]
        self._run.log({"step": step, name: shown})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
