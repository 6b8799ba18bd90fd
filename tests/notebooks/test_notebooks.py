"""The notebooks: pairs in step with one another, and run in small."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.notebooks.percent import FOLDER, NAMES, cells_of_ipynb, cells_of_py, notebook


def text_of(name, kind="py"):
    return (FOLDER / f"{name}.{kind}").read_text()


def execute(name, folder, **variables):
    """Run the .py file of a notebook as a user's kernel would, but for %pip."""
    environment = {
        **os.environ, "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu", "SDJAX_NOTEBOOK_SMALL": "1",
        "SDJAX_NOTEBOOK_RUNS": "runs", "TFDS_DATA_DIR": str(folder / "tfds"), **variables,
    }  # fmt: skip
    root = str(FOLDER.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, FOLDER / f"{name}.py"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, error = process.communicate(timeout=1800)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the verb that it runs too
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def test_all_notebooks_are_known():
    found = {file.stem for file in FOLDER.glob("*.py")}
    assert found == {file.stem for file in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_pair_has_the_same_cells(name):
    own = cells_of_py(text_of(name))
    assert own == cells_of_ipynb(text_of(name, "ipynb")), "run: python -m tests.notebooks.percent"
    assert text_of(name, "ipynb") == notebook(own)  # without outputs
    assert len(own) > 10 and own[0][0] == "markdown"


@pytest.mark.parametrize("name", NAMES)
def test_pair_is_as_jupytext_reads_it(name):
    jupytext = pytest.importorskip("jupytext")
    read = jupytext.reads(text_of(name), fmt="py:percent")
    assert [(cell.cell_type, cell.source) for cell in read.cells] == cells_of_py(text_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_installs_what_it_is_told_and_asks_for_the_device_elsewhere(name):
    code = "\n".join(source for kind, source in cells_of_py(text_of(name)) if kind == "code")
    assert re.search(r'^%pip install --quiet "\{WHEEL\}', code, re.M)
    assert 'os.environ.get("SDJAX_WHEEL", "sdjax")' in code
    # A TPU belongs to one process: the kernel does not import jax.
    assert not re.search(r"^\s*(import|from) jax\b", code, re.M)
    assert "jax.devices()" in code


@pytest.mark.parametrize("name", NAMES)
def test_fields_and_verbs_of_a_notebook_are_sdjaxs(name):
    from sdjax.config import Config
    from tests.test_docs import has_field, options_of

    text = text_of(name)
    fields = set(re.findall(r"--config\.([a-z_]\w*(?:\.[a-z_]\w*)*)", text))
    assert fields and not {field for field in fields if not has_field(Config, field.split("."))}
    for verb, options in re.findall(r'run\(\s*"(\w+)",(.*?)\n?\)', text, re.S):
        named = set(re.findall(r'f?"--(\w+)[=" ]', options)) - {"config"}
        assert named <= options_of(verb) | {"config"}, verb


def test_tpu_refuses_to_train_on_the_cpu(tmp_path):
    ended = execute("tpu", tmp_path)
    assert ended.returncode == 1
    assert "JAX sees cpu, no TPU. Choose a TPU runtime" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_finetuning_refuses_pictures_without_captions(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "cat.png")
    ended = execute("finetune_lora", tmp_path, SDJAX_MODEL=str(tmp_path))
    assert ended.returncode == 1 and "1 of them without a caption ['cat.png']" in ended.stderr


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder in which `quickstart` has run."""
    folder = tmp_path_factory.mktemp("quickstart")
    ended = execute("quickstart", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.mark.slow
def test_quickstart_trains_and_draws(started):
    rows = (started / "runs" / "base" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 4
    for file in ("00000.png", "00001.png", "00000-words.png"):
        assert np.asarray(Image.open(started / "runs" / "drawn" / file)).std() > 0
    assert (started / "runs" / "base" / "report.html").exists()


@pytest.mark.slow
def test_finetune_lora_trains_on_own_pictures_and_draws(started):
    folder = started / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a large pink circle in the center")
    ended = execute(
        "finetune_lora", started, SDJAX_MODEL="runs/base", SDJAX_RECIPE="shapes_lora",
        SDJAX_PROMPT="a large pink circle in the center",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    names = {file.name for file in (started / "runs" / "lora" / "adapter").iterdir()}
    assert {"lora.safetensors", "pytorch_lora_weights.safetensors"} <= names
    zero = Image.open(started / "runs" / "lora_0.0" / "00000.png")
    assert zero.size == Image.open(started / "runs" / "lora_1.0" / "00000.png").size


@pytest.mark.slow
def test_tpu_runs_in_small_where_cpus_are_allowed(tmp_path):
    ended = execute("tpu", tmp_path, SDJAX_NOTEBOOK_ALLOW_CPU="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "train/images_per_second" in ended.stdout
    assert (tmp_path / "runs" / "tpu_drawn" / "00000.png").exists()
