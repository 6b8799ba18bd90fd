"""Who holds a lock: what its file says, and whether that process still runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import time
from pathlib import Path

from sdjax.system import paths

FILE = ".lock"  # in a folder that is filled in place
SILENT = 60.0  # seconds without a touch after which a lock of another machine is void


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has, or had, a lock.

    machine: differs between machines, and from one start of a machine to the next.
    began: the process's start in clock ticks, since a number may be used again; "" if not known.
    shared: whether other sharing processes may hold the lock too.
    """

    program: str
    pid: int
    host: str
    since: str
    machine: str
    began: str
    shared: bool

    @property
    def here(self) -> bool:
        """Whether it is, or was, a process of this machine since its last start."""
        return self.machine == machine()

    @property
    def has_ended(self) -> bool:
        """Whether it is known not to run any more."""
        return self.here and not is_running(self)

    def __str__(self) -> str:
        return f"{self.program}, process {self.pid} on {self.host}, since {self.since}"


def holder(folder: paths.PathLike, name: str = FILE) -> Holder | None:
    """Return the process that holds a folder's lock, as far as its file says; None if none does.

    It is for people to read: only `held` finds out for certain.
    """
    file = paths.to_path(folder) / name
    if paths.is_remote(file):
        return None
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found, touched = read(handle), os.fstat(handle).st_mtime
        finally:
            os.close(handle)
    except OSError:
        return None
    if found is None or found.has_ended or (not found.here and time.time() > touched + SILENT):
        return None
    return found


def read(handle: int) -> Holder | None:
    """The holder of the lock; of several, the first that runs on this machine, or the last."""
    holders = []
    for line in os.pread(handle, 65536, 0).splitlines():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            holder = Holder(**json.loads(line))
            if type(holder.pid) is int and 0 < holder.pid < 2**31 and str(holder).isprintable():
                holders.append(holder)
    running = (holder for holder in holders if holder.here and is_running(holder))
    return next(running, holders[-1] if holders else None)


@functools.cache
def machine() -> str:
    """A name of this machine since its last start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def began(pid: int) -> str:
    """The start of a process in clock ticks; "" if it has ended or the system has no /proc."""
    try:
        # proc(5): field 22, counted after the name, which is in parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_running(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return began(holder.pid) == holder.began
