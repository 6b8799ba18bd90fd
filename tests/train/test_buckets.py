"""A run with buckets and a mixture: one compilation for each shape, and resuming to the bit."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.config import Config, resolve
from sdjax.data.tfds_on_cpu import tfds
from sdjax.models.config import ConfigError
from sdjax.parallel.mesh import make_mesh
from sdjax.train import checkpoint, loop, program
from sdjax.train.conditioning import blank_tokenizers
from sdjax.train.task import make_task

SIZES = [(16, 16), (16, 32), (40, 20)]  # height, width; the buckets have the same aspects


class Tall(tfds.core.GeneratorBasedBuilder):
    """Twelve noisy pictures of each size."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)),
                    "text": tfds.features.Text()}  # fmt: skip
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(36), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        for i in range(count):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (*SIZES[i % 3], 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            yield str(i), {"image": io.BytesIO(buffer.getvalue()), "text": f"number {i}"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Tall(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def config(tiny_config, data_dir):
    """The autoencoder: its step compiles in seconds."""
    tiny_config.update(task="autoencoder", vae_from="")
    tiny_config.model.vae.update(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), layers_per_block=1, norm_num_groups=2,
        sample_size=16,
    )  # fmt: skip
    tiny_config.ema.profiles = ()
    tiny_config.data.update(name="tall", data_dir=data_dir, batch_size=4, resolution=16)
    tiny_config.data.buckets.update(step=2, max_aspect=2.0)
    tiny_config.train.update(steps=9, checkpoint_every=5)
    return tiny_config


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in lines if "train/loss" in row}


def test_one_compilation_for_each_bucket(config, tmp_path, monkeypatch, capsys):
    compiled, traced = [], []
    compile_step, make_task = program.compile_step, loop.make_task

    def counted(built, config):
        compiled.append(built.batch["image"].shape)
        return compile_step(built, config)

    def watched(*args):
        task = make_task(*args)

        def loss(params, frozen, batch, **rest):
            traced.append(batch["image"].shape)
            return task.loss(params, frozen, batch, **rest)

        return dataclasses.replace(task, loss=loss)

    monkeypatch.setattr(program, "compile_step", counted)
    monkeypatch.setattr(loop, "make_task", watched)
    assert loop.run(resolve(config), str(tmp_path / "whole")) == loop.DONE
    # Nine steps are an epoch: each bucket has had three of them.
    assert len(compiled) == len(set(compiled)) == 3 and set(traced) == set(compiled)
    assert all(np.isfinite(list(losses(tmp_path / "whole").values())))
    out = capsys.readouterr().out
    assert "36 in 3 bucket(s)" in out and out.count("compiled in") == 3
    first = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["data/bucket_16x16"] == 12

    # Stopped after five steps, and on.
    config.train.steps = 5
    assert loop.run(resolve(config), str(tmp_path / "parts")) == loop.DONE
    config.train.steps = 9
    assert loop.run(resolve(config), str(tmp_path / "parts")) == loop.DONE
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for a, b in zip(*(jax.tree.leaves(checkpoint.restore_params(tmp_path / name))
                      for name in ("whole", "parts")), strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    config.data.buckets.max_aspect = 3.0
    with pytest.raises(ConfigError, match="data.buckets.max_aspect"):
        loop.run(resolve(config), str(tmp_path / "parts"))


def test_text_to_image_takes_rectangles(tiny_config):
    """The same loss and state come of any shape, for one that is traced and not compiled."""
    config = resolve(tiny_config)
    task = make_task(config, blank_tokenizers(config.model))
    built = program.build(config, task, make_mesh(config.mesh, jax.devices()[:1]))
    batch = program.with_pictures(built.batch, (12, 20))
    assert batch["image"].shape == (8, 12, 20, 3)
    state, metrics = built.step.eval_shape(built.state, built.frozen, batch)
    assert metrics["loss"].shape == ()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, built.state))
    assert shapes[0] == shapes[1]


def test_sides_that_the_networks_cannot_halve_are_named(config):
    config.model.vae.update(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    config.data.buckets.step = 3
    with pytest.raises(ConfigError, match="data.buckets.step is 3, .* 1 times; .* multiple of 2"):
        program.check_shapes(resolve(config))
    config.data.buckets.step = 0
    config.data.mixture = ({"name": "tall"}, {"name": "tall", "resolution": 17})
    with pytest.raises(ConfigError, match=r"data.mixture\[1\].resolution is 17"):
        program.check_shapes(resolve(config))
    program.check_shapes(Config())
