"""launch/tpu_vm.sh against a stand-in for gcloud: a cloud of folders, whose workers run bash."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = [shutil.which("bash"), str(ROOT / "launch" / "tpu_vm.sh")]
RUN = ("--config=configs/base.py", "--workdir=gs://bucket/run", '--config.data.path=a "b" c')

# `state` is the queued resource's; it moves on when asked. A worker is a home folder in nodes/.
GCLOUD = """#!PYTHON
import json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path(os.environ["CLOUD"])
words = [w for w in sys.argv[1:] if not w.startswith("--")]
flags = dict((w[2:].split("=", 1) + [""])[:2] for w in sys.argv[1:] if w.startswith("--"))
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
state, nodes = cloud / "state", cloud / "nodes"
now = state.read_text() if state.exists() else None
assert words[:2] == ["compute", "tpus"] and flags["zone"] == "us-east5-a", sys.argv
what, verb, name = words[2:5]
if (what, verb) == ("queued-resources", "create"):
    assert now is None, "ALREADY_EXISTS"
    state.write_text("WAITING_FOR_RESOURCES")
    count = int(flags.get("node-count", 0))
    names = [f"{flags['node-prefix']}-{i}" for i in range(count)] or [flags["node-id"]]
    (cloud / "names").write_text(" ".join(names))
elif (what, verb) == ("queued-resources", "describe"):
    if now is None:
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    print(now)
    if now == "WAITING_FOR_RESOURCES":
        state.write_text("ACTIVE")
        for node in (cloud / "names").read_text().split():
            for worker in "01":
                (nodes / node / worker).mkdir(parents=True)
elif (what, verb) == ("queued-resources", "delete"):
    assert now is not None and "force" in flags, "FAILED_PRECONDITION"
    shutil.rmtree(nodes, ignore_errors=True)
    state.unlink()
elif (what, verb) == ("tpu-vm", "describe"):
    print("READY" if (nodes / name).exists() else "PREEMPTED")
elif (what, verb) == ("tpu-vm", "scp"):
    for home in (nodes / words[5].rstrip(":")).iterdir():
        shutil.copy(words[4], home)
elif (what, verb) == ("tpu-vm", "ssh"):
    if not (nodes / name).exists():
        sys.exit("ERROR: Failed to connect")
    homes = sorted((nodes / name).iterdir())
    homes = homes if flags["worker"] == "all" else [homes[int(flags["worker"])]]
    codes = []
    for home in homes:
        env = {**os.environ, "HOME": str(home), "WORKER": f"{name}/{home.name}"}
        codes.append(subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=env).returncode)
    sys.exit(max(codes))
else:
    sys.exit(f"unknown command {sys.argv}")
"""

GIT = """#!/usr/bin/env bash
for word in "$@"; do
  case $word in --output=*) tar czf "${word#*=}" -C ROOT pyproject.toml configs ;; esac
done
"""
CURL = """#!/usr/bin/env bash
echo 'mkdir -p .local/bin; cp "$CLOUD/uv" .local/bin/uv'
"""
# As uv makes a virtual environment and installs; the interpreter in it is the stand-in below.
UV = """#!/usr/bin/env bash
case $1 in
  venv) mkdir -p .venv/bin; cp "$CLOUD/python" .venv/bin/python ;;
  pip) [ -f pyproject.toml ] && [[ "$*" == *" -e .[tpu]" ]] ;;
