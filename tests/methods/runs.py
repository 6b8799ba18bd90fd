"""Runs of milliseconds from a tiny folder, for methods that begin from a model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import orbax.checkpoint as ocp
import torch

from sdjax.config import default
from sdjax.models import weights
from sdjax.models.params import component


def begun_from(config, folder, method):
    """The tiny recipe of a method that begins from a folder."""
    c = default(method=method)
    for group in ("data", "model", "optim", "train", "validation", "sample", "tokenizer"):
        c[group] = config[group]
    c.update(init_from=str(folder), compilation_cache=config.compilation_cache)
    c.data.batch_size = 4
    c.optim.groups = ((r"^text_encoder", 0.0),)
    c.train.update(steps=2, checkpoint_every=1)
    return c


def broken_off(workdir, copy, step):
    """What a kill after the checkpoint of a step leaves of a run."""
    shutil.copytree(workdir, copy)
    for place in (copy / "checkpoints").iterdir():
        if place.name.isdigit() and int(place.name) > step:
            shutil.rmtree(place)
    shutil.rmtree(copy / "samples", ignore_errors=True)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (copy / "metrics.jsonl").write_text("".join(kept))
    return copy


def to_torch(x):
    """[N, H, W, C] of NumPy -> [N, C, H, W] of torch, float32."""
    return torch.from_numpy(np.asarray(x, np.float32).transpose(0, 3, 1, 2).copy())


def torch_unet(config, params, name="unet"):
    """The torch network of one of the parameters' networks."""
    unet = diffusers.UNet2DConditionModel.from_config(config.to_json())
    unet.set_default_attn_processor()
    tensors = weights.to_diffusers({p: np.asarray(v) for p, v in component(params, name).items()})
    unet.load_state_dict({key: torch.from_numpy(np.array(v)) for key, v in tensors.items()})
    return unet


def on_devices(config, workdir, *, mesh="8,1", kill=0):
    """Run a recipe in a process of so many devices, which kills itself before step `kill`."""
    file = workdir.with_suffix(".json")
    file.write_text(config.to_json())
    script = str(Path(__file__).with_name("distil_run.py"))
    done = subprocess.run(
        [sys.executable, script, str(file), str(workdir), str(kill), mesh],
        capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-3000:]
    return workdir


def rows(workdir):
    """{step: metrics} of the steps."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "train/loss" in row}


def state_of(workdir, step):
    """{name: array} of everything in the train state of a checkpoint."""
    folder = workdir / "checkpoints" / str(step) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(folder).tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    found = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=whole))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(v) for p, v in leaves}


def assert_same_state(one, other, step):
    """The train states of two runs are equal to the bit."""
    want, have = state_of(one, step), state_of(other, step)
    assert want.keys() == have.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(value, have[path], err_msg=path)
