"""The runs below the folders named at the start, and what their files say at the moment."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sdjax.errors import UserError
from sdjax.system import lock_holder, paths, wishes
from sdjax.system.progress import duration
from sdjax.web.report import evaluations, figures, pictures, warnings
from sdjax.web.report.contents import Contents
from sdjax.web.report.data import gather as gather_data
from sdjax.web.report.metrics import EMPTY, METRICS_FILE, Curve, Metrics, read_metrics, smooth, thin
from sdjax.web.report.run import Run, Sizes, read_run
from sdjax.web.watch.tail import Seen, end_of

FILES = ("config.json", METRICS_FILE)  # one of these makes a folder a run
MOST_RUNS = 200
ALL_POINTS = 60_000  # of the curves of a run; a phone draws them
POINTS, LEAST_POINTS = 1000, 100  # of a curve
_RESCAN = 5.0  # seconds between two looks for new runs
_SLOW = 60.0  # seconds between two looks at files that change rarely
_PICTURE = re.compile(r"0*(\d{1,12})(?:-([\w.-]{1,80}))?\.png")


@dataclasses.dataclass(frozen=True)
class State:
    """The facts of a run at the moment, as the page shows them."""

    tiles: list[tuple[str, ...]]
    warnings: list[dict[str, str]]
    pictures: list[dict[str, Any]]
    active: bool
    doing: str
    done: int
    total: int
    age: float | None
    asked: list[str]


class LiveRun:
    """A run whose files are read again when they have changed; for all who watch it together."""

    def __init__(self, name: str, folder: paths.Path):
        self.name, self.folder = name, folder
        self._lock = threading.Lock()
        self._metrics, self._of, self._seen = EMPTY, (-1, 0.0), Seen()
        self._cost = self._parsed = 0.0
        self._slow: tuple[float, Run, Any, Any, list[str]] | None = None

    def metrics(self, *, now: bool = False) -> tuple[Metrics, Seen]:
        """Return the metrics up to a place in the file, which may be seconds ago.

        now: as the file is now; a long one takes a while to parse, so else no more than a
            twentieth of the time goes there.
        """
        with self._lock:
            stamp = self._stamp()
            due = now or time.monotonic() > self._parsed + max(1.0, 20 * self._cost)
            if stamp != self._of and (due or not self._metrics.lines):
                begin = time.monotonic()
                self._seen = end_of(self.folder)  # before, so that no row is missed
                self._metrics, self._of = read_metrics(self.folder), stamp
                self._parsed = time.monotonic()
                self._cost = self._parsed - begin
            return self._metrics, self._seen

    def curves(self, *, now: bool = False) -> tuple[dict[str, dict[str, Any]], Seen, bool]:
        """Return the curves by name as the page reads them, and up to where they go.

        The last is whether curves were thinned, and smoothed for that, since the page cannot.
        """
        metrics, seen = self.metrics(now=now)
        count = max(1, len(metrics.curves))
        points = int(np.clip(ALL_POINTS // count, LEAST_POINTS, POINTS))
        packed = {name: _packed(name, curve, points) for name, curve in metrics.curves.items()}
        longest = max((len(curve.steps) for curve in metrics.curves.values()), default=0)
        return packed, seen, longest > points

    def state(self) -> State:
        """Return the numbers, warnings and pictures."""
        metrics, _ = self.metrics()
        run, judged, reports, problems = self._seldom()
        contents = Contents(
            self.folder / "report.html", run, metrics, pictures.EMPTY, judged, reports, problems
        )
        holder = lock_holder.holder(self.folder)
        done, total = metrics.last_step, _whole(run.field("train.steps"))
        found = warnings.find(run, metrics, judged, reports, problems)
        active = holder is not None and holder.program == "sdjax.main"
        return State(
            tiles=[*contents.tiles(), *_more_tiles(run, metrics, active)],
            warnings=[dataclasses.asdict(one) for one in found],
            pictures=[
                {"kind": kind, "title": contents.title(kind), "steps": steps}
                for kind, steps in self.grids().items()
            ],
            active=active,
            doing=_doing(active, holder, done, total),
            done=done,
            total=total,
            age=self._age(),
            asked=wishes.pending(self.folder) if active else [],
        )

    def grids(self) -> dict[str, list[int]]:
        """Return {kind: steps, rising} of the grids in samples/."""
        folder = self.folder / "samples"
        found: dict[str, list[int]] = {}
        if not folder.exists():
            return found
        for path in folder.iterdir():
            if match := _PICTURE.fullmatch(path.name):
                found.setdefault(match[2] or "", []).append(int(match[1]))
        return {kind: sorted(steps) for kind, steps in sorted(found.items())}

    def picture(self, kind: str, step: int) -> pictures.Picture:
        """Return a grid, shrunk.

        Raises:
            UserError: there is none.
        """
        name = f"{step:08d}{f'-{kind}' if kind else ''}.png"
        if not _PICTURE.fullmatch(name):
            raise UserError(f"kind is {kind[:80]!r}; expected one of {list(self.grids())}")
        file = self.folder / "samples" / name
        try:
            if paths.resolved(file).is_relative_to(paths.resolved(self.folder)):
                return pictures.embed(file)
        except paths.storage_errors(ValueError, SyntaxError) as error:
            raise UserError(f"samples/{name} cannot be shown: {type(error).__name__}") from error
        raise UserError(f"samples/{name} is a link that leads out of the run's folder")

    def ask(self, wish: str) -> None:
        """Ask the run to stop, or for pictures.

        Raises:
            UserError: it does not run, or its folder cannot be written to.
        """
        if not self.active:
            raise UserError(f"{self.name} is not being trained, so there is nobody to ask")
        wishes.make(self.folder, wish)

    @property
    def active(self) -> bool:
        """Whether it is being trained, as far as its folder says."""
        holder = lock_holder.holder(self.folder)
        return holder is not None and holder.program == "sdjax.main"

    @property
    def newest(self) -> float:
        """The time of its last metrics, in seconds since 1970; 0 where there are none."""
        return self._stamp()[1]

    def stamp(self) -> tuple[Any, ...]:
        """Return what changes when anything that `state` shows does."""
        holder = lock_holder.holder(self.folder)
        of_samples = _size_and_time(self.folder / "samples")
        asked = wishes.pending(self.folder) if holder else []
        return self._stamp(), holder and (holder.pid, holder.began), of_samples, tuple(asked)

    def _stamp(self) -> tuple[int, float]:
        return _size_and_time(self.folder / METRICS_FILE)

    def _age(self) -> float | None:
        mtime = self._stamp()[1]
        return max(0.0, time.time() - mtime) if mtime else None

    def _seldom(self) -> tuple[Run, Any, Any, list[str]]:
        """Read what changes seldom: configuration, sizes, evaluations, reports on data."""
        with self._lock:
            if self._slow is None or time.monotonic() > self._slow[0] + _SLOW:
                problems: list[str] = []
                run = Run(self.folder, {}, Sizes({}, {}, {}), ())
                judged: Any = []
                reports: Any = []
                try:
                    run = read_run(self.folder)
                    judged, bad = evaluations.gather(self.folder)
                    reports, bad_reports = gather_data(run)
                    problems += [*bad, *bad_reports]
                # Whatever is wrong with a file, the rest is shown; see `report.page.gather`.
                except Exception as error:
                    problems.append(f"{type(error).__name__}: {error}")
                self._slow = (time.monotonic(), run, judged, reports, problems)
            return self._slow[1:]


class Runs:
    """The runs of the folders named at the start; nothing outside of them is ever read."""

    def __init__(self, folders: Sequence[paths.Path]):
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._known: dict[str, LiveRun] = {}
        self._looked = -_RESCAN

    def all(self) -> Mapping[str, LiveRun]:
        """Return {name: run}; new ones are found within seconds."""
        with self._lock:
            if time.monotonic() > self._looked + _RESCAN:
                found = _found(self._folders)
                self._known = {
                    name: self._known.get(name) or LiveRun(name, folder)
                    for name, folder in found.items()
                }
                self._looked = time.monotonic()
            return self._known

    def get(self, name: str) -> LiveRun:
        """Return the run of a name. Raises UserError."""
        runs = self.all()
        if name not in runs:
            listed = ", ".join(list(runs)[:20]) or "none yet"
            raise UserError(f"run is {name[:200]!r}; expected one of: {listed}")
        return runs[name]


def _found(folders: Sequence[paths.Path]) -> dict[str, paths.Path]:
    """Return {name: folder} of the runs in folders, or one or two levels below them."""
    found: dict[str, paths.Path] = {}
    for folder in folders:
        root = paths.resolved(folder)
        own = paths.absolute(folder).name or "run"
        if _is_run(folder):
            found[_free(own, found)] = folder
            continue
        for below in _below(folder, 2):
            if _is_run(below) and paths.resolved(below).is_relative_to(root):
                name = str(below.relative_to(folder))
                found[_free(name if len(folders) == 1 else f"{own}/{name}", found)] = below
            if len(found) >= MOST_RUNS:
                return found
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name, or with a number after it where two folders have the same."""
    count, made = 1, name
    while made in taken:
        count += 1
        made = f"{name} ({count})"
    return made


