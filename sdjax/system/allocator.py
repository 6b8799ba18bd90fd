"""Large pages for large arrays, which make a training step on a CPU faster.

A step takes some hundreds of megabytes from the system and gives them back, every time. The system
provides them page by page. Adding one to an array of 64 MiB takes 24 ms, of which 18 are spent on
16,384 pages of 4 KiB; with pages of 2 MiB it takes 6 ms. Linux gives large pages to programs that
ask for them. glibc asks (from 2.35) if an environment variable says so when the program starts.
"""

from __future__ import annotations

import glob
import os
import platform
import signal
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
# Marks the second start. A Python with privileges of its own loses GLIBC_TUNABLES, and would start
# again for ever.
STARTED = "SDJAX_STARTED_AGAIN"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Devices of NVIDIA and AMD GPUs and of TPUs. With one of them, arrays are not in the host's memory.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def use_large_pages() -> None:
    """Start this program again with the variable set, in the same process.

    A program calls this before anything else. The function returns where large pages would change
    nothing or are not wanted: on other systems, where all programs or none get large pages, where
    `GLIBC_TUNABLES` sets them already, beside an accelerator, and under a debugger.
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
    # Python answers Ctrl-C with a traceback until a handler is installed. The signal waits for
    # that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _would_help() -> bool:
    """Whether large pages would make this program faster."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    if not _PAGES.is_file() or "[madvise]" not in _PAGES.read_text():
        return False
    only_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return only_cpu or not any(glob.glob(pattern) for pattern in _ACCELERATORS)
