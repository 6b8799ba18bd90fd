"""Large pages for large arrays: what a training step on a CPU waits for more than one would think.

A step takes some hundreds of megabytes from the system and gives them back, every time, and the
system provides them page by page: adding one to an array of 64 MiB takes 24 ms so, of which 18 are
spent on 16,384 pages of 4 KiB. With pages of 2 MiB it takes 6 ms. Linux gives those to programs
that ask for them; glibc asks (from 2.35) if a variable says so when the program starts.
"""

from __future__ import annotations

import glob
import os
import platform
import signal
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
# Set beside it: a Python with privileges of its own loses GLIBC_TUNABLES, and would start for ever.
STARTED = "SDJAX_STARTED_AGAIN"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Of NVIDIA and AMD GPUs and of TPUs: where there is one, the arrays are not in the host's memory.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def use_large_pages() -> None:
    """Start this program again, as it was started, with the variable set; the process stays.

    To be called first thing, by programs. Returns where that would change nothing or is not wanted:
    on other systems, where all programs or none get large pages, where `GLIBC_TUNABLES` has its
    word on it already, beside an accelerator, and under a debugger.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if STARTED in os.environ:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if TUNABLE in tunables or STARTED in os.environ or sys.gettrace() is not None:
        return
    if not _would_help():
        return
    os.environ[STARTED] = "1"
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    # Python answers Ctrl-C with a traceback until it is told another answer; it waits until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _would_help() -> bool:
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    if not _PAGES.is_file() or "[madvise]" not in _PAGES.read_text():
        return False
    only_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return only_cpu or not any(glob.glob(pattern) for pattern in _ACCELERATORS)
