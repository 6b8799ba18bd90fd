"""What a workdir needs besides checkpoints: read in parts, and missed with a message."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from sdjax.config import Config
from sdjax.errors import UserError
from sdjax.system import paths
from sdjax.train import startup
from sdjax.train.frozen import read_frozen

ARRAYS = {
    "b.kernel": np.arange(24, dtype=np.float32).reshape(4, 6),
    "a.scale": np.arange(3, dtype=np.float32),
    "c": np.array(5, np.float32),
    "unused": np.zeros(7, np.float32),
}
MESH = Mesh(np.array(jax.devices()[:1]), ("fsdp",))


def wanted(**shapes):
    sharding = NamedSharding(MESH, PartitionSpec())
    return {
        name.replace("_", "."): jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        for name, shape in shapes.items()
    }


@pytest.fixture
def file(tmp_path):
    save_file(ARRAYS, tmp_path / "frozen.safetensors")
    return paths.to_path(tmp_path / "frozen.safetensors")


def test_the_wanted_arrays_are_read(file):
    found = read_frozen(file, wanted(a_scale=(3,), b_kernel=(4, 6), c=()))
    assert found.keys() == {"a.scale", "b.kernel", "c"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, ARRAYS[name])


def test_what_is_wrong_is_named(file):
    with pytest.raises(UserError, match=r"missing: d\n  a.scale is F32 \[3\], .* F32 \[4\]"):
        read_frozen(file, wanted(d=(3,), a_scale=(4,)))
    whole = file.read_bytes()
    for damaged in (whole[:-40], whole[:20], b"", b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="frozen.safetensors cannot be read: .*\n.*a copy"):
            read_frozen(file, wanted(b_kernel=(4, 6), unused=(7,)))
    kernel = ARRAYS["b.kernel"].copy()
    kernel[2, 1], kernel[3, 3:5] = np.nan, np.inf
    save_file({**ARRAYS, "b.kernel": kernel}, file)
    with pytest.raises(UserError, match="frozen.safetensors .*b.kernel: 1 NaN and 2 Inf among 24"):
        read_frozen(file, wanted(b_kernel=(4, 6)))
    assert read_frozen(file, wanted(a_scale=(3,))).keys() == {"a.scale"}
    file.unlink()
    with pytest.raises(UserError, match="frozen.safetensors cannot be read"):
        read_frozen(file, wanted(a_scale=(3,)))


def test_a_workdir_without_its_tokenizer_or_config(tmp_path):
    config = Config()
    folder = paths.to_path(tmp_path)
    with pytest.raises(UserError, match="tokenizer cannot be read: .*no vocab.json"):
        startup.load(config, folder, config)
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    with pytest.raises(UserError, match="has checkpoints, but .*config.json cannot be read"):
        startup.open_workdir(folder, config)
