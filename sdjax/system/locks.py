"""One writer for each folder: an advisory lock, which one process holds for all hosts of a run.

The lock is flock(2) on a file in the folder. The kernel releases it when its process ends, by
SIGKILL too. The file names the holder, and is removed at the end. A file that a killed process left
behind locks nothing.

On network file systems flock may reach all machines (NFS from Linux 2.6.12 on, Lustre with -o
flock), this machine alone, or not exist, and may outlive a machine that was switched off. So the
holder also touches the file every `BEAT` seconds. On another machine a lock counts as long as the
file is touched. Two processes that begin in the same seconds may both get a lock where flock does
not reach the other machine. Buckets (gs://) have no lock at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sdjax.errors import UserError, write_error
from sdjax.system import interrupts, lock_holder, paths
from sdjax.system.lock_holder import FILE, SILENT, Holder

BEAT = 10.0  # seconds between two touches of a lock
GRACE = 5.0  # seconds that a process of this machine has to end, as after SIGKILL
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def is_lock(path: paths.Path) -> bool:
    """Whether a file is a lock of its folder."""
    return path.name.startswith(FILE)


class LockedError(UserError):
    """Another process writes into the folder; the message names it.

    holder: None if it is not known.
    """

    def __init__(self, message: str, holder: Holder | None):
        super().__init__(message)
        self.holder = holder


@contextlib.contextmanager
def held(
    folder: paths.PathLike, option: str, program: str, *, shared: bool = False, name: str = FILE
) -> Iterator[None]:
    """Make a folder and hold its lock; in a bucket, only make the folder.

    A folder that was made here and is empty at the end is removed, so that a verb that refuses its
    input leaves nothing.

    Args:
        option: the option that named the folder, for messages, such as "--workdir".
        program: the program that holds the lock, for messages of other processes.
        shared: whether all processes with `shared` may hold the lock together, as workers of a
            sweep.
        name: the name of the lock's file; locks of different names are independent.

    Raises:
        LockedError: another process has it.
        WriteError: the lock cannot be written.
        UserError: the folder cannot be made.
    """
    folder = paths.to_path(folder)
    made = not paths.exists(folder)
    paths.make_folder(folder)
    if paths.is_remote(folder):
        yield
        return
    try:
        with _hold(Path(folder, name), f"{option}={folder}", program, shared):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


@contextlib.contextmanager
def replacing(target: paths.PathLike, option: str, program: str) -> Iterator[None]:
    """Hold a lock beside a file or folder that appears whole at the end.

    An existing folder must not be locked either. Arguments and errors are those of `held`.
    """
    target = paths.absolute(target)
    if paths.is_remote(target):
        yield
        return
    paths.make_folder(target.parent)
    what = f"{option}={target}"
    with _hold(Path(target.parent, f".{target.name}{FILE}"), what, program, shared=False):
        if (target / FILE).exists():
            with _hold(Path(target, FILE), what, program, shared=False):
                pass
        yield


@contextlib.contextmanager
def _hold(file: Path, what: str, program: str, shared: bool) -> Iterator[None]:
    """Hold the lock `file`; `what` is the option and its value, for messages."""
    lock = Lock(file, what, program, shared=shared)
    while not lock.take():
        time.sleep(0.05)
    try:
        with interrupts.at_end(lambda *_: lock.release()):
            yield
    finally:
        lock.release()


class Lock:
    """A lock that its caller asks for again and again, without waiting.

    A process that inherits its open file holds it too, as far as the kernel locks files.

    Args:
        what: the option and its value, for messages.
        grace, silent: seconds in place of `GRACE` and `SILENT`.
    """

    def __init__(
        self, file: Path, what: str, program: str, *, shared: bool = False,
        grace: float | None = None, silent: float | None = None,
    ):  # fmt: skip
        self._file, self._program, self._shared = file, program, shared
        self._watch = _StaleCheck(file, what, grace, silent)
        self._over, self._beat = threading.Event(), threading.Thread()
        self.handle = -1  # of the open file, while it is held

    def take(self) -> bool:
        """Take it if it is free; return False if it is not known yet whether its holder lives.

        Raises:
            LockedError: another process has it.
            WriteError: it cannot be written.
        """
        try:
            self.handle = _acquire(self._file, self._watch, self._program, self._shared)
        except OSError as error:
            raise write_error(self._file, error) from error
        if self.handle < 0:
            return False
        _handles.add(self.handle)
        self._over = threading.Event()
        self._beat = threading.Thread(target=_beat, args=(self.handle, self._over), daemon=True)
        self._beat.start()
        return True

    def is_mine(self) -> bool:
        """Whether it is still held: a process that stood still may have been taken for dead."""
        return self.handle >= 0 and _is_at(self.handle, self._file)

    def release(self) -> None:
        """Give it back, if it is held."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            self._over.set()
            self._beat.join(1.0)  # a network file system may hang
            _handles.discard(handle)
            _release(handle, self._file, self._shared)


