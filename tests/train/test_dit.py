"""Whole runs of the tiny SD3 and FLUX.1: their recipes, resumed to the bit, drawn by diffusers."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.train import loop
from tests.train.test_loop import assert_same_run, rows

CONFIGS = Path(__file__).parents[2] / "configs"
WIDTH = 16
TRANSFORMERS = {
    "sd3_tiny": dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=32,
        caption_projection_dim=WIDTH, pooled_projection_dim=16, dual_attention_layers=(0,),
    ),
    "flux_tiny": dict(
        num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=8,
        axes_dims_rope=(2, 4, 2), joint_attention_dim=32, pooled_projection_dim=8,
    ),
}  # fmt: skip
PIPELINES = {"sd3_tiny": "StableDiffusion3Pipeline", "flux_tiny": "FluxPipeline"}


@pytest.fixture(params=TRANSFORMERS)
def name(request):
    return request.param


@pytest.fixture
def config(name, tiny_vae, shapes_dir):
    """The recipe, for pictures of 16 px and small steps."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.vae_from = str(tiny_vae)
    c.data.update(
        data_dir=str(shapes_dir), resolution=16, batch_size=8, shapes_train=40, shapes_test=8,
        threads=1,
    )  # fmt: skip
    for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        group = c.model.get(encoder)
        if group is not None and "d_model" in group:
            group.update(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        elif group is not None:
            group.update(hidden_size=8, intermediate_size=16, num_hidden_layers=2)
            group.num_attention_heads = 2
            if group.projection_dim is not None:
                group.projection_dim = 8
    c.model.transformer.update(TRANSFORMERS[name])
    c.objective.encoder_dropout = 0.2
    c.optim.name = "adamw"  # compiles faster than the recipe's Muon
    c.ema.profiles = ("warmup-0.9",)
    c.train.update(steps=4, log_every=1, checkpoint_every=2, sample_every=4)
    c.validation.update(examples=0, train_examples=0)
    c.sample.update(count=2, fidelity=0)
    c.sample.sampler.steps = 2
    return c


def test_trains_resumes_to_the_bit_and_is_drawn_by_diffusers(name, config, tmp_path):
    import diffusers

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    # What a kill after the checkpoint of step 2 leaves.
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 2]
    (broken / "metrics.jsonl").write_text("".join(kept))
    config.train.export = False
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    losses = [rows(whole)[step]["train/loss"] for step in range(1, 5)]
    assert np.isfinite(losses).all() and len(set(losses)) == 4

    trained = read_any(whole)
    assert trained.settings["max_sequence_length"] == 20
    table = "transformer.pos_embed.pos_embed"
    assert (table in trained.params) == (name == "sd3_tiny")
    pipeline = getattr(diffusers, PIPELINES[name]).from_pretrained(whole / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a red circle"], height=16, width=16, num_inference_steps=2, max_sequence_length=20,
        output_type="np",
    ).images  # fmt: skip
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all() and images.std() > 0


@pytest.mark.parametrize("field, value", [("model.max_sequence_length", 24)])
def test_another_length_of_text_does_not_continue_a_run(config, field, value):
    from sdjax.config import to_dict
    from sdjax.config_changes import compare_configs

    saved = to_dict(resolve(config))
    config.update_from_flattened_dict({field: value})
    (found,) = compare_configs(saved, to_dict(resolve(config)))
    assert found.field == field and found.breaks
