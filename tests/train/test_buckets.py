"""Runs with buckets and a curriculum: a compilation for each shape, resuming, several hosts."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.checkpoints import checkpoint
from sdjax.config import Config, resolve
from sdjax.config_model import blank_method
from sdjax.data.tfds.tfds_on_cpu import tfds
from sdjax.models.config import ConfigError
from sdjax.parallel.mesh import make_mesh
from sdjax.train import loop, program
from tests.conftest import make_tiny_config, small_autoencoder
from tests.hosts import losses, run_hosts, write_recipe

SIZES = [(16, 16), (16, 32)]  # height, width; the buckets have the same aspects
SHAPES = {(16, 16, 3), (12, 20, 3), (8, 8, 3)}


class Wide(tfds.core.GeneratorBasedBuilder):
    """Twelve noisy pictures of each size."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)),
                    "text": tfds.features.Text()}  # fmt: skip
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(24), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        for i in range(count):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (*SIZES[i % 2], 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            yield str(i), {"image": io.BytesIO(buffer.getvalue()), "text": f"number {i}"}


@pytest.fixture(scope="module")
def config(tiny_vae, shapes_dir, tmp_path_factory):
    """The autoencoder, whose step compiles in seconds; small squares join from step 3 to 6."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    Wide(data_dir=folder, file_format="array_record").download_and_prepare()
    config = make_tiny_config(tiny_vae, shapes_dir)
    small_autoencoder(config)
    config.ema.profiles = ()
    config.data.update(name="wide", data_dir=folder, batch_size=4, resolution=16)
    config.data.buckets.update(step=2, max_aspect=2.5)
    config.data.mixture = (
        {"name": "wide"},
        {"name": "captioned_shapes", "resolution": 8, "start": 3, "end": 7},
    )
    config.train.update(steps=9, checkpoint_every=2, keep_last=9)
    return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing happens to: (workdir, {shape: compiled step}, shapes traced)."""
    compiled, traced = {}, []
    compile_step, made = program.compile_step, loop.method_of_run

    def counted(built, config):
        shape = built.batch["image"].shape[1:]
        assert shape not in compiled, "compiled twice"
        compiled[shape] = compile_step(built, config)
        return compiled[shape]

    def watched(*args):
        method = made(*args)

        (phase,) = method.phases

        def loss(trained, frozen, averages, batch, draw):
            traced.append(batch["image"].shape[1:])
            return phase.loss(trained, frozen, averages, batch, draw)

        return dataclasses.replace(method, phases=(dataclasses.replace(phase, loss=loss),))

    workdir = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "compile_step", counted)
        patch.setattr(loop, "method_of_run", watched)
        assert loop.run(resolve(config), str(workdir)) == loop.DONE
    return workdir, compiled, traced


def test_one_compilation_for_each_shape(whole):
    workdir, compiled, traced = whole
    assert set(compiled) == set(traced) == SHAPES
    found = losses(workdir)
    assert sorted(found) == list(range(1, 10)) and np.all(np.isfinite(list(found.values())))
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["data/0/bucket_16x16"] == first["data/0/bucket_20x12"] == 12
    assert first["data/1/bucket_8x8"] == 40


def test_resumes_to_the_bit_across_the_changes_of_a_curriculum(
    config, whole, tmp_path, monkeypatch, capsys
):
    """From a checkpoint of before the small squares came to after they went."""
    reference, compiled, _ = whole
    workdir = shutil.copytree(reference, tmp_path / "run")
    for step in checkpoint.all_steps(workdir):
        if step > 2:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 2]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    # The same programs as those of the first run, to save their compilation.
    monkeypatch.setattr(
        program, "compile_step", lambda built, config: compiled[built.batch["image"].shape[1:]]
    )
    assert loop.run(resolve(config), str(workdir)) == loop.DONE
    assert "resumed at step 2" in capsys.readouterr().out
    assert losses(workdir) == losses(reference)
    for a, b in zip(*map(jax.tree.leaves, map(checkpoint.restore_params, (workdir, reference))),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)

    other = config.copy_and_resolve_references()
    other.data.buckets.max_aspect = 3.0
    other.data.mixture = other.data.mixture[:1]
    with pytest.raises(ConfigError, match="(?s)data.buckets.max_aspect.*data.mixture"):
        loop.run(resolve(other), str(workdir))


def test_hosts_agree_on_the_shape_of_every_step(config, whole, tmp_path):
    """Two processes, who would wait for each other for ever if they did not."""
    recipe = write_recipe(tmp_path / "recipe.py", config)
    # Four steps have pictures of both sizes; each shape costs two compilations.
    codes, hosts = run_hosts(recipe, tmp_path / "run", 2, "--config.train.steps=4", total_devices=2)
    assert codes == [0, 0], hosts[0].err
    assert "data 2 x fsdp 1 x tensor 1: 2 x cpu, 2 host(s)" in hosts[0].out
    assert hosts[0].out.count("compiled in") == 2
    found, expected = losses(tmp_path / "run"), losses(whole[0])
    assert sorted(found) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(found.values()), [expected[step] for step in found], rtol=1e-4)


def test_text_to_image_takes_rectangles(tiny_config):
    """The same loss and state come of any shape, for one that is traced and not compiled."""
    config = resolve(tiny_config)
    method = blank_method(config)
    built = program.build(config, method, make_mesh(config.mesh, jax.devices()[:1]))
    batch = program.with_pictures(built.batch, (12, 20), 4)
    assert batch["image"].shape == (8, 12, 20, 3)
    state, metrics = built.step.eval_shape(built.state, built.frozen, batch)
    assert metrics["loss"].shape == ()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, built.state))
    assert shapes[0] == shapes[1]


def test_sides_that_the_networks_cannot_halve_are_named(config):
    config = config.copy_and_resolve_references()
    config.model.vae.update(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    config.data.mixture = ()
    config.data.buckets.step = 3
    with pytest.raises(ConfigError, match="data.buckets.step is 3, .* 1 times; .* multiple of 2"):
        program.check_shapes(resolve(config))
    config.data.buckets.step = 0
    config.data.mixture = ({"name": "wide"}, {"name": "wide", "resolution": 17})
    with pytest.raises(ConfigError, match=r"data.mixture\[1\].resolution is 17"):
        program.check_shapes(resolve(config))
    program.check_shapes(Config())