def _beat(handle: int, over: threading.Event) -> None:
    """Touch the lock every `BEAT` seconds until `over` is set."""
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(handle)


_handles: set[int] = set()  # open files of the locks of this process


def _close_in_child() -> None:
    """Close the locks in a forked child, which would hold them beyond its parent's end."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _acquire(file: Path, watch: _StaleCheck, program: str, shared: bool) -> int:
    """Return the open file, locked and with this process's name in it; -1 if it is not known."""
    file.parent.mkdir(parents=True, exist_ok=True)  # the last holder may have removed it
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        alone = _flock(handle, fcntl.LOCK_EX)
        together = shared and alone is not True and _joins(handle, alone)
        if not _is_at(handle, file):
            pass  # the last holder has removed this file: try again
        elif together or (alone is not False and watch.is_free(handle, locked=bool(alone))):
            try:
                _write(handle, program, shared, append=together)
            except OSError:
                if not together:
                    file.unlink(missing_ok=True)
                raise
            if not shared or together or _flock(handle, fcntl.LOCK_SH) is not False:
                found, handle = handle, -1
                return found
        elif alone is False and watch.is_dead(handle):
            file.unlink(missing_ok=True)
    finally:
        if handle >= 0:
            os.close(handle)
    return -1


class _StaleCheck:
    """The check whether a lock has a living holder or was left behind.

    The caller repeats the checks until they decide. They raise LockedError for a living holder.
    """

    def __init__(self, file: Path, what: str, grace: float | None, silent: float | None):
        self._file, self._what, self._grace, self._silent = file, what, grace, silent
        self._seen: tuple[bytes, int] | None = None  # the file's content and time of change
        self._since = time.monotonic()  # the time from which it has been so
        self._announced = False

    def is_free(self, handle: int, *, locked: bool) -> bool:
        """Whether a lock may be taken that flock shows as free, or cannot show, on this machine."""
        holder = lock_holder.read(handle)
        if holder is None:
            return True
        if holder.here:
            # flock is reliable among processes of one machine.
            return locked or not lock_holder.is_running(holder) or self._refuse(holder)
        return self._silent_for(handle, holder, self._silent or 2.5 * BEAT)

    def is_dead(self, handle: int) -> bool:
        """Whether a locked file belongs to a machine that is gone."""
        holder = lock_holder.read(handle)
        if holder is not None and not holder.here:
            return self._silent_for(handle, holder, self._silent or SILENT)
        if time.monotonic() - self._since > (GRACE if self._grace is None else self._grace):
            self._refuse(holder)
        return False

    def _silent_for(self, handle: int, holder: Holder, seconds: float) -> bool:
        """Whether another machine has not touched the file for `seconds` by this one's clock."""
        looks = os.pread(handle, 4096, 0), os.fstat(handle).st_mtime_ns
        if self._seen != looks:
            touched = self._seen is not None
            self._seen, self._since = looks, time.monotonic()
            if touched:
                self._refuse(holder)
        if not self._announced:
            self._announced = True
            print(f"{self._file} is of {holder}: seeing whether it lives", file=sys.stderr)
        return time.monotonic() - self._since > seconds

    def _refuse(self, holder: Holder | None) -> bool:
        option = self._what.partition("=")[0]
        raise LockedError(
            f"{self._what}: another process is writing there ({holder or 'not known'}), and two at "
            f"once would spoil one another's files. Wait until it ends, stop it, or give another "
            f"{option} ({self._file} is its lock)",
            holder,
        )


def _flock(handle: int, kind: int) -> bool | None:
    """Whether the lock was taken, without waiting; None where files cannot be locked."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
    return True


def _joins(handle: int, alone: bool | None) -> bool:
    """Whether this process may share the lock of others; `alone` is the result of `_flock`."""
    if alone is None:
        holder = lock_holder.read(handle)
        return holder is not None and holder.shared
    return bool(_flock(handle, fcntl.LOCK_SH))


def _is_at(handle: int, file: Path) -> bool:
    """Whether an open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _write(handle: int, program: str, shared: bool, *, append: bool) -> None:
    """Write this process as holder into the lock, beside other holders with `append`."""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    machine, began = lock_holder.machine(), lock_holder.began(pid)
    holder = Holder(program, pid, socket.gethostname(), since, machine, began, shared)
    if not append:
        os.ftruncate(handle, 0)
    text = json.dumps(dataclasses.asdict(holder)) + "\n"
    os.pwrite(handle, text.encode(), os.fstat(handle).st_size)
    os.fsync(handle)  # for other machines, which see an open file as it was last sent


def _release(handle: int, file: Path, shared: bool) -> None:
    """Release the lock, and remove its file unless other processes share it."""
    with contextlib.suppress(OSError):
        if _is_at(handle, file) and (not shared or _flock(handle, fcntl.LOCK_EX)):
            file.unlink()
    os.close(handle)
