"""Ctrl-C and SIGTERM: one line and an exit code, wherever the main thread is; no child is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax.system.interrupts import StopSignal

BEGIN = """
import sys, time
from sdjax.system import interrupts
interrupts._PATIENCE = 0.2
interrupts.install("do that again", terminated=75)
"""
READY = "print('ready', flush=True)\n"
SLEEP = READY + "time.sleep(60)"
# Hashing leaves the lock of Python to others, and does not hear of signals, as a compiler.
COMPILER = "import hashlib\n" + READY + "hashlib.pbkdf2_hmac('sha256', b'x', b'x', 10**9)"
SWALLOWED = (  # as by the callbacks of C++ libraries
    "class Deaf:\n    def __del__(self):\n        " + READY + "        time.sleep(60)\n"
    "Deaf(); time.sleep(60)"
)
IN_AN_IMPORT = (
    "import absl.app\ndef main(argv):\n    " + READY + "    time.sleep(60)\nabsl.app.run(main)"
)


def start(code, *options):
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    """Exit code and what was printed, once nothing of its session is left."""
    out, err = process.communicate(timeout=20)
    deadline = time.monotonic() + 1  # multiprocessing's own helper ends a moment later
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(process.pid)
    return process.returncode, out, err


def alive(session):
    """Numbers of the processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            found += [stat.parent.name] if int(its) == session and state not in "ZX" else []
    return found


@pytest.mark.parametrize("code", [SLEEP, COMPILER, SWALLOWED, IN_AN_IMPORT])
@pytest.mark.parametrize(
    ("number", "exit_code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "stopped by SIGTERM")],
)
def test_a_signal_is_one_line_and_an_exit_code(code, number, exit_code, word):
    process = start(code)
    process.send_signal(number)
    assert ended(process) == (exit_code, "", f"{word}; do that again\n")


@pytest.mark.parametrize("wait", ["time.sleep(60)", COMPILER])
def test_what_is_half_written_is_removed(tmp_path, wait):
    code = f"""
from sdjax.system import locks, paths
with locks.held({str(tmp_path)!r}, "--output", "sdjax.sample"):
    with paths.writing({str(tmp_path / "x")!r}) as local:
        local.write_text("half")
        {{}}
"""
    process = start(code.format((READY + wait).replace("\n", "\n        ")))
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    assert not list(tmp_path.iterdir())


def test_children_are_stopped_also_such_that_ignore_it():
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess\n"
        f"one = subprocess.Popen([sys.executable, '-Sc', {stubborn!r}])\n"
        "two = subprocess.Popen(['sh', '-c', 'sleep 60 & wait'])\n"
        "time.sleep(0.3)\n"
    )
    process = start(code + SLEEP)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130


def test_a_signal_that_is_ignored_stays_ignored():
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c"]
    code = BEGIN + READY + "time.sleep(0.5); print('done')"
    process = subprocess.Popen([*command, code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "done\n" and process.returncode == 0


STOPS = """
with interrupts.StopSignal() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(1)  # longer than the patience with one that does not hear
print("saved")
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_only_asks_is_not_hurried(number):
    process = start(STOPS)
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    if number == signal.SIGTERM:  # as schedulers repeat it
        process.send_signal(number)
    assert ended(process) == (75, "saved\n", "")


def test_the_second_ctrl_c_while_saving_interrupts():
    process = start(STOPS)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "interrupted; do that again\n")


def test_stop_signal_without_install_interrupts_the_second_time():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


def test_children_that_are_to_ignore_ctrl_c_do_and_this_process_does_not():
    child = "import time; time.sleep(1); print(1)"
    code = f"""
import multiprocessing, subprocess
with interrupts.ignored_by_children():
    one = subprocess.Popen([sys.executable, "-Sc", {child!r}], stdout=subprocess.PIPE)
with interrupts.StopSignal() as stop:
    print("ready", flush=True)
    time.sleep(0.3)
    print(stop.asked, one.communicate()[0], flush=True)
"""
    process = start(code)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert ended(process) == (0, "True b'1\\n'\n", "")


def test_a_worker_ends_after_its_parent_was_killed():
    code = """
import multiprocessing
from sdjax.system.interrupts import end_with_parent
def work():
    end_with_parent()
    print("ready", flush=True)
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(60)
"""
    process = start(code)
    assert len(alive(process.pid)) >= 2
    process.kill()
    process.communicate(timeout=20)  # until the worker has closed its end, too
    assert not alive(process.pid)
