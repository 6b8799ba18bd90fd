"""Server-sent events of runs: their curves once, then what is added, and how they are.

The id of an event is a byte offset of metrics.jsonl with a checksum, for each run; a browser that
lost the connection sends the last one and gets what it missed.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool

from sdjax.system import paths
from sdjax.web.report import figures
from sdjax.web.watch import tail
from sdjax.web.watch.runs import LiveRun
from sdjax.web.watch.tail import Seen

LOOK = 1.0  # seconds between two looks at a file; in a bucket ten times that
MOST = 16  # runs that one page follows
_QUIET = 15.0  # seconds without an event, after which a comment keeps the connection open
_STATE = 2.0  # seconds between two states of a run
_AGAIN = 0.05  # share of new rows after which thinned curves are sent anew

Event = tuple[str, dict[str, Any]]


@dataclasses.dataclass
class _Followed:
    """A run, up to where its rows were sent.

    names: of its metrics. count: rows since the curves; lines: in the curves, 0 if they are whole.
    """

    run: LiveRun
    seen: Seen | None
    names: set[str] = dataclasses.field(default_factory=set)
    count: int = 0
    lines: int = 0
    stamp: Any = None
    looked: float = 0.0
    told: float = 0.0


class Stream:
    """The events of some runs for one page.

    Args:
        marks: the id of the last event that the page has; "" for none.
        ending: set when the server stops.
    """

    def __init__(self, runs: Sequence[LiveRun], marks: str, ending: threading.Event):
        given = marks.split(",") if marks else []
        fits = len(given) == len(runs)
        self._followed = [
            _Followed(run, tail.find(run.folder, given[i]) if fits else None)
            for i, run in enumerate(runs)
        ]
        self._ending = ending
        self._planned: set[str] | None = None

    async def events(self) -> AsyncIterator[str]:
        """Yield the events as they are sent, until the server stops."""
        yield "retry: 2000\n\n"
        quiet = time.monotonic()
        while not self._ending.is_set():
            found = await run_in_threadpool(self._look)
            for name, data in found:
                yield self._message(name, data)
                quiet = time.monotonic()
            if time.monotonic() > quiet + _QUIET:
                yield ": still there\n\n"
                quiet = time.monotonic()
            await anyio.sleep(LOOK / 2)

    def _message(self, name: str, data: dict[str, Any]) -> str:
        marks = ",".join((one.seen or Seen()).mark for one in self._followed)
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        return f"id: {marks}\nevent: {name}\ndata: {text}\n\n"

    def _look(self) -> list[Event]:
        """Return what is new."""
        events: list[Event] = []
        for number, one in enumerate(self._followed):
            wait = 10 * LOOK if paths.is_remote(one.run.folder) else LOOK
            if time.monotonic() < one.looked + wait:
                continue
            one.looked = time.monotonic()
            try:
                events += self._rows(number, one)
                events += self._state(number, one)
            except paths.storage_errors() as error:
                events.append(("trouble", {"run": number, "words": f"{type(error).__name__}"}))
        names = {name for one in self._followed for name in one.names}
        if names != self._planned:
            self._planned = names
            events.insert(0, ("plans", {"plans": _plans(names)}))
        return events

    def _rows(self, number: int, one: _Followed) -> list[Event]:
        if one.seen is None:
            return [self._curves(number, one, now=False)]
        if not one.names:  # a page that has come back
            one.names = set(one.run.metrics()[0].curves)
        added = tail.read(one.run.folder, one.seen)
        if added.anew or (one.lines and one.count > max(200, _AGAIN * one.lines)):
            return [self._curves(number, one, now=True)]
        one.seen, one.count = added.seen, one.count + len(added.rows)
        if not added.rows:
            return []
        one.names |= {name for row in added.rows for name in row if name != "step"}
        return [("rows", {"run": number, "rows": added.rows})]

    def _curves(self, number: int, one: _Followed, *, now: bool) -> Event:
        curves, one.seen, thinned = one.run.curves(now=now)
        one.names, one.count = set(curves), 0
        one.lines = one.run.metrics()[0].lines if thinned else 0
        return "curves", {"run": number, "curves": curves}

    def _state(self, number: int, one: _Followed) -> list[Event]:
        if time.monotonic() < one.told + _STATE:
            return []
        one.told = time.monotonic()
        stamp = one.run.stamp()
        if stamp == one.stamp:
            return []
        one.stamp = stamp
        return [("state", {"run": number, **dataclasses.asdict(one.run.state())})]


def _plans(names: set[str]) -> list[dict[str, Any]]:
    """Return the figures of metrics, as the page draws them."""
    return [
        {
            "heading": heading, "title": plan.title, "unit": plan.unit, "note": plan.note,
            "names": plan.names,
            "noisy": [name for name in plan.names if figures.NOISY.fullmatch(name)],
        }
        for heading, plans in figures.plan(sorted(names)).items()
        for plan in plans
    ]  # fmt: skip
