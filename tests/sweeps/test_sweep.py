"""Sweeps over a fake main: what is tried, given up, recorded, resumed and shared."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sdjax import sweep as verb
from sdjax.config import Config, resolve, to_dict
from sdjax.errors import UserError
from sdjax.models.config import ConfigError
from sdjax.recipes import recipe
from sdjax.sweeps import ranking, runs
from sdjax.sweeps.space import changed
from sdjax.sweeps.study import begin_trial, open_study
from sdjax.sweeps.worker import Stopped, work
from sdjax.system import lock_holder, locks
from tests.odd_names import ODD
from tests.sweeps.fake_sweep import COMMAND, ROOT, SPACE, base, make


def run(sweep, trials, tell=lambda line: None):
    return work(sweep, trials, tell=tell, command=COMMAND, poll=0.02)


def outcome(study):
    """What must not depend on interruptions: values, curves, states."""
    return [(t.params, t.intermediate_values, t.state, t.value) for t in study.get_trials()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    sweep = make(tmp_path_factory.mktemp("sweep") / ODD)
    return sweep, run(sweep, 8)


def test_a_sweep_ranks_and_writes_the_best_recipe(unbroken):
    sweep, study = unbroken
    found = json.loads((sweep.folder / "sweep.json").read_text())
    values = [found["trials"][number]["value"] for number in found["ranking"]]
    assert len(values) == 8 and values == sorted(values)
    best = found["best"]
    assert best["number"] == found["ranking"][0] and best["step"] == 30
    assert best["fields"]["ema.profiles"][0] == "warmup-0.9999"
    shares = found["importances"]
    assert shares.keys() == set(sweep.space.fields) and sum(shares.values()) == pytest.approx(1)
    (command,) = re.findall("    (python .*)", (sweep.folder / "best.py").read_text())
    assert f"--config={sweep.folder / 'best.py'}" in shlex.split(command)
    assert "[v2]" in verb_output(sweep, study)  # the folder's, not taken for a style
    made = {}
    exec((sweep.folder / "best.py").read_text(), made)
    config = resolve(made["get_config"]())
    assert config == changed(sweep.base, best["fields"]) == ranking.best_config(sweep, study)
    assert config.data.batch_size == best["fields"]["data.batch_size"] and config != sweep.base
    own = {}
    exec((Path(best["workdir"]) / "recipe.py").read_text(), own)
    assert resolve(own["get_config"]()) == config
    assert not list((sweep.folder / "trials").glob("*.lock"))


def test_importances_find_the_field_that_counts():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        trial.suggest_float("b", 0, 1), trial.suggest_categorical("c", ["x", "y"])
        return (trial.suggest_float("a", 0, 1) - 0.4) ** 2

    study.optimize(objective, 3)
    assert ranking.importances(study) == {}  # too few to tell
    study.optimize(objective, 60)
    shares = ranking.importances(study)
    assert shares["a"] > 0.8 and sum(shares.values()) == pytest.approx(1)


def test_one_worker_suggests_the_same_again_and_more_can_be_had(unbroken, tmp_path):
    sweep, study = unbroken
    again = make(tmp_path)
    assert outcome(run(again, 3)) == outcome(study)[:3]
    assert outcome(run(again, 8)) == outcome(study)
    assert len({t.params["optim.learning_rate"] for t in study.trials}) == 8


def test_a_killed_sweep_goes_on_to_the_same_ranking(unbroken, tmp_path, monkeypatch):
    sweep, study = unbroken
    make(tmp_path)
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    process = start(tmp_path, 8)
    starts = wait_for(tmp_path / "trials/0001/metrics.jsonl").with_name("starts")
    time.sleep(0.1)  # it reports the value now; a lock that it died with would hold for 30 s
    process.kill()
    process.wait()
    with open(tmp_path / "journal.log", "ab") as journal:
        journal.write(b'{"op_code": 5, "wor')  # as a machine that lost power leaves it
    # The run still saves, mostly, and must be waited for.
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert outcome(run(make(tmp_path), 8)) == outcome(study)
    assert (tmp_path / "trials/0001/saved").exists()  # told to stop when the sweep died
    assert len(starts.read_text().splitlines()) == 2
    assert starts.read_text().splitlines()[1].split()[1] != "0"  # it went on, not from the start


def test_a_signal_stops_the_run_and_the_same_call_goes_on(unbroken, tmp_path, monkeypatch):
    sweep, study = unbroken
    again = make(tmp_path)
    monkeypatch.setenv("FAKE_SECONDS", "0.1")

    def tell(line):
        if "trial 1: step 10" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(again, 8, tell)
    assert (tmp_path / "trials/0001/saved").exists()
    assert not list((tmp_path / "trials").glob("*.lock"))
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert outcome(run(again, 8)) == outcome(study)


def test_hopeless_trials_are_stopped(tmp_path, monkeypatch):
    space = """
        fields: {optim.learning_rate: {low: 1e-6, high: 1, log: true}}
        pruner: {name: median, startup_trials: 2}
        sampler: {name: random, seed: 3}
    """
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    config = base(steps=100)
    sweep = make(tmp_path, space, config)
    study = run(sweep, 8)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert pruned and study.trials[0].state == study.trials[1].state == TrialState.COMPLETE
    for trial in pruned:
        assert len(trial.intermediate_values) == 1  # falls behind at once, and stays
        assert (sweep.trial_folder(trial.number) / "saved").exists()
        assert trial.user_attrs["reason"] == "pruned at step 10"
    found = json.loads((tmp_path / "sweep.json").read_text())
    states = [found["trials"][n]["state"] for n in found["ranking"]]
    assert states == sorted(states)  # complete before pruned
    worst_complete = max(t.value for t in study.trials if t.state == TrialState.COMPLETE)
    assert all(t.value > 0.3 for t in pruned) and worst_complete > study.best_value
    # The same trials with all values there at once: nothing after the pruner's word is counted.
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert outcome(run(make(tmp_path / "fast", space, config), 8)) == outcome(study)


def test_failures_are_recorded_and_the_sweep_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "wrong@1 diverge@2")
    found = run(make(tmp_path), 4)
    states = [t.state for t in found.trials]
    complete, fail = TrialState.COMPLETE, TrialState.FAIL
    assert states == [complete, fail, fail, complete]
    reasons = [t.user_attrs.get("reason", "") for t in found.trials]
    assert reasons[1:3] == ["error: config.optim is not to its taste", "diverged: NaN or Inf"]
    ranking = json.loads((tmp_path / "sweep.json").read_text())["ranking"]
    assert set(ranking[:2]) == {0, 3} and set(ranking[2:]) == {1, 2}
    shown = str(verb_output(make(tmp_path), found))
    assert "diverged: NaN or Inf" in shown


def verb_output(sweep, study):
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(ranking.table(sweep, study))
    return console.export_text()


def test_a_wrong_configuration_stops_the_sweep_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "wrong@*")
    with pytest.raises(UserError, match="trial 0 cannot run(?s:.)*not to its taste"):
        run(make(tmp_path), 4)
    monkeypatch.setenv("FAKE", "")
    study = run(make(tmp_path), 2)  # put right, the same trial is run
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    monkeypatch.setenv("FAKE", "crash@*")
    told = []
    with pytest.raises(UserError, match="exit code 1(?s:.)*a bug"):
        run(make(tmp_path / "crash"), 9, told.append)
    assert sum("failed" in line for line in told) == 2


def test_averages_can_be_swept(tmp_path):
    space = "fields: {ema.profiles: {choices: [['0.9'], ['0.99']]}}\npruner: none"
    told = []
    study = run(make(tmp_path, space), 4, told.append)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert {line.split("validation/")[1].split("/")[0] for line in told if "step" in line} == {
        "0.9", "0.99"
    }  # fmt: skip


def test_values_that_do_not_go_together_fail_their_trial(tmp_path):
    space = """
        fields:
          data.batch_size: {choices: [8, 9]}
          train.accumulation: {choices: [1, 8]}
        pruner: none
        sampler: {name: random, seed: 1}
    """
    study = run(make(tmp_path, space), 8)
    for trial in study.trials:
        bad = trial.params == {"data.batch_size": 9, "train.accumulation": 8}
        assert (trial.state == TrialState.FAIL) == bad
        if bad:
            assert "not divisible by train.accumulation" in trial.user_attrs["reason"]
    assert any(t.state == TrialState.FAIL for t in study.trials)


def test_two_workers_share_the_trials(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    other = start(tmp_path, 9)
    wait_for(tmp_path / "trials/0000")
    study = run(make(tmp_path), 9)
    assert other.wait(60) == 0
    assert len(study.get_trials()) == 9
    assert all(t.state == TrialState.COMPLETE for t in study.get_trials())
    starts = [(tmp_path / f"trials/{n:04d}/starts").read_text().splitlines() for n in range(9)]
    assert all(len(lines) == 1 for lines in starts)  # nobody did another's
    assert json.loads((tmp_path / "sweep.json").read_text())["ranking"]


@pytest.fixture
def lock_of_another_machine(monkeypatch):
    """A function that writes trials/0000.lock of a sweep as a worker of another machine does."""

    def write(folder):
        (folder / "trials").mkdir(exist_ok=True)
        handle = os.open(folder / "trials/0000.lock", os.O_RDWR | os.O_CREAT)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(lock_holder, "machine", lambda: "another")
            locks._write(handle, "sdjax.sweep", False, append=False)
        os.close(handle)

    return write


@contextlib.contextmanager
def touched(file):
    """Another process touches a file in here."""
    code = "import os, sys, time\nwhile True: os.path.exists(f := sys.argv[1]) and os.utime(f)"
    process = subprocess.Popen([sys.executable, "-S", "-c", f"{code}; time.sleep(0.02)", file])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_trial_of_a_dead_worker_elsewhere_is_taken_up(
    unbroken, tmp_path, monkeypatch, lock_of_another_machine
):
    _, study = unbroken
    again = make(tmp_path)
    lock_of_another_machine(tmp_path)
    monkeypatch.setattr("sdjax.sweeps.study.SILENT", 0.5)
    begin = time.monotonic()
    found = run(again, 2)
    assert time.monotonic() - begin > 0.5
    assert outcome(found) == outcome(study)[:2]


def test_a_trial_of_a_worker_elsewhere_is_left_to_it(tmp_path, lock_of_another_machine):
    sweep, told = make(tmp_path), []
    lock_of_another_machine(tmp_path)
    with touched(tmp_path / "trials/0000.lock"):
        states = [t.state for t in run(sweep, 2, told.append).trials]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE]
    who = f"sdjax.sweep, process {os.getpid()} on {socket.gethostname()}"
    assert any(line.startswith(f"trial 0 is left to {who}") for line in told)


def test_a_worker_that_was_taken_for_dead_kills_its_run(
    tmp_path, monkeypatch, lock_of_another_machine
):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    sweep, told = make(tmp_path), []

    def tell(line):
        told.append(line)
        if line.startswith("trial 0: step 10"):
            (tmp_path / "trials/0000.lock").unlink()
            lock_of_another_machine(tmp_path)

    with touched(tmp_path / "trials/0000.lock"):
        study = run(sweep, 1, tell)
    assert "trial 0: another worker took this one for dead, and has it now" in told
    assert study.trials[0].state == TrialState.RUNNING
    assert list(study.trials[0].intermediate_values) == [10]
    ((pid, _),) = (
        line.split() for line in (tmp_path / "trials/0000/starts").read_text().splitlines()
    )
    assert not Path(f"/proc/{pid}").exists() and not (tmp_path / "trials/0000/saved").exists()


def test_a_process_that_a_lock_names_gets_no_signal(tmp_path, monkeypatch):
    """Files of a stranger, of all kinds: none ends a process, and none is a traceback."""
    signals, kill = [], os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number) or kill(pid, number))
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr("sdjax.sweeps.study.SILENT", 0.01)
    sweep = make(tmp_path)
    good = {"program": "sdjax.sweep", "pid": victim.pid, "host": socket.gethostname(),
            "since": "",
            "machine": lock_holder.machine(), "began": "1", "shared": False}  # fmt: skip
    hostile = [{}, {"began": lock_holder.began(victim.pid)}, {"pid": -1}, {"pid": 0}, {"pid": 1},
               {"pid": -victim.pid}, {"pid": 10**30}, {"pid": str(victim.pid)}, {"pid": True},
               {"pid": [1]}, {"pid": None}, {"pid": 2**31}, {"pid": "x"}, {"machine": "another"},
               {"machine": 5}, {"host": 5}, {"host": "\x1b[2J"}, {"began": 1}, {"program": "\x1b"},
               {"shared": 1}, {"more": 1}]  # fmt: skip
    texts = [json.dumps({**good, **change}) for change in hostile]
    (tmp_path / "trials").mkdir()
    for text in [*texts, "[]", "1", "{", "[" * 3000, "\0", '{"pid": 1}']:
        (tmp_path / "trials/0000.lock").write_text(text)
        lock = sweep.lock(0)
        wait_until(lock.take)  # nobody holds it, whoever is named
        lock.release()
    assert victim.poll() is None and set(signals) <= {0}
    victim.kill()
    victim.wait()


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "1", "[" * 3000, '{"op_code": 99}', '{"op_code": "5"}', "\0", "9" * 5000,
        {"op_code": 4, "study_id": 0, "datetime_start": "yesterday", "worker_id": ""},
        {"op_code": 5, "trial_id": 0, "param_name": "os.system", "worker_id": "",
         "param_value_internal": 0, "distribution": '{"name": "os.system", "attributes": {}}'},
        {"op_code": 5, "trial_id": 0, "param_name": "seed", "worker_id": "",
         "param_value_internal": 0,
         "distribution": '{"name": "CategoricalDistribution", "attributes": {"choices": ["x"]}}'},
        {"op_code": 6, "trial_id": 0, "state": 4, "values": None, "worker_id": ""},
        {"op_code": 6, "trial_id": 0, "state": 1, "values": ["x"], "worker_id": "",
         "datetime_complete": "2026-01-01"},
        {"op_code": 7, "trial_id": 0, "step": "x", "intermediate_value": 1.0, "worker_id": ""},
        {"op_code": 7, "trial_id": 0, "step": 10, "intermediate_value": "x", "worker_id": ""},
        {"op_code": 8, "trial_id": 0, "user_attr": {"reason": 5}, "worker_id": ""},
    ],
)  # fmt: skip
def test_a_journal_that_no_sweep_wrote_is_refused(tmp_path, line):
    sweep = make(tmp_path)
    begin_trial(sweep, open_study(sweep))
    with open(tmp_path / "journal.log", "a") as journal:
        journal.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
        journal.write('{"op_code": 1, "study_id": 99, "worker_id": ""}\n')
    with pytest.raises(ConfigError, match="journal.log: cannot be read(?s:.)*another --workdir"):
        open_study(sweep)


def test_pipes_and_damaged_settings_are_refused(tmp_path):
    sweep = make(tmp_path)
    os.mkfifo(tmp_path / "journal.log")
    with pytest.raises(ConfigError, match="journal.log(?s:.)*pipe"):
        open_study(sweep)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="settings.json"):
        open_study(sweep)


def test_another_sweep_in_the_same_folder_is_refused(unbroken):
    sweep, _ = unbroken
    with pytest.raises(ConfigError, match="sweep of something else:\n  config.seed: was 0, is 1"):
        run(dataclasses.replace(sweep, base=dataclasses.replace(sweep.base, seed=1)), 8)


def test_recipes_hold_what_python_has_no_word_for(tmp_path):
    config = to_dict(Config())
    config["optim"]["learning_rate"] = float("inf")
    config["data"]["batch_size"], config["model"]["text_encoder"] = 3, None
    made = {}
    exec(recipe(config, 'says """hello\\n"""'), made)
    assert made["get_config"]().to_dict() == config


def test_metrics_are_read_while_they_are_written(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert runs.read_values(file, "a") == {} == runs.read_values(file, "b")
    file.write_text(
        '{"step": 20, "a": 2.0}\n{"step": 10, "a": "NaN", "ab": 1}\n{"step": 30, "a": 1'
    )
    values = runs.read_values(file, "a")
    assert list(values) == [10, 20] and values[10] != values[10]
    assert runs.best(values, "min") == (20, 2.0)
    assert runs.best({1: 5.0, 2: 7.0, 3: 7.0}, "max") == (2, 7.0)
    assert runs.names(file) == ["a", "ab"]


def test_the_verb_says_what_is_missing(tmp_path, monkeypatch, capsys):
    def said(*arguments):
        verb.FLAGS.unparse_flags()
        assert verb.main(["sweep", *arguments]) == 2
        return capsys.readouterr().err

    config = f"--config={ROOT / 'configs' / 'base.py'}"
    verb.FLAGS["space"].unparse(), verb.FLAGS["workdir"].unparse()
    assert "--space is missing" in said(config)
    assert "--workdir is missing" in said(config, "--space=space.yaml")
    there = [config, "--space=nowhere.yaml", f"--workdir={tmp_path / 'w'}"]
    assert "nowhere.yaml: cannot be read" in said(*there)
    assert "--trials=0" in said(*there, "--trials=0")
    colon = [config, f"--space={tmp_path / 'space.yaml'}", f"--workdir={tmp_path / 'a:b'}"]
    (tmp_path / "space.yaml").write_text(SPACE)
    assert "take a folder without a colon" in said(*colon, "--trials=1")
    monkeypatch.setattr(verb.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sdjax[sweep]'" in said(*there, "--trials=1")
    assert not (tmp_path / "w").exists()


def start(folder, trials):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps.fake_sweep", str(folder), str(trials)], cwd=ROOT
    )


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for(file):
    wait_until(file.exists)
    return file


@pytest.mark.slow
def test_a_sweep_of_real_runs(tiny_config, tmp_path):
    tiny_config.validation.update(examples=8, train_examples=0, every=2)
    recipe_file = tmp_path / "tiny.py"
    recipe_file.write_text(recipe(to_dict(resolve(tiny_config)), "A tiny model."))
    space = tmp_path / "space.yaml"
    space.write_text(
        "fields:\n  optim.learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"
        "  objective.weighting: {choices: [uniform, min_snr]}\n"
        "pruner: {name: median, startup_trials: 1}\n"
    )
    folder = tmp_path / ODD
    command = [
        sys.executable, "-m", "sdjax.sweep", f"--config={recipe_file}", f"--space={space}",
        f"--workdir={folder}", "--trials=3",
    ]  # fmt: skip
    # Killed in its second trial, and started again.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    wait_until((folder / "trials/0001/metrics.jsonl").exists, 300)
    process.kill()
    process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "sweep.json").read_text())
    assert len(found["ranking"]) == 3 and found["metric"] == "validation/warmup-0.9/loss"
    best = found["best"]
    rows = runs.read_values(Path(best["workdir"]) / "metrics.jsonl", found["metric"])
    assert rows[best["step"]] == best["value"] and set(rows) == {2, 4, 6}
    # best.py runs, to the same losses.
    again = subprocess.run(
        [sys.executable, "-m", "sdjax.main", f"--config={folder / 'best.py'}",
         f"--workdir={tmp_path / 'again'}"], cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert runs.read_values(tmp_path / "again" / "metrics.jsonl", found["metric"]) == rows
    assert "validation/" in done.stdout
    assert shlex.quote(f"--config={folder / 'best.py'}") in done.stdout