def _below(folder: paths.Path, levels: int) -> list[paths.Path]:
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir())
    except paths.storage_errors():
        return []
    found = []
    for child in children:
        if child.name.startswith("."):
            continue
        found.append(child)
        if levels > 1 and not _is_run(child):
            found += _below(child, levels - 1)
    return found


def _is_run(folder: paths.Path) -> bool:
    try:
        return any((folder / name).exists() for name in FILES)
    except paths.storage_errors():
        return False


def _packed(name: str, curve: Curve, points: int) -> dict[str, Any]:
    small = thin(curve, points)
    found: dict[str, Any] = {"x": figures.encode(small.steps), "y": figures.encode(small.values)}
    smoothed = smooth(curve) if len(small.steps) < len(curve.steps) else None
    if smoothed is not None and figures.NOISY.fullmatch(name):
        front = thin(smoothed[0], points)
        found |= {"sx": figures.encode(front.steps), "sy": figures.encode(front.values)}
    return found


def _size_and_time(path: paths.Path) -> tuple[int, float]:
    """Return bytes, and the time of the last change; zeros where there is nothing."""
    try:
        if not paths.is_remote(path):
            found = os.stat(path)
            return found.st_size, found.st_mtime  # epath's has whole seconds
        stat = epath.Path(path).stat() if path.exists() else None
    except paths.storage_errors():
        return 0, 0.0
    return (stat.length, float(stat.mtime)) if stat else (0, 0.0)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 2**53 else 0


