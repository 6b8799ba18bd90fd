"""Mistakes of input, as against bugs: shown as one message with its remedy, without a traceback."""

from __future__ import annotations

import errno
import os
import sys


class UserError(ValueError):
    """Something the user can mend; the message names it, the value, and the remedy."""


class WriteError(OSError, UserError):
    """A file or folder that cannot be written; the message names it, the cause and the remedy."""


_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "your quota on that disk is used up: make room there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "that disk is read-only: write to another",
    errno.EACCES: "write to a folder that is yours, or change its rights",
    errno.EPERM: "write to a folder that is yours, or change its rights",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EIO: "the disk may be failing: write to another",
    errno.ESTALE: "a network disk has lost it: look whether it is mounted",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
_AGAIN = ", and run the same command again"


def system_error(error: BaseException) -> int | None:
    """The number of the system's error behind an error, as errno.ENOSPC, if it is one of a disk.

    Libraries wrap what the system said, or only quote it.
    """
    found: BaseException | None = error
    while found is not None:
        code = found.errno if isinstance(found, OSError) else None
        for number in _REMEDIES:
            if code == number or (code is None and os.strerror(number) in str(found)):
                return number
        found = found.__cause__ or found.__context__
    return None


def cause_of(error: BaseException) -> tuple[str, str]:
    """The words of the system for an error, and what helps."""
    number = system_error(error)
    if number is not None:
        return os.strerror(number), _REMEDIES[number] + _AGAIN
    text = getattr(error, "strerror", None) or str(error).strip()[:500] or type(error).__name__
    return text, "is the disk full or read-only?"


def write_error(path: object, error: BaseException) -> WriteError:
    """The error of a file or folder that could not be written."""
    return WriteError(f"{path} cannot be written: {'; '.join(cause_of(error))}")


def explain(error: BaseException) -> int:
    """Print the message and give the exit code for wrong input, and for what cannot be written."""
    print(f"error: {describe(error)}", file=sys.stderr)
    return 2


def describe(error: BaseException) -> str:
    """The message of an error; with the remedy where the system's own has none."""
    if isinstance(error, UserError) or not isinstance(error, OSError):
        return str(error)
    if system_error(error) is None:
        return str(error)
    return f"{error.filename or 'a file'}: {'; '.join(cause_of(error))}"
