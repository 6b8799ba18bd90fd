"""One writer a folder: who has it, who is told so, and what a dead process leaves behind."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from sdjax.system import lock_holder, locks
from sdjax.system.locks import Lock, LockedError, held, replacing

HOLD = """
import sys, time
from sdjax.system.locks import held
with held(sys.argv[1], "--output", "sdjax.other", shared="shared" in sys.argv):
    print("held", flush=True)
    {then}
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 0.2)


def other(folder, *options, then="time.sleep(60)"):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD.format(then=then), folder, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_is_refused_and_the_holder_named(tmp_path):
    folder = tmp_path / "new" / "x [v2]"
    process = other(folder)
    try:
        with pytest.raises(LockedError) as refused, held(folder, "--workdir", "sdjax.main"):
            pass
    finally:
        process.kill()
        process.wait()
    words = str(refused.value)
    assert f"--workdir={folder}" in words and "another --workdir" in words
    assert f"sdjax.other, process {process.pid} on {locks.socket.gethostname()}, since 20" in words


def test_what_sigkill_left_behind_locks_nothing(tmp_path):
    process = other(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / locks.FILE).read_text()
    with held(tmp_path, "--workdir", "sdjax.main"):
        assert f'"pid": {os.getpid()}' in (tmp_path / locks.FILE).read_text()
    assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_hold_on_to_it(tmp_path):
    fork = "child = os.fork() or time.sleep(60); print(child, flush=True); time.sleep(60)"
    process = other(tmp_path, then=f"import os; {fork}")
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        os.kill(child, 0)
        with held(tmp_path, "--workdir", "sdjax.main"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_is_waited_for_while_its_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 20)
    process = other(tmp_path, then="time.sleep(0.5)")
    with held(tmp_path, "--workdir", "sdjax.main"):
        assert process.wait(5) == 0


def test_workers_share_and_keep_others_out(tmp_path):
    def alone():
        return held(tmp_path, "--workdir", "sdjax.main")

    process = other(tmp_path, "shared")
    with held(tmp_path, "--workdir", "sdjax.sweep", shared=True):
        with pytest.raises(LockedError, match="sdjax.other"), alone():
            pass
        process.kill()
        process.wait()
        with pytest.raises(LockedError, match=f"sdjax.sweep, process {os.getpid()}"), alone():
            pass
    with alone(), pytest.raises(LockedError, match="sdjax.main"):
        with held(tmp_path, "--workdir", "sdjax.sweep", shared=True):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_below_has_a_lock_of_its_own(tmp_path):
    with held(tmp_path, "--workdir", "sdjax.sweep", shared=True):
        with held(tmp_path / "trials" / "0000", "--workdir", "sdjax.main"):
            pass


def test_a_folder_made_for_the_lock_goes_if_nothing_is_written(tmp_path):
    filled, there = tmp_path / "filled", tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "empty", filled, there):
        with held(folder, "--output", "sdjax.prepare"):
            if folder is filled:
                (folder / "a.png").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled", "there"]
    assert [path.name for path in filled.iterdir()] == ["a.png"]


def test_a_folder_that_goes_with_its_lock_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 20.0)
    process = other(tmp_path / "x", then="time.sleep(0.5)")
    with held(tmp_path / "x", "--output", "sdjax.prepare"):
        assert (tmp_path / "x" / locks.FILE).exists()
    assert process.wait() == 0


@pytest.mark.parametrize("kind", ["file.safetensors", "folder"])
def test_a_target_that_is_replaced_is_locked_beside_it(tmp_path, kind):
    with replacing(tmp_path / kind, "--output", "sdjax.convert"):
        assert not (tmp_path / kind).exists()
        with pytest.raises(LockedError, match="sdjax.convert"):
            with replacing(tmp_path / kind, "--output", "sdjax.convert"):
                pass
        with replacing(tmp_path / "another", "--output", "sdjax.convert"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_run_writes_is_not_replaced(tmp_path):
    with held(tmp_path / "run", "--workdir", "sdjax.main"):
        with pytest.raises(LockedError, match="sdjax.main"):
            with replacing(tmp_path / "run", "--output", "sdjax.convert"):
                pass


# ---- other machines --------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lock in `tmp_path` that a process of another machine has left."""
    monkeypatch.setattr(lock_holder, "machine", lambda: "another")
    handle = os.open(tmp_path / locks.FILE, os.O_RDWR | os.O_CREAT)
    locks._write(handle, "sdjax.main", False, append=False)
    monkeypatch.setattr(lock_holder, "machine", lambda: "this")
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "SILENT", 0.3)
    yield handle
    os.close(handle)


