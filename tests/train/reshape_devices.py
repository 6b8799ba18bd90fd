"""Run by test_reshape.py in processes of their own, with 8 virtual devices or as one of 2 hosts.

python reshape_devices.py run CONFIG.json FOLDER       train on one mesh, go on on another
python reshape_devices.py host CONFIG.json WORKDIR PROCESS PORT    restore as one of two hosts
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.checkpoints.checkpoint import Checkpoints
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.parallel import sharding
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train import loop, program
from sdjax.train.frozen import read_frozen

MESHES = {"whole": [(1, 1, 1), (1, 8, 1), (2, 2, 2)], "moved": [(1, 1, 1), (8, 1, 1), (1, 1, 2)]}
sharding.MIN_FSDP_SIZE = 64  # the model is tiny


def abstract(workdir, sizes):
    """The program of a workdir's run on a mesh of these sizes."""
    config = resolve(json.loads((workdir / "config.json").read_text()))
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    length = config.model.text_encoder.max_position_embeddings
    tokenizer = Tokenizer.load(workdir / "tokenizer", context_length=length)
    return program.build(config, method_of_run(config, {"tokens": tokenizer}), mesh)


def restore(workdir, sizes, step):
    built = abstract(workdir, sizes)
    with Checkpoints(workdir) as checkpoints:
        _, state, data, _ = checkpoints.restore(built.state, step)
    frozen = read_frozen(workdir / "frozen.safetensors", built.frozen)
    leaves = jax.tree_util.tree_leaves_with_path({"state": state, "frozen": frozen})
    wanted = jax.tree.leaves({"state": built.state, "frozen": built.frozen})
    for (path, leaf), want in zip(leaves, wanted, strict=True):
        assert leaf.sharding == want.sharding, path
        part = want.sharding.shard_shape(want.shape)
        assert all(shard.data.shape == part for shard in leaf.addressable_shards), path
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, data


def train(config, folder):
    """2 + 2 steps on other meshes beside 4 on one; then either's checkpoints on every mesh."""
    config["mesh"]["data"] = 8
    assert loop.run(resolve(config), str(folder / "whole")) == loop.DONE
    shutil.copytree(folder / "whole", folder / "moved")
    shutil.rmtree(folder / "moved" / "checkpoints" / "4")
    config["mesh"].update(data=1, fsdp=8)
    assert loop.run(resolve(config), str(folder / "moved")) == loop.DONE
    for name in ("whole", "moved"):
        first, first_data = restore(folder / name, MESHES[name][0], 4)
        for sizes in MESHES[name][1:]:
            there, data = restore(folder / name, sizes, 4)
            assert data == first_data
            assert all(there[path].tobytes() == first[path].tobytes() for path in first), sizes
        (folder / f"{name}.json").write_text(json.dumps(first_data))
        np.savez(folder / f"{name}.npz", **first)


def bytes_read():
    """What TensorStore has read from files so far."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/")
    return sum(
        value["value"] for m in metrics if m["name"].endswith("bytes_read") for value in m["values"]
    )


def host(workdir, process, port):
    """Restore the arrays of test_reshape.py, split in two; what was read, and a sum, as JSON."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = make_mesh(MeshConfig(1, 2, 1))
    halves = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {
        "params": {
            name: jax.ShapeDtypeStruct((2048, 1024), np.float32, sharding=halves) for name in "ab"
        }
    }
    with Checkpoints(workdir) as checkpoints:
        before = bytes_read()
        _, state, _, _ = checkpoints.restore(state)
        read = bytes_read() - before
    parts = [leaf.addressable_shards for leaf in jax.tree.leaves(state)]
    assert all(len(part) == 1 for part in parts)
    total = float(sum(np.asarray(part[0].data, np.float64).sum() for part in parts))
    held = sum(part[0].data.nbytes for part in parts)
    print(json.dumps({"read": read, "held": held, "sum": total}))


if __name__ == "__main__":
    verb, *more = sys.argv[1:]
    if verb == "run":
        train(json.loads(Path(more[0]).read_text()), Path(more[1]))
    else:
        host(more[0], *map(int, more[1:]))
