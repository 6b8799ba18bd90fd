"""Runs of milliseconds from a tiny folder, for methods that begin from a model."""

import json
import shutil

import numpy as np
import torch

from sdjax.config import default


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