def no_flock(handle, kind):
    raise OSError(errno.ENOLCK, "No locks available")


def keep_touching(handle):
    code = f"import os, time\nwhile True: os.utime({handle}); time.sleep(0.02)"
    return subprocess.Popen([sys.executable, "-S", "-c", code], pass_fds=[handle])


@pytest.mark.parametrize("reach", ["flock", "this machine", "none"])
def test_a_lock_of_another_machine_counts_while_it_is_touched(
    elsewhere, tmp_path, monkeypatch, reach
):
    if reach == "flock":
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
    elif reach == "none":
        monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    process = keep_touching(elsewhere)
    monkeypatch.setattr(locks, "BEAT", 2)
    monkeypatch.setattr(locks, "SILENT", 5)
    try:
        with pytest.raises(LockedError, match="sdjax.main"):
            with held(tmp_path, "--workdir", "sdjax.main"):
                pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("reach", ["flock", "this machine", "none"])
def test_a_lock_of_a_machine_that_is_gone_is_taken_over(
    elsewhere, tmp_path, monkeypatch, reach, capsys
):
    if reach == "flock":
        fcntl.flock(elsewhere, fcntl.LOCK_EX)  # a server may keep it for a client that is gone
    elif reach == "none":
        monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    with held(tmp_path, "--workdir", "sdjax.main"):
        assert '"machine": "this"' in (tmp_path / locks.FILE).read_text()
    assert "seeing whether it lives" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with held(tmp_path, "--workdir", "sdjax.main"):
        file = tmp_path / locks.FILE
        before, deadline = file.stat().st_mtime_ns, time.monotonic() + 5
        while file.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime_ns > before


def test_without_flock_a_process_of_this_machine_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    with held(tmp_path / "sweep", "--workdir", "sdjax.sweep", shared=True):
        with held(tmp_path / "sweep", "--workdir", "sdjax.sweep", shared=True):
            pass
    with held(tmp_path, "--workdir", "sdjax.main"):
        with pytest.raises(LockedError), held(tmp_path, "--workdir", "sdjax.main"):
            pass
    process = other(tmp_path)
    process.kill()
    process.wait()
    with held(tmp_path, "--workdir", "sdjax.main"):
        pass


# ---- asked for again and again -----------------------------------------------------------------


def lock_in(folder, **options):
    return Lock(folder / locks.FILE, f"--workdir={folder}", "sdjax.sweep", grace=0.0, **options)


def test_a_lock_that_is_not_waited_for_names_its_holder_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 20)
    process = other(tmp_path)
    try:
        with pytest.raises(LockedError, match="sdjax.other") as refused:
            lock_in(tmp_path).take()
    finally:
        process.kill()
        process.wait()
    assert refused.value.holder.pid == process.pid and refused.value.holder.has_ended
    mine, theirs = lock_in(tmp_path), lock_in(tmp_path)
    assert mine.take() and mine.is_mine()
    with pytest.raises(LockedError) as refused:
        theirs.take()
    assert not refused.value.holder.has_ended
    mine.release()
    assert not mine.is_mine() and theirs.take()
    theirs.release()
    assert not list(tmp_path.iterdir())


