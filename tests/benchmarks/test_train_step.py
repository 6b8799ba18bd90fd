"""benchmarks/train_step.py: it runs with little installed, and its numbers agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

# None of these is on every machine with an accelerator. (flax and optax bring absl, etils, rich.)
ABSENT = (
    "array_record", "clu", "diffusers", "grain", "matplotlib", "ml_collections", "PIL", "plotly",
    "scipy", "tensorflow", "tensorflow_datasets", "tokenizers", "torch", "transformers",
)  # fmt: skip
MEMORY = 2**30  # what the machine of the test is said to have
PROGRAM = f"""
import importlib.abc, os, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
true, small = os.sysconf, {{"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": {MEMORY}}}
os.sysconf = lambda name: small[name] if name in small else true(name)

import train_step
from sizes import SIZES, Size
from sdjax.models.unet_config import UNetConfig

SIZES["test"] = Size(UNetConfig(
    sample_size=8, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
    layers_per_block=1, up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    cross_attention_dim=24), tokens=7)
train_step.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what the JSON says, the lines of the table) of two rows, one of them too large."""
    file = tmp_path_factory.mktemp("train_step") / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--size=test", "--batch=2,4096", f"--json={file}",
         "--matmul=32,64", "--blocks=3", "--seconds=0.05"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
        capture_output=True, text=True, cwd=file.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout.splitlines()


def test_images_per_second_and_mfu_follow_from_the_step_time(run):
    result, _ = run
    row = result["rows"][0]
    step = row["step_seconds"]
    assert step["median"] == sorted(step["blocks"])[1] and len(step["blocks"]) == 3
    assert step["least"] <= step["median"] <= step["most"] and row["finite"]
    assert row["images_per_s"] == pytest.approx(2 / step["median"])
    per_device = 2 * row["flops_per_image"] / step["median"] / row["devices"]
    assert row["flops_per_s_per_device"] == pytest.approx(per_device)
    ceiling = result["matmul_flops_per_s"]["float32"]
    assert list(ceiling) == ["32", "64"]
    assert row["mfu_matmul"] == pytest.approx(per_device / max(ceiling.values()))
    assert row["mfu_data_sheet"] is None is result["data_sheet_flops_per_s"]  # of a CPU


def test_training_is_three_forwards_and_no_text_encoder_runs(run):
    row = run[0]["rows"][0]
    assert 2.9 < row["flops_per_image"] / row["unet_forward_flops_per_image"] <= 3


def test_a_row_that_does_not_fit_says_so(run):
    small, large = run[0]["rows"]
    assert "error" not in small and small["peak_bytes"] < MEMORY < large["peak_bytes"]
    assert large["error"].startswith("out of memory") and "1.0" in large["error"]
    assert "images_per_s" not in large and large["peak_from"] == "plan"


def test_the_table_is_the_json(run):
    result, lines = run
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    assert len(rows) == len(result["rows"]) == 2
    shown, row = dict(zip(header, rows[0], strict=True)), result["rows"][0]
    assert (shown["size"], shown["px"], shown["batch"]) == ("test", "64", "2")
    assert float(shown["ms a step"].split()[0]) == pytest.approx(
        1e3 * row["step_seconds"]["median"], rel=1e-3
    )
    assert float(shown["images/s"]) == pytest.approx(row["images_per_s"], rel=1e-3)
    assert float(shown["TFLOP/s"]) == pytest.approx(row["flops_per_s_per_device"] / 1e12, rel=1e-3)
    assert float(shown["MFU of matmul"].strip("%")) == pytest.approx(
        100 * row["mfu_matmul"], abs=0.051
    )
    assert shown["MFU of data sheet"] == "-"
    assert shown["peak GiB"] == f"{row['peak_bytes'] / 2**30:.2f} (plan)"
    shown = dict(zip(header, rows[1], strict=True))
    assert (shown["batch"], shown["ms a step"], shown["images/s"]) == ("4096", "out of memory", "-")


@pytest.mark.parametrize(
    "option, said",
    [
        ("--size=huge", "huge"),
        ("--dtype=float16", "model.dtype"),
        ("--remat=some", "remat"),
        ("--attention=quick", "model.attention"),
        ("--resolution=100", "multiple of 8"),
        ("--batch=0", "1 or more"),
        ("--accumulation=3", "accumulation"),
    ],
)
def test_wrong_options_are_named_before_anything_is_measured(option, said, capsys):
    import train_step

    with pytest.raises(SystemExit) as stop:
        train_step.main([option])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_only_a_lack_of_memory_is_taken_for_one():
    import train_step

    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**52, jnp.int8))())
    assert train_step.is_out_of_memory(refused.value)
    assert not train_step.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


def test_sizes_have_the_parameters_of_their_names():
    from sizes import SIZES

    from sdjax.models import weights
    from sdjax.models.unet import UNet

    counts = {"small": 37.5e6, "sd15": 859_520_964}
    for name, expected in counts.items():
        _, params = weights.abstract(UNet, SIZES[name].unet)
        assert sum(p.size for p in params.values()) == pytest.approx(expected, rel=2e-3)
