"""The messages of the hosts of a run besides arrays: who lives, who failed, when to stop.

They use the key-value store of JAX's coordination service, which lives in process 0:

    sdjax/beat/I   a counter that host I moves while it lives
    sdjax/broken   a collective of some host failed: a silent host soon counts as lost
    sdjax/end      why the run ends early, {host, code, message, lost}; the first to say it is right
    sdjax/heard/I  host I has read it
    sdjax/stop     the step after which all save and stop
    sdjax/wish/W   the step after which all do what those who watch have asked for

Without this a failed host leaves the others waiting in a collective until JAX ends them with a C++
stack trace and exit code 134 (`docs/notes/libraries.md` compares). With one process every function
here does nothing.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from sdjax.errors import UserError, describe
from sdjax.system import interrupts, paths
from sdjax.system.aborts import abort_becomes

FAILED, WRONG_INPUT, INTERRUPTED, LOST_HOST = 1, 2, 130, 76  # exit codes

# How many steps ahead of the slowest host another can be in `stops_after`, plus one: a host first
# fetches the metrics of two steps ago (telemetry.DelayedMetrics), in which all took part.
STOP_AHEAD = 3
AGREE_EVERY = 8  # steps between two looks for what is not urgent; more than STOP_AHEAD

_GRACE = 10.0  # seconds to clean up, and for the others to hear of the end
_LONG = 24 * 3600 * 1000  # milliseconds; a dead host ends any wait long before
_SIGNS_OF_LOSS = (
    "gloo", "nccl", "connection closed by peer", "connection reset by peer",
    "coordination service", "coordination agent", "heartbeat", "socket closed",
)  # fmt: skip

_monitor: HostMonitor | None = None
_turns: collections.Counter[str] = collections.Counter()


def start(client: Any, coordinator: str, heartbeat_timeout: float) -> None:
    """Begin to monitor the other hosts; for `sdjax.parallel.distributed.join`.

    Args:
        client: JAX's connection to the coordination service.
        coordinator: HOST:PORT of process 0.
        heartbeat_timeout: seconds after which a silent host counts as lost.
    """
    global _monitor
    _monitor = HostMonitor(client, coordinator, heartbeat_timeout)
    _monitor.start()


def together(run: Callable[[], int]) -> int:
    """Call `run`; where it raises on one host, end the run on all with the same exit code.

    With several processes an error does not return: the process ends at once, since JAX's own way
    out waits for hosts that will never come.
    """
    if _monitor is None:
        return run()
    try:
        code = run()
    except BaseException as error:
        _monitor.fail(error)
    _monitor.leave()
    return code


def alone() -> bool:
    """Whether this process has joined no others."""
    return _monitor is None


def is_first() -> bool:
    """Whether this is process 0, or the only one; unlike JAX's answer it touches no device."""
    return _monitor is None or _monitor.index == 0


def stops_after(step: int, *, asked: bool) -> bool:
    """Return whether all hosts stop after `step`, because one of them was asked to.

    All call this after every step, and get the same answer for the same step: `STOP_AHEAD` steps
    after the one that was asked. JAX's preemption service keeps the GIL while it waits for the
    others, and so the heartbeats of all hosts, where one of them is lost.

    Args:
        asked: whether this host was asked to stop.
    """
    if _monitor is None:
        return asked
    if asked:
        _monitor.put("stop", str(step + STOP_AHEAD))
    last = _monitor.get("stop")
    return last is not None and step >= int(last)


def agreed(name: str, step: int, *, asked: bool) -> bool:
    """Return whether all hosts do something after `step`, because one of them was asked to.

    As `stops_after`, but it costs a message at every `AGREE_EVERY` steps alone.

    Args:
        name: of what is done; each is agreed upon once.
        asked: whether this host was asked for it.
    """
    if _monitor is None:
        return asked
    if step % AGREE_EVERY:
        return False
    if asked:
        _monitor.put(name, str(step + AGREE_EVERY))
    agreed_step = _monitor.get(name)
    return agreed_step is not None and step >= int(agreed_step)


