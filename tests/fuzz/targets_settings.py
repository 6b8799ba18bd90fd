"""Hostile settings: JSON, the description of a stored dataset, the files of a workdir."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import html
import io
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from sdjax import machine_settings, verbs
from sdjax.checkpoints import references
from sdjax.checkpoints.workdir import read_run
from sdjax.config import VARIANTS, Config, resolve, to_dict
from sdjax.errors import UserError
from sdjax.evaluation.loading import choose_data
from sdjax.families.config import ModelConfig
from sdjax.methods.method import MethodConfig
from sdjax.sweeps import ranking
from sdjax.sweeps.study import begin_trial, open_study
from sdjax.system import lock_holder, text_files
from sdjax.system.locks import LockedError
from sdjax.web.report import page as report_page
from tests.fuzz import mutation, stored_dataset
from tests.sweeps import fake_sweep
from tests.web import report_workdir

_WORDS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"\\u0000", b"null", b"NaN", b"-",
    b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\xef\xbb\xbf", b"\0",
    b"\xed\xa0\x80", b"\r", b"\n", "\u2028".encode(), b"0", b'"a"', b"true", b"__proto__",
)  # fmt: skip


def json_text(rng: np.random.Generator, folder: Path) -> str:
    """Text that is nearly JSON, in any codec."""
    if rng.random() < 0.5:
        content = mutation.tree(rng, {"a": [1, {"b": "c"}], "d": None, "e": {"f": [0.5, "g"]}})
        data = mutation.damaged(rng, json.dumps(content).encode()) if rng.random() < 0.5 else (
            json.dumps(content).encode())  # fmt: skip
        return _json(folder, data)
    words = rng.choice(len(_WORDS), int(rng.integers(1, 30)))
    data = b"".join(_WORDS[i] for i in words)
    if rng.random() < 0.3:
        data = bytes(rng.integers(0, 256, int(rng.integers(0, 64)), np.uint8)) + data
    return _json(folder, data)


def _json(folder: Path, data: bytes) -> str:
    (folder / "file.json").write_bytes(data)
    try:
        text_files.read_json(folder / "file.json")
    except UserError as error:
        assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


@functools.cache
def _dataset() -> dict[str, bytes]:
    """The files of a good dataset, made once for a process."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            file.name: file.read_bytes() for file in stored_dataset.write(Path(folder)).iterdir()
        }


def dataset(rng: np.random.Generator, folder: Path) -> str:
    """A stored dataset with other features.json, dataset_info.json, labels or records."""
    for name, data in _dataset().items():
        (folder / name).write_bytes(data)
    file = sorted(folder.iterdir())[rng.integers(len(_dataset()))]
    if file.suffix == ".json" and rng.random() < 0.9:
        file.write_text(json.dumps(mutation.tree(rng, json.loads(file.read_text()))))
    else:
        file.write_bytes(mutation.damaged(rng, file.read_bytes()))
    try:
        stored_dataset.read(folder)
    except UserError as error:
        assert len(str(error)) < 3000, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


@functools.cache
def _workdir() -> dict[str, bytes]:
    """The text files of a workdir with all that a report shows, and of its data."""
    with tempfile.TemporaryDirectory() as folder:
        report_workdir.make_workdir(Path(folder) / "run", count=40)
        (Path(folder) / "run" / "rollbacks.json").write_text(
            json.dumps([{"step": 10, "what": "loss"}])
        )
        files = (file for file in Path(folder).rglob("*") if file.suffix in (".json", ".jsonl"))
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def report(rng: np.random.Generator, folder: Path) -> str:
    """The workdir of a stranger, of whose files one or two are changed, in a report."""
    files = dict(_workdir())
    for _ in range(rng.integers(1, 3)):
        name = sorted(files)[rng.integers(len(files))] if rng.random() < 0.6 else "run/config.json"
        if name.endswith(".json") and rng.random() < 0.9:
            with contextlib.suppress(ValueError, RecursionError):  # no JSON, or too deep to copy
                changed = mutation.tree(rng, json.loads(files[name]))
                files[name] = json.dumps(changed).encode()
        else:
            files[name] = mutation.damaged(rng, files[name])
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.replace(b'/data"', str(folder / "data").encode() + b'"'))
    page = report_page.write_report(folder / "run").read_text(encoding="utf-8")
    assert report_workdir.NASTY not in page
    return check_recipe(page)


def check_recipe(page: str) -> str:
    """Check that the recipe in a report assigns literals to fields of Config, and nothing else."""
    found = re.search(r'<pre[^>]*id="recipe-file"[^>]*>(.*?)</pre>', page, re.DOTALL)
    if found is None:
        return "without recipe"
    imported, function = ast.parse(html.unescape(found.group(1))).body[1:]
    assert ast.unparse(imported) == "from sdjax.config import default"
    assert isinstance(function, ast.FunctionDef)
    first, *lines, last = function.body
    chosen = re.fullmatch(r"c = default\((?:(family)='(\w+)')?(?:, )?(?:(method)='(\w+)')?\)",
                          ast.unparse(first))  # fmt: skip
    assert chosen and ast.unparse(last) == "return c", ast.unparse(first)
    config = Config(
        model=VARIANTS[ModelConfig][1][chosen[2] or "sd"](),
        method=VARIANTS[MethodConfig][1][chosen[4] or "denoise"](),
    )
    for line in lines:
        assert isinstance(line, ast.Assign) and len(line.targets) == 1
        defined: object = config
        for name in ast.unparse(line.targets[0]).removeprefix("c.").split("."):
            assert name in {field.name for field in dataclasses.fields(defined)}  # type: ignore
            defined = getattr(defined, name)
        ast.literal_eval(re.sub(r"float\('(nan|-?inf)'\)", "0.0", ast.unparse(line.value)))
    return "with recipe"


