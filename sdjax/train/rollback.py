"""Going back after a spike: to the last checkpoint, and on without the batch that caused it.

To go back is to resume, with one batch fewer: `WORKDIR/rollbacks.json` lists what happened, and the
batches it names are passed over by whoever trains in that folder. A run that is killed in between
goes on to the same bits, and one that is repeated elsewhere from the start meets the same spikes.
"""

from __future__ import annotations

import json
from typing import Any

import jax

from sdjax.errors import UserError
from sdjax.parallel import hosts
from sdjax.system import paths, text_files
from sdjax.system.untrusted import brief

FILE = "rollbacks.json"


class Spike(RuntimeError):
    """A loss or gradient norm stands far out of its running mean, and the run may go back.

    first: steps done when the stream of data began.
    """

    def __init__(self, step: int, what: str, value: float, mean: float, first: int = 0):
        self.step, self.what, self.value, self.mean = step, what, value, mean
        self.first = first
        super().__init__(f"step {step}: {what} {value:.3g}, running mean {mean:.3g}")


def read(folder: paths.Path) -> list[dict[str, Any]]:
    """Return the rollbacks so far: "step", "what", "value", "mean", and the batch: number "batch"
    of the stream of data that began after "first" steps.

    Raises:
        UserError: the file cannot be read.
    """
    file = folder / FILE
    if not paths.exists(file):
        return []
    try:
        events = text_files.read_json(file)
        if not isinstance(events, list) or not all(map(_is_event, events)):
            raise UserError(f"it is {brief(events)}; expected a list of rollbacks")
    except UserError as error:
        raise UserError(
            f"{file} cannot be read ({error}): it lists the batches that this run passes over. "
            "Restore it from a copy, or start in another --workdir"
        ) from error
    return events


def _is_event(event: Any) -> bool:
    names = ("step", "first", "batch")
    return isinstance(event, dict) and all(type(event.get(name)) is int for name in names)


def record(folder: paths.Path, spike: Spike) -> str:
    """Add a spike to the list. Every process must call it; returns what to tell.

    The next time its batch is passed over.
    """
    events = read(folder)
    passed_over = {event["batch"] for event in events if event["first"] == spike.first}
    number = batch_of(spike.step - spike.first, passed_over)
    events.append({"step": spike.step, "first": spike.first, "batch": number, "what": spike.what,
                   "value": spike.value, "mean": spike.mean})  # fmt: skip
    hosts.wait_for_all("rollback read")
    if jax.process_index() == 0:
        paths.write_text(folder / FILE, json.dumps(events, indent=1))
    hosts.wait_for_all("rollback written")
    return (
        f"{spike}: back to the last checkpoint, and on without batch {number} "
        f"(rollback {len(events)}, listed in {folder / FILE})"
    )


def batch_of(step: int, passed_over: set[int]) -> int:
    """The number, from 0, of the batch of optimizer step `step`, from 1."""
    number = step - 1
    for passed in sorted(passed_over):
        number += passed <= number
    return number
