"""The command line of `main`: every mistake is one message that names it, and exit code 2."""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdjax.checkpoints.checkpoint import latest_step, restore_params
from tests.odd_names import ODD

ROOT = Path(__file__).parents[1]


def main(*options, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "sdjax.main", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


MISTAKES = [
    ([], "--config is missing"),
    (["--config=configs/base.py"], "--workdir is missing"),
    (["--config=configs/none.py", "--workdir=x"], "configs/none.py"),
    (["--config=configs/base.py", "--workdir=x", "--config.train.stepz=3"], "stepz"),
    (["--config=configs/base.py", "--workdir=x", "--config.train.steps=many"], "many"),
    (["--config=configs/base.py", "--workdir=x", "--nonsense=1"], "nonsense"),
    (["--config=configs/emoji.py", "--workdir=x"], "data.path is empty"),
    (["--config=configs/base.py", "--workdir=x", "extra"], "extra"),
]
DRY = ["--dry_run", "--config.mesh.fsdp=1"]
DRY_RUNS = [
    ("sd15", 2048, ["859,520,964", "123,060,480", "83,653,863"]),
    ("sdxl_refiner", 256, ["2,259,526,660", "694,659,840", "83,653,863"]),
]


@pytest.fixture(scope="module")
def runs():
    """{options: the run with them}, two at a time: most of each is imports."""
    every = [tuple(options) for options, _ in MISTAKES]
    every += [("--help",)]
    every += [(f"--config=configs/{name}.py", *DRY) for name, *_ in DRY_RUNS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(every, pool.map(lambda options: main(*options), every), strict=True))


@pytest.mark.parametrize(("options", "word"), MISTAKES)
def test_mistakes_are_named_without_a_traceback(runs, options, word):
    run = runs[tuple(options)]
    assert run.returncode == 2
    assert "Traceback" not in run.stderr, run.stderr
    assert word in run.stderr + run.stdout, run.stderr
    assert not (ROOT / "x").exists()


def test_help_is_an_answer_and_no_mistake(runs):
    run = runs["--help",]
    assert run.returncode == 0
    for word in ("--config=base", "--[no]dry_run", "Exit codes"):
        assert word in run.stdout


def test_an_empty_or_missing_dataset_is_named(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        run = main(
            "--config=configs/emoji.py",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.path={folder}",
        )
        assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
        assert str(folder) in run.stderr


@pytest.mark.parametrize(("name", "batch_size", "counts"), DRY_RUNS)
def test_dry_run_of_a_full_size_model(runs, name, batch_size, counts):
    """Without a folder of pictures: none is looked at."""
    run = runs[(f"--config=configs/{name}.py", *DRY)]
    assert run.returncode == 0, run.stderr
    assert all(count in run.stdout for count in counts)
    text = run.stdout
    resolved = json.loads(text[: text.index("\n}\n") + 2])
    assert resolved["data"]["batch_size"] == batch_size


def test_a_run_from_the_command_line(tiny_config, tmp_path):
    """The whole way, with overrides, from a recipe file, in a folder of an odd name."""
    from sdjax.config import resolve, to_dict

    tmp_path = tmp_path / ODD
    tmp_path.mkdir()
    recipe = tmp_path / "recipe.py"
    values = to_dict(resolve(tiny_config))
    recipe.write_text(
        "from sdjax.config import default\n\n\ndef get_config():\n    c = default()\n"
        f"    c.update({values!r})\n    return c\n"
    )
    run = main(
        f"--config={recipe}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=2",
        "--config.train.export=True",
        "--config.sample.fidelity=4",
    )
    assert run.returncode == 0, run.stderr + run.stdout
    assert "Traceback" not in run.stderr
    for words in ("trained to step 2", "sdjax.sample", "sdjax.convert", "tensorboard", "read back"):
        assert words in run.stdout
    screen = {line.split()[0]: line for line in run.stdout.splitlines() if line.strip()}
    assert f"--model={tmp_path / 'run'}" in shlex.split(screen["draw"])
    assert f"--input={tmp_path / 'run'}" in shlex.split(screen["convert"])
    assert f"--logdir={tmp_path / 'run'}" in shlex.split(screen["TensorBoard"])
    assert latest_step(tmp_path / "run") == 2
    assert restore_params(tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2] and all("train/loss" in x for x in lines)
    assert {"fidelity/colour", "fidelity/shape"} <= lines[-1].keys()
    assert (tmp_path / "run" / "diffusers" / "model_index.json").exists()