def model_config(rng: np.random.Generator, folder: Path) -> str:
    """The config.json of a stranger's workdir, and what of it is obeyed."""
    config = json.loads(json.dumps(to_dict(Config())))
    (folder / "config.json").write_text(json.dumps(mutation.tree(rng, config)))
    try:
        found = resolve(text_files.read_json(folder / "config.json"))
    except UserError as error:
        assert len(str(error)) < 30_000, f"a message of {len(str(error))} characters"
        return "refused"
    obeyed = machine_settings.of_model(found)
    for name, value in _leaves(to_dict(obeyed)):
        assert not machine_settings.is_machine(name) or value == _DEFAULTS[name], name
    with contextlib.suppress(UserError):  # what a user has to agree to
        choose_data(machine_settings.data_of_model(found), "")
    return "read"


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


_DEFAULTS = dict(_leaves(to_dict(Config())))


@functools.cache
def _sweep() -> dict[str, bytes]:
    """The files of a good sweep: a trial that is complete, one that failed, one that runs."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = fake_sweep.make(Path(folder))
        study = open_study(sweep)
        for number in range(3):
            begin_trial(sweep, study)
            trial = optuna.Trial(study, number)
            trial.report(0.5, 10)
            if number == 0:
                study.tell(trial, 0.5)
            elif number == 1:
                trial.set_user_attr("reason", "diverged")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        files = ("settings.json", "journal.log")
        return {name: (Path(folder) / name).read_bytes() for name in files}


def sweep(rng: np.random.Generator, folder: Path) -> str:
    """The folder of a stranger's sweep: its settings, its journal, and the lock of a trial.

    Some locks name this process or its parent, which gets no signal.
    """
    files = dict(_sweep())
    lock = {
        "program": "sdjax.sweep", "pid": int(rng.choice([os.getpid(), os.getppid(), 2**22])),
        "host": socket.gethostname(), "since": "", "machine": lock_holder.machine(),
        "began": lock_holder.began(os.getppid()), "shared": False,
    }  # fmt: skip
    if rng.random() < 0.7:
        lines = files["journal.log"].splitlines()
        at = int(rng.integers(len(lines)))
        lines[at] = json.dumps(mutation.tree(rng, json.loads(lines[at]))).encode()
        files["journal.log"] = b"\n".join(lines) + b"\n"
    else:
        name = sorted(files)[rng.integers(2)]
        files[name] = mutation.damaged(rng, files[name])
    for name, data in files.items():
        (folder / name).write_bytes(data)
    text = json.dumps(mutation.tree(rng, lock) if rng.random() < 0.9 else lock)
    (folder / "trials").mkdir()
    (folder / "trials/0002.lock").write_text(text)
    found = fake_sweep.make(folder)
    with contextlib.suppress(LockedError):
        taken = found.lock(2)
        taken.take()
        taken.release()
    try:
        study = open_study(found)
        begin_trial(found, study)
    except UserError as error:
        assert len(str(error)) < 3000, f"a message of {len(str(error))} characters"
        return "refused"
    ranking.write(found, study)
    Console(file=io.StringIO()).print(ranking.table(found, study))
    return "read"


_PARTS = ("config", "data", "path", "train", "steps", "ema", "profiles", "stages", "model", "unet",
          "", ".", "..", "[0]", "[", "]", " ", "=", "5", "-1", "'x'", "()", "((", "None", "x" * 500,
          "__class__", "items", "\0", "\n", "é", "9" * 5000, "{}", "lambda: 0", ",")  # fmt: skip


def override(rng: np.random.Generator, folder: Path) -> str:
    """An argument of the command line that begins with --config."""
    parts = [_PARTS[i] for i in rng.integers(len(_PARTS), size=rng.integers(1, 7))]
    argument = "--config." + ("." if rng.random() < 0.7 else "").join(parts)
    if rng.random() < 0.4:
        argument = "--config." + ("train.steps", "data.path", "ema.profiles")[rng.integers(3)]
    if rng.random() < 0.5:
        argument += "=" + _PARTS[rng.integers(len(_PARTS))]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    before, sys.argv = sys.argv, ["verb", "--config=base", argument]
    try:
        verbs.parse(sys.argv, values)
        resolve(verbs.recipe(values, "base"))
    except (UserError, flags.Error):
        return "refused"
    finally:
        sys.argv = before
    return "read"


def references_of_a_workdir(rng: np.random.Generator, folder: Path) -> str:
    """A frozen.json that is nearly one, and what its references lead to."""
    entry = {
        "field": "vae_from", "path": "tiny", "step": None, "weights": "",
        "digest": "sha256:" + "0" * 64, "parameters": 1,
    }  # fmt: skip
    content = mutation.tree(rng, {"vae": entry, "text_encoder": {**entry, "path": str(folder)}})
    data = json.dumps(content).encode()
    if rng.random() < 0.3:
        data = mutation.damaged(rng, data)
    (folder / references.REFERENCES_FILE).write_bytes(data)
    try:
        for name, reference in references.read_references(folder).items():
            references.follow(folder, name, reference, read_run)
    except UserError as error:
        assert len(str(error)) < 20_000, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


TARGETS = [
    ("json", json_text),
    ("references", references_of_a_workdir),
    ("dataset", dataset),
    ("report", report),
    ("model_config", model_config),
    ("sweep", sweep),
    ("override", override),
]
