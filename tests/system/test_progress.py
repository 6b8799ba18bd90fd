"""What is shown of work: nothing of short work, lines or a bar of long work, never on stdout."""

import io
import os
import pty
import re
import sys
import threading

import numpy as np
import pytest

from sdjax.models import weights
from sdjax.system import progress
from sdjax.system.progress import duration


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.fixture
def eager(monkeypatch):
    """All work counts as long."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "LINES", (0.005, 0.005))


class Err(io.StringIO):
    """A standard error that can be read while it is written, and is a terminal or none."""

    terminal = False

    def isatty(self):
        return self.terminal

    def wait_for(self, text):
        """Until the text has been written."""
        for _ in range(2000):
            if text in self.getvalue():
                return
            threading.Event().wait(0.005)
        raise AssertionError(f"{text!r} is not in {self.getvalue()!r}")


def standard_error(monkeypatch):
    """Put an `Err` in the place of standard error; within a test, for pytest sets its own first."""
    made = Err()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_short_work_prints_nothing(capfd):
    with progress.shown(), progress.work("drawing", 3, unit="pictures") as work:
        work.advance(3)
    assert capfd.readouterr() == ("", "")


def test_work_outside_of_a_verb_prints_nothing(capfd, eager):
    with progress.work("drawing", 3) as work:
        threading.Event().wait(0.05)
        work.advance()
    with progress.shown(False), progress.work("drawing", 3):
        threading.Event().wait(0.05)
    assert capfd.readouterr() == ("", "")


def test_long_work_without_a_terminal_prints_plain_lines_on_stderr(capsys, monkeypatch, eager):
    err = standard_error(monkeypatch)
    with progress.shown(), progress.work("drawing", 64, unit="pictures") as work:
        err.wait_for("drawing: 0 of 64 pictures, 0:00 so far\n")
        work.advance(16)
        work.advance(16)
        print("a result")
        err.wait_for("drawing: 32 of 64 pictures, 0:00 left\n")
        work.advance(32)
    lines = err.getvalue().splitlines()
    assert re.fullmatch(r"drawing: 64 pictures in 0:\d\d", lines[-1])
    assert "\x1b" not in err.getvalue() and "\r" not in err.getvalue()
    assert capsys.readouterr().out == "a result\n"


def test_a_terminal_gets_a_bar_with_the_rest_and_stdout_stays_plain(capsys, monkeypatch, eager):
    main, side = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    shown = ""
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.shown(), progress.work("drawing [v2]", 64, unit="pictures") as work:
            work.advance(16)
            work.advance(16)
            print("a result")
            while "32 of 64 pictures" not in shown:
                shown += os.read(main, 4096).decode()
        while "64 of 64 pictures" not in shown:
            shown += os.read(main, 4096).decode()
        monkeypatch.undo()
    os.close(main)
    assert "drawing [v2]" in shown and "left" in shown and "\x1b" in shown
    assert capsys.readouterr().out == "a result\n"


def test_a_dumb_terminal_gets_lines(monkeypatch):
    err = standard_error(monkeypatch)
    err.terminal = True
    monkeypatch.setenv("TERM", "dumb")
    assert not progress._on_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert progress._on_terminal()


def test_the_rest_is_estimated_without_the_compilation_of_the_first_batch(clock):
    work = progress.Work("drawing", 100, "pictures", None)
    assert work.left() is None and work.line() == "drawing: 0 of 100 pictures, 0:00 so far"
    clock.now += 60  # compiles, and draws the first ten
    work.advance(10)
    assert work.left() == 60 * 9
    clock.now += 5
    work.advance(10)
    assert work.left() == 8 * 5
    assert work.line() == "drawing: 20 of 100 pictures, 0:40 left"
    clock.now += 40
    work.advance(80)
    assert work.left() is None  # what is left is not what was counted
    assert work.last_line() == "drawing: 100 pictures in 1:45"


def test_work_of_unknown_size_tells_its_time(clock):
    work = progress.Work("looking for duplicates", None, "", None)
    clock.now += 75
    assert work.line() == "looking for duplicates: 1:15 so far"
    assert work.last_line() == "looking for duplicates: took 1:15"


def test_a_poll_that_fails_is_no_answer_and_one_that_falls_back_is_none_either(clock):
    answers = iter([OSError("gone"), 3, 2])

    def poll():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    work = progress.Work("cleaning", 4, "", poll)
    seen = []
    for _ in range(3):
        work.look()
        work.look()  # within a second it is not asked again
        seen.append(work.amount())
        clock.now += 1
    assert seen == ["0 %", "75 %", "75 %"]


def test_only_the_outermost_work_is_shown(monkeypatch, eager):
    err = standard_error(monkeypatch)
    with progress.shown(), progress.work("outer", 2):
        for _ in progress.track(range(3), "inner"):
            err.wait_for("outer: 0 %")
    assert "inner" not in err.getvalue()


def test_an_error_ends_the_lines_without_a_word_of_success(monkeypatch, eager):
    err = standard_error(monkeypatch)
    with pytest.raises(ZeroDivisionError), progress.shown():
        with progress.work("drawing", 2, unit="pictures"):
            err.wait_for("drawing: 0 of 2")
            raise ZeroDivisionError
    assert " in 0:" not in err.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_closed_stderr_harms_no_work(monkeypatch, eager):
    err = standard_error(monkeypatch)
    err.close()
    with progress.shown(), progress.work("drawing", 2):
        threading.Event().wait(0.05)


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
def test_weights_are_written_and_read_with_every_byte_counted(tmp_path, monkeypatch):
    made = []
    plain = progress.Work.__init__
    monkeypatch.setattr(
        progress.Work, "__init__", lambda self, *args: made.append(self) or plain(self, *args)
    )
    file = tmp_path / "unet" / "a.safetensors"
    file.parent.mkdir()
    tensors = {f"t{n}": np.zeros((50, 1000), np.float32) for n in range(5)}
    weights.save_file(tensors, file)
    made[0].look()
    assert weights.load_file(file).keys() == tensors.keys()
    weights.load_file(file, wanted=lambda name: name == "t1")
    writing, reading, one = made
    assert writing.name == "writing unet/a.safetensors"
    assert writing.total == 10**6 and 10**6 <= writing.done < 1.1 * 10**6
    assert reading.name == "reading unet/a.safetensors"
    assert reading.done == reading.total == 250_000
    assert one.done == one.total == 50_000


@pytest.mark.parametrize(
    "seconds, text",
    [(5, "0:05"), (65, "1:05"), (3599.6, "1:00:00"), (3661, "1:01:01"), (90061, "1d 01:01:01")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