def test_a_child_that_inherits_a_lock_holds_it_beyond_its_parents_end(tmp_path):
    code = (
        "import subprocess, sys, time; from pathlib import Path; from sdjax.system import locks\n"
        "lock = locks.Lock(Path(sys.argv[1]), '--workdir=x', 'sdjax.sweep')\n"
        "assert lock.take()\n"
        "sleep = [sys.executable, '-S', '-c', 'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(sleep, pass_fds=[lock.handle]).pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, tmp_path / locks.FILE]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    lock = lock_in(tmp_path)
    with pytest.raises(LockedError) as refused:
        lock.take()
    assert refused.value.holder.has_ended
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            assert lock.take()
            break
        except LockedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    lock.release()


def test_a_lock_that_another_took_over_is_not_given_back(tmp_path):
    mine, theirs = lock_in(tmp_path), lock_in(tmp_path)
    assert mine.take()
    (tmp_path / locks.FILE).unlink()  # as another machine does after a silence
    assert theirs.take()
    assert theirs.is_mine() and not mine.is_mine()
    mine.release()
    assert (tmp_path / locks.FILE).exists() and theirs.is_mine()
    theirs.release()


def test_a_holder_elsewhere_lives_while_it_touches_and_is_dead_when_it_stands_still(
    elsewhere, tmp_path, capsys
):
    lock = lock_in(tmp_path, silent=0.3)
    assert not lock.take()  # nobody knows yet
    for _ in range(2):
        os.utime(elsewhere)
        with pytest.raises(LockedError, match="sdjax.main"):
            lock.take()
        assert not lock.take()
    time.sleep(0.4)
    assert lock.take()
    assert capsys.readouterr().err.count("seeing whether it lives") == 1
    lock.release()


def test_without_flock_a_number_that_is_used_again_is_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    mine, theirs = lock_in(tmp_path), lock_in(tmp_path)
    assert mine.take()
    with pytest.raises(LockedError):
        theirs.take()
    content = json.loads((tmp_path / locks.FILE).read_text())
    (tmp_path / locks.FILE).write_text(json.dumps({**content, "began": "1"}))
    assert theirs.take()
    theirs.release()
    mine.release()


# ---- verbs -----------------------------------------------------------------------------------


def pictures(folder):
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a picture")
    return folder


def run_main(folder, tiny_config, capsys):
    from sdjax.config import resolve
    from sdjax.train import loop

    with pytest.raises(LockedError) as refused:
        loop.run(resolve(tiny_config), str(folder))
    return str(refused.value)


def run_sweep(folder, tiny_config, capsys):
    pytest.importorskip("optuna")
    from sdjax.sweeps.worker import work

    with pytest.raises(LockedError) as refused:
        work(SimpleNamespace(folder=folder), 1)
    return str(refused.value)


def run_prepare(folder, tiny_config, capsys):
    pytest.importorskip("apache_beam")
    from sdjax import prepare

    raw = pictures(folder.parent / "raw")
    assert prepare.main(["", f"--input={raw}", f"--output={folder}", "--workers=1"]) == 2
    return capsys.readouterr().err


def run_encode(folder, tiny_config, capsys):
    from sdjax import encode

    encode.FLAGS.unparse_flags()
    for name in encode.FLAGS:  # of tests before this one
        encode.FLAGS[name].unparse()
    options = ["--config=configs/base.py", f"--output={folder}"]
    assert encode.main(["", "--encode", *options]) == 2
    return capsys.readouterr().err


def run_sample(folder, tiny_config, capsys):
    from sdjax import sample

    assert sample.main(["--model=x", "--prompts=a", f"--output={folder}"]) == 2
    return capsys.readouterr().err


def run_evaluate(folder, tiny_config, capsys):
    from sdjax import evaluate

    options = [f"--images={folder.parent}", "--dataset=x", f"--output={folder}"]
    assert evaluate.main(options) == 2
    return capsys.readouterr().err


def run_convert(folder, tiny_config, capsys):
    from sdjax import convert

    model = folder.parent / "vae"
    model.mkdir()
    (model / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert convert.main([f"--input={model}", f"--output={folder}", "--force"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "run",
    [run_main, run_sweep, run_prepare, run_encode, run_sample, run_evaluate, run_convert],
    ids=lambda run: run.__name__,
)
def test_a_verb_keeps_out_of_a_folder_in_use(run, tmp_path, tiny_config, capsys):
    folder = tmp_path / "x"
    with held(folder, "--workdir", "sdjax.main"):
        words = run(folder, tiny_config, capsys)
    assert f"={folder}: another process is writing there (sdjax.main, process" in words
    assert "Traceback" not in words and not folder.exists(), "nothing was written"
