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
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import torch

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.checkpoint import restore_params
from sdjax.checkpoints.controls import read_control
from sdjax.config import default, resolve
from sdjax.config_model import method_of_run
from sdjax.data.pipeline import make_iterator
from sdjax.diffusion.losses import example_keys
from sdjax.methods.method import Draw
from sdjax.models import weights
from sdjax.models.params import component
from sdjax.train import startup


def begun_from(config, folder, method):
    """The tiny recipe of a method that begins from a folder."""
    c = default(method=method)
    for group in ("data", "model", "optim", "train", "validation", "sample", "tokenizer"):
        c[group] = config[group]
    c.update(init_from=str(folder))
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


def read(config):
    """(what a run begins with, its method)."""
    assembled = assemble(resolve(config))
    made = method_of_run(assembled.config, assembled.tokenizers)
    return startup.begin(assembled, made, None), made


def begun(config):
    """(method, parameters at the start, a batch, what the loss draws)."""
    assembled, made = read(config)
    missing = made.abstract.keys() - assembled.every.keys()  # all would take long to compile
    draw = jax.jit(lambda key: {p: v for p, v in made.init(key).items() if p in missing})
    drawn = draw(jax.random.key(0))
    params = {**drawn, **{path: jnp.asarray(value) for path, value in assembled.every.items()}}
    data = make_iterator(
        assembled.config.data, assembled.tokenizers, split="train", seed=3,
        number_shapes=made.numbers,
    )  # fmt: skip
    batch = {name: jnp.asarray(value) for name, value in next(data).items()}
    data.close()
    key, positions = jax.random.key(5), jnp.arange(4)
    return made, params, batch, Draw(key, example_keys(key, positions), positions, 4)


def assert_is_what_it_exported(workdir, exported, name, step):
    """A workdir is read as the network that its run has trained, which is what it has written."""
    (config, values), (shape, params) = read_control(exported), read_control(workdir)
    assert config == shape and values.keys() == params.keys()
    average = component(restore_params(workdir, "ema:0.5", step), name)
    for path, value in values.items():
        np.testing.assert_array_equal(value, params[path])
        np.testing.assert_array_equal(value, average[path])
    return values


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
