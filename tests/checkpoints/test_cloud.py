"""A run whose every folder is in a bucket, against a bucket in memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors

from sdjax.config import resolve, to_dict
from sdjax.errors import UserError
from sdjax.system import paths
from tests.fake_gcs import FakeGCS

WHOLE_RUN = """
import json, sys
from sdjax import convert, sample
from sdjax.config import resolve
from sdjax.train import loop

values = json.loads(sys.argv[1])
for steps in (2, 4):
    values["train"]["steps"] = steps
    assert loop.run(resolve(values), "gs://bucket/runs/a [v2]") == loop.DONE
draw = ["--prompts", "a red circle", "--steps=2", "--height=16", "--width=16", "--model"]
assert sample.main([*draw, "gs://bucket/runs/a [v2]", "--output=gs://bucket/out"]) == 0
to = "gs://bucket/new [1]"
for force in ([], ["--force"]):
    args = ["--input=gs://bucket/runs/a [v2]/checkpoints/3", f"--output={to}", *force]
    assert convert.main(args) == 0
assert convert.main(["--input=gs://bucket/runs/a [v2]", f"--output={to}"]) == 2
assert convert.main([f"--input={to}", "--output=gs://bucket/w %41 [2]"]) == 0
assert sample.main([*draw, "gs://bucket/w %41 [2]", "--output=gs://bucket/ag ain*"]) == 0
for cut in ("w #1", "w?"):
    assert convert.main([f"--input={to}", f"--output=gs://bucket/{cut}"]) == 2
assert sample.main([*draw, "gs://bucket/none", "--output=gs://bucket/ag ain*"]) == 2
assert sample.main([*draw, "gs://bucket/w %41 [2]", "--output=gs://none/out"]) == 2
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with FakeGCS(tmp_path_factory.mktemp("gcs"), "bucket") as gcs:
        yield gcs


@pytest.fixture
def ran(bucket, tiny_config, tiny_vae):
    """The bucket after `WHOLE_RUN`, and what it printed."""
    if not hasattr(bucket, "output"):
        for file in tiny_vae.iterdir():
            bucket.write(f"bucket/vae/{file.name}", file.read_bytes())
        tiny_config.vae_from = "gs://bucket/vae"
        tiny_config.compilation_cache = "gs://bucket/xla"
        tiny_config.ema.update(profiles=("power-0.05",), snapshot_every=4)
        tiny_config.train.update(checkpoint_every=1, export=True)
        values = json.dumps(to_dict(resolve(tiny_config)))
        done = subprocess.run(
            [sys.executable, "-c", WHOLE_RUN, values],
            env=bucket.environment, timeout=900, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        bucket.output = done.stdout + done.stderr
    return bucket


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_and_leaves_what_it_promises(ran):
    assert "gs://bucket/runs/a [v2], resumed at step 2" in ran.output
    names = {name for name in ran.objects if name.startswith("bucket/runs/a [v2]/")}
    names = {name.removeprefix("bucket/runs/a [v2]/") for name in names}
    wanted = {
        "config.json", "frozen.json", "tokenizer/vocab.json", "metrics.jsonl",
        "samples/00000004.png", "ema_snapshots/00000004-power-0.05.safetensors",
        "diffusers/model_index.json", "diffusers/unet/diffusion_pytorch_model.safetensors",
        "checkpoints/3/config/metadata", "checkpoints/4/config/metadata",
    }  # fmt: skip
    assert wanted <= names, wanted - names
    assert "frozen.safetensors" not in names
    assert not any("INCOMPLETE" in name or "partial" in name for name in ran.objects)
    assert any(name.startswith("tensorboard/events") for name in names)
    assert any(name.startswith("bucket/xla/") for name in ran.objects)
    lines = ran.objects["bucket/runs/a [v2]/metrics.jsonl"].decode().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()


@pytest.mark.slow
def test_keep_last_holds_in_a_bucket_too(ran):
    kept = {name.split("/")[4] for name in ran.objects if "/a [v2]/checkpoints/" in name}
    assert kept - {""} == {"3", "4"}


@pytest.mark.slow
def test_what_is_converted_there_and_back_draws_the_same(ran):
    there = load_tensors(ran.objects["bucket/new [1]/vae/diffusion_pytorch_model.safetensors"])
    first = load_tensors(ran.objects["bucket/vae/diffusion_pytorch_model.safetensors"])
    assert there.keys() == first.keys()
    assert all(np.array_equal(there[name], first[name]) for name in first)
    assert ran.objects["bucket/ag ain*/00000.png"][:8] == b"\x89PNG\r\n\x1a\n"
    for message in ("gs://bucket/new [1] is not empty", "gs://bucket/none: no such folder",
                    "gs://none/out cannot be made: there is no bucket none"):  # fmt: skip
        assert message in ran.output


def test_paths_that_are_neither_local_nor_gs():
    for wrong in ("s3://bucket/run", "gs://", "gs:///"):
        with pytest.raises(UserError, match="expected a local folder or gs://BUCKET/FOLDER"):
            paths.to_path(wrong)
    assert str(paths.absolute("gs://bucket/run")) == "gs://bucket/run"