esac
"""
# What a run does is in the file `behave`; $run is the number of the run on this worker.
PYTHON = """#!/usr/bin/env bash
printf '%s|' "$WORKER" "$@" >>"$CLOUD/runs"; echo >>"$CLOUD/runs"
run=$(grep -c "^$WORKER|" "$CLOUD/runs")
trap 'exit 75' TERM
echo "hello of $WORKER"
. "$CLOUD/behave"
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    folder = tmp_path / "cloud"
    folder.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    for file, text in (
        (programs / "gcloud", GCLOUD.replace("PYTHON", sys.executable)),
        (programs / "git", GIT.replace("ROOT", shlex.quote(str(ROOT)))),
        (programs / "curl", CURL),
        (folder / "uv", UV),
        (folder / "python", PYTHON),
    ):
        file.write_text(text)
        file.chmod(0o755)
    (folder / "behave").write_text("exit 0")
    settings = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CLOUD": str(folder),
        "NAME": "sd",
        "ZONE": "us-east5-a",
        "ACCELERATOR": "v5p-16",
        "POLL": "0.05",
        "CLOUDSDK_CONFIG": str(tmp_path / "no-account"),
    }
    for name in (
        "DRY_RUN",
        "PROJECT",
        "SPOT",
        "RESERVED",
        "SLICES",
        "RUNTIME",
        "SHARED_WORKDIR",
        "SETUP",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield folder
    (folder / "behave").write_text("exit 0")
    for pid in folder.rglob("sdjax.pid"):  # what a failed test left running
        if not pid.with_name("sdjax.exit").exists():
            subprocess.run(["kill", "-KILL", pid.read_text().strip()], stderr=subprocess.DEVNULL)


def tpu_vm(*arguments, **environment):
    return subprocess.run(
        [*SCRIPT, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def calls(cloud):
    """The calls that change something, each as (verb, object, flags)."""
    found = []
    for line in (cloud / "calls").read_text().splitlines():
        words = json.loads(line)
        command = next((w for w in words if w.startswith("--command=")), "")
        if words[3] != "describe" and "sdjax:running" not in command:
            found.append((words[3], words[4], words[5:]))
    return found


def verbs(cloud):
    """create, scp, install, run, delete ... in the order they came."""
    names = []
    for verb, _, flags in calls(cloud):
        if verb == "ssh":
            verb = "install" if any("uv venv" in flag for flag in flags) else "run"
        names.append(verb)
    return names


def runs(cloud):
    path = cloud / "runs"
    return [line.rstrip("|").split("|") for line in path.read_text().splitlines()]


def until(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_dry_run_prints_the_commands_in_order_and_runs_none(cloud):
    run = tpu_vm("watch", *RUN, DRY_RUN="1", SPOT="1", PROJECT="p")
    assert run.returncode == 0, run.stderr
    lines = [
        shlex.split(re.sub(r"^(#|launch/).*$", "", command, flags=re.M))
        for command in re.split(r"^\+ ", run.stderr, flags=re.M)[1:]
    ]
    assert [line[4] for line in lines if line[4] != "describe"] == [
        "create", "scp", "ssh", "ssh", "ssh", "delete"]  # fmt: skip
    assert all(line[:3] == ["gcloud", "compute", "tpus"] for line in lines)
    assert all({"--zone=us-east5-a", "--project=p"} <= set(line) for line in lines)
    assert set(lines[0][5:]) >= {
        "sd", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--node-id=sd",
        "--spot"}  # fmt: skip
    assert not (cloud / "calls").exists()


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_each_accelerator_has_its_runtime(cloud, accelerator, runtime):
    run = tpu_vm("create", ACCELERATOR=accelerator, DRY_RUN="1")
    assert f"--runtime-version={runtime} " in run.stderr


def test_watch_installs_runs_and_ends_with_the_run(cloud):
    (cloud / "behave").write_text("exit 0")
    run = tpu_vm("watch", *RUN, SETUP='echo "$WORKER" >>"$CLOUD/set_up"')
    assert run.returncode == 0, run.stderr
    assert verbs(cloud) == ["create", "scp", "install", "run"]
    assert (cloud / "set_up").read_text().split() == ["sd/0", "sd/1"]
    assert "tpu_vm.sh delete" in run.stderr  # it still costs
    assert sorted(call[0] for call in runs(cloud)) == ["sd/0", "sd/1"]
    for call in runs(cloud):
        assert call[1:] == ["-u", "-m", "sdjax.main", "--cluster=tpu", *RUN]


@pytest.mark.parametrize("code", [2, 3])
def test_watch_ends_with_a_mistake(cloud, code):
    (cloud / "behave").write_text(f"[ $WORKER = sd/1 ] && exit {code}; exit 76")
    assert tpu_vm("watch", *RUN).returncode == code
    assert verbs(cloud) == ["create", "scp", "install", "run"]


def test_watch_runs_again_what_was_interrupted(cloud):
    (cloud / "behave").write_text(
        "[ $run = 1 ] && exit 75; [ $run = 2 ] && exit 76; [ $run = 3 ] && kill -KILL $$; exit 0"
    )
    assert tpu_vm("watch", *RUN).returncode == 0
    assert verbs(cloud) == ["create", "scp", "install", "run", "run", "run", "run"]


def test_watch_gives_up_after_so_many_restarts(cloud):
    (cloud / "behave").write_text("exit 76")
    run = tpu_vm("watch", *RUN, MAX_RESTARTS="2")
    assert run.returncode == 76 and "giving up" in run.stderr
    assert verbs(cloud).count("run") == 3


@pytest.mark.parametrize("how", ["SUSPENDED", "PREEMPTED"])
def test_watch_makes_a_preempted_slice_anew_and_goes_on(cloud, how):
    """The queued resource says SUSPENDED; or still ACTIVE, while its machine is PREEMPTED."""
    # The first run goes on until its machine is gone.
    (cloud / "behave").write_text(
        'while [ $run = 1 ]; do [ -d "$HOME" ] || exit 1; sleep 0.1; done'
    )
    process = subprocess.Popen([*SCRIPT, "watch", *RUN], stderr=subprocess.PIPE, text=True)
    until(lambda: (cloud / "runs").exists() and len(runs(cloud)) == 2)
    if how == "SUSPENDED":
        (cloud / "state").write_text("SUSPENDED")
    (cloud / "nodes").rename(cloud / "gone")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "preempted" in errors
    assert verbs(cloud) == ["create", "scp", "install", "run", "delete"] + [
        "create", "scp", "install", "run"]  # fmt: skip


def test_watch_from_elsewhere_finds_the_run(cloud):
    """Ending watch does not end the run, and a second one neither installs nor starts again."""
    (cloud / "behave").write_text('while [ ! -e "$CLOUD/end" ]; do sleep 0.1; done')
    first = subprocess.Popen([*SCRIPT, "watch", *RUN], stderr=subprocess.DEVNULL)
    until(lambda: (cloud / "runs").exists() and len(runs(cloud)) == 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert tpu_vm("run", *RUN).returncode != 0  # already running
    second = subprocess.Popen([*SCRIPT, "watch", *RUN], stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    assert second.poll() is None
    (cloud / "end").touch()
    assert second.wait(timeout=60) == 0
    assert len(runs(cloud)) == 2


def test_several_slices_by_hand(cloud):
    (cloud / "behave").write_text("while :; do sleep 0.1; done")
    for step in (["create"], ["wait"], ["install"], ["run", *RUN]):
        run = tpu_vm(*step, SLICES="2")
        assert run.returncode == 0, run.stderr
    until(lambda: (cloud / "runs").exists() and len(runs(cloud)) == 4)
    assert sorted(call[0] for call in runs(cloud)) == ["sd-0/0", "sd-0/1", "sd-1/0", "sd-1/1"]
    _, _, flags = calls(cloud)[0]
    assert {"--node-count=2", "--node-prefix=sd"} <= set(flags)
    assert tpu_vm("status", SLICES="2").stdout.count("sdjax:running") == 4
    time.sleep(0.3)  # the stand-in sets its trap after it has written down its call
    assert tpu_vm("stop", SLICES="2").returncode == 0
    until(lambda: tpu_vm("status", SLICES="2").stdout.count("sdjax:exit:75") == 4)
    assert tpu_vm("delete").returncode == 0 and not (cloud / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ([], {}, "usage"),
        (["fly"], {}, "usage"),
        (["create"], {"NAME": ""}, "NAME is not set"),
        (["create"], {"ZONE": ""}, "ZONE is not set"),
        (["create"], {"ACCELERATOR": ""}, "ACCELERATOR is not set"),
        (["create"], {"ACCELERATOR": "h100"}, "set RUNTIME"),
        (["create"], {"NAME": "a run"}, "NAME is 'a run'; expected lower-case letters"),
        (["delete"], {"NAME": "--all"}, "NAME is '--all'"),
        (["create"], {"ZONE": "us east"}, "ZONE is 'us east'"),
        (["create"], {"SLICES": "a[$(id)]"}, "SLICES is 'a[$(id)]'; expected a whole number"),
        (["create"], {"SLICES": "0"}, "SLICES is '0'; expected at least 1"),
        (["watch"], {"POLL": "soon"}, "POLL is 'soon'; expected seconds"),
        (["watch", "--config=x", "--workdir=runs/x"], {}, "gs://"),
    ],
)
def test_mistakes_are_named(cloud, arguments, settings, words):
    run = tpu_vm(*arguments, **settings)
    assert run.returncode == 2 and words in run.stderr
    assert not (cloud / "calls").exists()


def test_a_failed_request_says_where_to_look(cloud):
    (cloud / "state").write_text("FAILED")
    run = tpu_vm("watch", *RUN)
    assert run.returncode == 2 and re.search("describe sd .*says why", run.stderr, re.S)