def from_first(name: str, value: str) -> str:
    """Return process 0's value on every host; all call it, in the same order for each name."""
    if _monitor is None:
        return value
    key = f"first/{_turn(name)}"
    if _monitor.index == 0:
        _monitor.put(key, value)
        return value
    return _monitor.client.blocking_key_value_get(f"sdjax/{key}", _LONG)


def wait_for_all(name: str) -> None:
    """Wait until every host has called this."""
    if _monitor is not None:
        _monitor.client.wait_at_barrier(f"sdjax/{_turn(name)}", _LONG)


def _turn(name: str) -> str:
    """Append to the name how often it was used: the service takes each name once."""
    _turns[name] += 1
    return f"{name}/{_turns[name]}"


def means_lost_host(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a broken connection to another host."""
    while error is not None:
        text = str(error).lower()
        ours = isinstance(error, UserError | OSError)  # a disk or a download, not a collective
        if not ours and any(sign in text for sign in _SIGNS_OF_LOSS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _lost_message(who: str, why: str) -> str:
    return (
        f"{who} {why}. Look for the reason in its own log and the scheduler's (preempted, out of "
        "memory, network). The same command again, on all hosts, goes on from the last checkpoint"
    )


class HostMonitor:
    """The heartbeats of this process, and its eye on the others; see the module."""

    def __init__(self, client: Any, coordinator: str, heartbeat_timeout: float):
        self.client, self.index, self.count = client, jax.process_index(), jax.process_count()
        self._coordinator, self._timeout = coordinator, heartbeat_timeout
        self._interval = min(1.0, heartbeat_timeout / 6)
        self._over = threading.Event()
        self._answers = 0  # of process 0
        self._beats: dict[int, tuple[str, float]] = {}  # process 0: host -> (counter, when moved)
        self._stack = contextlib.ExitStack()
        self._label = f"[host {self.index}] "

    def start(self) -> None:
        """Send heartbeats and read those of the others, until `leave`."""
        self._stack.enter_context(interrupts.at_end(self._interrupted))
        if self.index > 0:
            message = f"{self._label}stopped: {self._coordinator_lost}"
            alive = self._coordinator_answers
            self._stack.enter_context(abort_becomes(LOST_HOST, message, unless=alive))
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()

    def put(self, name: str, value: str) -> None:
        """Set a key, unless it is set."""
        try:
            self.client.key_value_set(f"sdjax/{name}", value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self, name: str) -> str | None:
        """Return a key's value at once; None if it is not set."""
        try:
            return self.client.key_value_try_get(f"sdjax/{name}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    @property
    def _coordinator_lost(self) -> str:
        return _lost_message(f"host 0 ({self._coordinator})", "is lost: it no longer answers")

    def _coordinator_answers(self) -> bool:
        host, port = self._coordinator.rsplit(":", 1)
        try:
            with socket.create_connection((host, int(port)), timeout=3):
                return True
        except OSError:
            return False

    # ---- the heartbeats ----------------------------------------------------------------------

    def _beat(self) -> None:
        """Say that this host lives, and hear whether the run is over."""
        count = 0
        while not self._over.wait(self._interval):
            count += 1
            try:
                self.client.key_value_set(f"sdjax/beat/{self.index}", str(count), True)
                if self.index == 0:
                    self._look_for_silent()
                end = self.get("end")
            except jax.errors.JaxRuntimeError:
                continue  # `_guard` judges how long this may last
            self._answers += 1
            if end is not None:
                self._obey(json.loads(end))

    def _guard(self) -> None:
        """End this process where `_beat` cannot: its calls may hang with process 0's machine.

        This counts its own turns, not seconds: while the whole process stood still, as in a
        compiler that keeps the GIL or on a machine that is too busy, `_beat` could not ask.
        """
        answers, turns = self._answers, 0
        while not self._over.wait(self._interval):
            turns = turns + 1 if answers == self._answers else 0
            answers = self._answers
            if turns * self._interval > self._timeout:
                self._exit(LOST_HOST, f"stopped: {self._coordinator_lost}")

    def _look_for_silent(self) -> None:
        """Call a host lost that has not moved its counter for too long. In process 0."""
        now, broken = time.monotonic(), self.get("broken")
        patience = self._timeout if broken is None else min(5 * self._interval, self._timeout)
        beats = dict(self.client.key_value_dir_get("sdjax/beat/"))
        silent = []
        for host in range(1, self.count):
            beat = beats.get(f"sdjax/beat/{host}", "")
            if host not in self._beats or self._beats[host][0] != beat:
                self._beats[host] = (beat, now)
            if now - self._beats[host][1] > patience:
                silent.append(host)
        if silent:
            names = ", ".join(map(str, silent))
            who = f"host {names} of {self.count}" if len(silent) == 1 else f"hosts {names}"
            verb = "is lost: it" if len(silent) == 1 else "are lost: they"
            why = f"{verb} fell silent" + (f" ({broken})" if broken else "")
            self._end(LOST_HOST, _lost_message(who, why), lost=silent)

    # ---- the end -----------------------------------------------------------------------------

    def _end(self, code: int, message: str, lost: list[int] | None = None) -> None:
        """Say to all hosts why the run ends, unless one has said it already."""
        end = {"host": self.index, "code": code, "message": message, "lost": lost or []}
        self.put("end", json.dumps(end))

    def _obey(self, end: dict[str, Any]) -> None:
        """End this process, because another host or process 0's monitor ended the run."""
        message = f"stopped: {end['message']}"
        if end["host"] == self.index and end["code"] != LOST_HOST:
            time.sleep(_GRACE)  # the thread that failed prints the message
            os._exit(end["code"])
        if end["code"] != LOST_HOST:
            message = f"stopped, because host {end['host']} did: {end['message']}"
        self._exit(end["code"], message, end)

    def _exit(self, code: int, message: str, end: dict[str, Any] | None = None) -> NoReturn:
        sys.stdout.flush()
        print(f"{self._label}{message}", file=sys.stderr, flush=True)
        if end is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.put(f"heard/{self.index}", "1")
                if self.index == 0:
                    self._wait_until_heard({end["host"], *end["lost"]})
        os._exit(code)

    def _wait_until_heard(self, but: set[int]) -> None:
        """Let process 0, which takes the store with it, end last."""
        wanted, deadline = self.count - len(but | {0}), time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            heard = {name for name, _ in self.client.key_value_dir_get("sdjax/heard/")}
            if len(heard - {"sdjax/heard/0"}) >= wanted:
                time.sleep(0.2)  # from their last word to their exit
                return
            time.sleep(self._interval / 4)

    def fail(self, error: BaseException) -> NoReturn:
        """Say to all hosts that this one raised, and end the process."""
        if means_lost_host(error):
            self._blame(error)
        if isinstance(error, paths.storage_errors(UserError)):
            code, message = WRONG_INPUT, f"error: {describe(error)}"
        elif isinstance(error, KeyboardInterrupt):
            code, message = INTERRUPTED, "interrupted"
        elif isinstance(error, SystemExit):
            code, message = error.code if isinstance(error.code, int) else FAILED, "exit"
        else:
            code, message = FAILED, f"{type(error).__name__}: {error}"
            for line in "".join(traceback.format_exception(error)).splitlines():
                print(f"{self._label}{line}", file=sys.stderr)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._end(code, message)
        self._exit(code, message, {"host": self.index, "lost": []})

    def _interrupted(self, code: int, line: str) -> None:
        """End the other processes too, since a signal ends this one."""
        self._end(code, line)
        if self.index == 0:
            self._wait_until_heard({0})

    def _blame(self, error: BaseException) -> NoReturn:
        """Wait for process 0 to find out whose connection broke, then end."""
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        why = f"{type(error).__name__}: {lines[0][:200]}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.put("broken", why)
            time.sleep(10 * self._interval)  # `_beat` ends this process meanwhile, as a rule
            self._end(LOST_HOST, _lost_message("the connection to another host", f"broke: {why}"))
            time.sleep(_GRACE)
        self._exit(LOST_HOST, f"stopped: {self._coordinator_lost}")

    def leave(self) -> None:
        """Wait for the end of the run on all hosts, and close the connection."""
        wait_for_all("leave")  # process 0 may still be writing the diffusers folder
        self._over.set()
        for thread in self._threads:
            thread.join()
        jax.distributed.shutdown()
        self._stack.close()