def _doing(active: bool, holder: Any, done: int, total: int) -> str:
    if active:
        return f"Training, by {holder}"
    if holder is not None:
        return f"In use by {holder}"
    return "Finished" if total and done >= total else "Not running"


def _more_tiles(run: Run, metrics: Metrics, active: bool) -> list[tuple[str, str, str]]:
    """Return the tiles that matter while a run goes on: time left, waiting, memory."""
    rows = []
    left = _time_left(run, metrics)
    if left is not None and active:
        rows.append(("Time left", duration(left), "of steps, pauses aside"))
    if wait := metrics.get("train/data_wait"):
        rows.append(("Waiting for data", f"{wait.last:.1%}", "of the time, lately"))
    if memory := metrics.get("device/memory_gib"):
        limit = metrics.get("device/memory_limit_gib")
        small = f"of {limit.last:.1f}, the fullest device" if limit else "the fullest device"
        rows.append(("Device memory, GiB", f"{memory.last:.2f}", small))
    return rows


def _time_left(run: Run, metrics: Metrics) -> float | None:
    """Return the seconds of the steps that are left, at the pace of the last lines."""
    speed, seen = metrics.get("train/images_per_second"), metrics.get("train/images_seen")
    total = _whole(run.field("train.steps"))
    if not speed or not seen or total <= metrics.last_step or len(seen.steps) < 1:
        return None
    first = max(0, len(seen.steps) - 20)
    steps = int(seen.steps[-1] - seen.steps[first]) or int(seen.steps[-1])
    images = float(seen.values[-1] - seen.values[first]) or seen.last
    pace = float(np.median(speed.values[-20:]))
    if steps <= 0 or images <= 0 or pace <= 0:
        return None
    return (total - metrics.last_step) * images / steps / pace
