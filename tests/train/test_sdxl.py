"""Whole runs of the tiny SDXL: its recipe, resumed to the bit, drawn from, told of sizes."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve, to_dict
from sdjax.config_changes import compare_configs
from sdjax.config_model import method_of_run
from sdjax.diffusion.losses import example_keys
from sdjax.families.conditioning import encode_text
from sdjax.methods.method import Draw
from sdjax.train import loop
from tests.train.test_loop import assert_same_run, rows

RECIPE = Path(__file__).parents[2] / "configs" / "sdxl_tiny.py"


@pytest.fixture
def config(tiny_vae, shapes_dir):
    return make_config(tiny_vae, shapes_dir)


def make_config(tiny_vae, shapes_dir):
    """The recipe, for pictures of 16 px and steps of milliseconds."""
    spec = importlib.util.spec_from_file_location("sdxl_tiny", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.vae_from = str(tiny_vae)
    c.data.update(
        data_dir=str(shapes_dir),
        resolution=16,
        batch_size=8,
        shapes_train=40,
        shapes_test=8,
        shapes_pairs=0.35,
        crop="random",
        threads=1,
    )
    for encoder in (c.model.text_encoder, c.model.text_encoder_2):
        encoder.update(hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    c.model.unet.update(  # attention in the middle alone, two blocks deep
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        transformer_layers_per_block=(2,),
        attention_head_dim=(2,),
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    c.train.update(steps=4, log_every=1, checkpoint_every=2, sample_every=0)
    c.sample.update(count=2)
    c.sample.sampler.steps = 2
    return c


def run(config, workdir, **changes):
    config.update_from_flattened_dict(changes)
    return loop.run(resolve(config), str(workdir))


def test_trains_resumes_to_the_bit_and_is_started_from(config, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(config, whole, **{"train.export": True}) == loop.DONE
    # What a kill after the checkpoint of step 2 leaves.
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    shutil.rmtree(broken / "samples")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 2]
    (broken / "metrics.jsonl").write_text("".join(kept))
    assert run(config, broken, **{"train.export": False}) == loop.DONE
    assert (broken / "samples" / "00000004.png").exists()
    assert_same_run(whole, broken)
    last = rows(whole)[4]
    for group in ("unet.add_embedding", "text_encoder.encoder", "text_encoder_2.text_projection"):
        assert np.isfinite(last[f"train/grad_norms/{group}"]), group
    assert (whole / "samples" / "00000004.png").exists()
    index = json.loads((whole / "diffusers" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True

    # Another run starts from it, and takes its rule for empty captions along.
    config.update(init_from=str(whole / "diffusers"), vae_from="")
    config.model.zero_empty_prompt = False
    assembled = assemble(resolve(config))
    assert assembled.config.model.zero_empty_prompt
    assert list(assembled.tokenizers) == ["tokens", "tokens_2"]
    assert {p.split(".")[0] for p in assembled.params} == {
        "unet", "vae", "text_encoder", "text_encoder_2",
    }  # fmt: skip


def test_another_rule_for_empty_captions_does_not_continue_a_run(config):
    saved = to_dict(resolve(config))
    config.model.zero_empty_prompt = False
    config.model.text_encoder_2.hidden_size = 32
    found = compare_configs(saved, to_dict(resolve(config)))
    assert [d.field for d in found] == [
        "model.text_encoder_2.hidden_size",
        "model.zero_empty_prompt",
    ]
    assert all(d.breaks for d in found)


@pytest.fixture(scope="module")
def losses(tiny_vae, shapes_dir):
    """A function (caption dropout, batch) -> losses [4], of networks in which nothing is zero; and
    one that makes batches."""
    config = make_config(tiny_vae, shapes_dir)
    assembled = assemble(resolve(config))
    rng = np.random.default_rng(0)
    params: dict = {}

    @functools.cache
    def step(rate):
        config.objective.caption_dropout = rate
        full = dataclasses.replace(resolve(config), model=assembled.config.model)
        method = method_of_run(full, assembled.tokenizers)
        if not params:
            params.update(
                {
                    path: jnp.asarray(rng.normal(size=v.shape, scale=0.2), jnp.float32)
                    for path, v in method.abstract.items()
                }
            )
        key = jax.random.key(1)
        positions = jnp.arange(4)
        keys = example_keys(key, positions)
        draw = Draw(key, keys, positions, 4)
        loss = lambda params, batch: method.phases[0].loss(params, {}, {}, batch, draw)[0]  # noqa: E731
        # It runs a few times: optimisations take longer than they save.
        return jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})

    def of(rate, batch):
        return np.asarray(step(rate)(params, batch))

    image = rng.uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    size = np.array([[20, 30, 0, 5]] * 4, np.int32)

    def batch(texts, size=size):
        return {"image": image, "size": size, **encode_text(assembled.tokenizers, texts)}

    return of, batch


def test_a_dropped_caption_is_an_empty_one_for_both_encoders(losses):
    of, batch = losses
    captions = ["a red circle", "a blue square", "a green star", "a red star"]
    dropped, kept = of(1.0, batch(captions)), of(0.0, batch(captions))
    np.testing.assert_array_equal(dropped, of(0.0, batch([""] * 4)))
    assert np.all(dropped != kept)
    some = of(0.5, batch(captions))
    assert np.all((some == kept) | (some == dropped))
    assert np.any(some == kept) and np.any(some == dropped)


def test_the_original_size_and_the_crop_are_told(losses):
    of, batch = losses
    captions = ["a red circle"] * 4
    sizes = np.array([[20, 30, 0, 5], [20, 31, 0, 5], [20, 30, 1, 5], [20, 30, 0, 6]], np.int32)
    plain, other = of(0.0, batch(captions)), of(0.0, batch(captions, sizes))
    assert plain[0] == other[0] and np.all(plain[1:] != other[1:])
