"""Diffusion-DPO: the loss of pairs against torch's, its start, and runs whose reference stays."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import bundle
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.diffusion.losses import example_keys
from sdjax.errors import UserError
from sdjax.methods import dpo
from sdjax.methods.method import Draw
from sdjax.models.config import ConfigError
from sdjax.train import loop
from tests.methods.runs import begun_from, broken_off
from tests.train.test_loop import assert_same_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pictures, each with a caption and a rejected one beside it."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for i in range(12):
        for name in (f"{i}.png", f"{i}.rejected.png"):
            Image.fromarray(rng.integers(0, 256, (18, 18, 3), np.uint8)).save(folder / name)
        (folder / f"{i}.txt").write_text(f"a picture {i}")
    return folder


@pytest.fixture
def config(tiny_config, tiny_model, pairs):
    c = begun_from(tiny_config, tiny_model, "dpo")
    c.data.update(
        name="image_text_folder", path=str(pairs), eval_split="train", flip=True, crop="random",
        images=({"name": "rejected"},),
    )  # fmt: skip
    c.objective.caption_dropout = 0.0
    c.optim.groups = ()
    return c


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_the_loss_of_a_difference_is_that_of_the_script(loss):
    """diffusers examples/research_projects/diffusion_dpo/train_diffusion_dpo.py, b = 2500."""
    differences = [0.001, 0.0, -0.002]
    logits = torch.tensor(differences, requires_grad=True)
    theirs = {
        "sigmoid": -torch.nn.functional.logsigmoid(2500 * logits),
        "hinge": torch.relu(1 - 2500 * logits),
        "ipo": (logits - 1 / (2 * 2500)) ** 2,
    }[loss]
    theirs.sum().backward()
    config = dpo.DPOConfig(loss=loss)
    ours = dpo.preference_loss(jnp.array(differences), config)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5)
    gradient = jax.grad(lambda x: dpo.preference_loss(x, config).sum())(jnp.array(differences))
    np.testing.assert_allclose(gradient, logits.grad, rtol=1e-5)
    if loss == "sigmoid":  # FT-42 and section 11: 0.0789 at 0.001, ln 2 at the start, -b / 2 there
        np.testing.assert_allclose(ours[:2], [0.0789, np.log(2)], atol=5e-5)
        np.testing.assert_allclose(gradient[1], -2500 / 2)
    np.testing.assert_array_equal(dpo.preferred(jnp.array(differences)), [1.0, 0.5, 0.0])


def test_the_start_is_a_tie_and_the_loss_is_the_formula(config):
    assembled = assemble(resolve(config))
    method = method_of_run(assembled.config, assembled.tokenizers)
    loaded = assembled.params | method.start(assembled.params)
    frozen = {path: jnp.asarray(value) for path, value in loaded.items()}
    assert {p.split(".")[0] for p in frozen} == {"unet", "vae", "text_encoder", "reference"}
    trained = {p: v for p, v in frozen.items() if p.startswith("unet.")}
    rng = np.random.default_rng(1)
    image, rejected = rng.uniform(-1, 1, (2, 4, 16, 16, 3)).astype(np.float32)
    words = next(iter(assembled.tokenizers))
    batch = {
        "image": jnp.asarray(image), "rejected": jnp.asarray(rejected),
        words: jnp.asarray(assembled.tokenizers[words].encode(["a", "b", "c", "d"])),
    }  # fmt: skip
    swapped = {**batch, "image": batch["rejected"], "rejected": batch["image"]}
    positions = jnp.arange(4)
    draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, 4)
    step = jax.jit(
        lambda trained, frozen, batch: method.phases[0].loss(trained, frozen, {}, batch, draw),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    loss, aux = step(trained, frozen, batch)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(aux["accuracy"], 0.5)
    moved = {p: v + 0.01 * rng.normal(size=v.shape).astype(np.float32) for p, v in trained.items()}
    win_ref, lose_ref = aux["win_loss"], aux["lose_loss"]  # of the start, which is the reference
    loss, aux = step(moved, frozen, batch)
    logit = -2500 * ((aux["win_loss"] - win_ref) - (aux["lose_loss"] - lose_ref))
    assert np.abs(logit).min() > 1e-3
    np.testing.assert_allclose(loss, -jax.nn.log_sigmoid(logit), rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(aux["accuracy"], np.asarray(logit) > 0)
    other, other_aux = step(moved, frozen, swapped)
    # One noise, one t: the rejected picture's error does not change with its place.
    np.testing.assert_allclose(other_aux["win_loss"], aux["lose_loss"], rtol=1e-5)
    np.testing.assert_allclose(other, -jax.nn.log_sigmoid(-logit), rtol=2e-3, atol=2e-3)
    timesteps = np.array([100.0, 600.0])
    found = method.validate({**frozen, **trained}, batch, draw.keys, timesteps)
    np.testing.assert_allclose(found, np.full((4, 2), np.log(2)), rtol=1e-6)


def test_a_run_refers_to_its_reference_and_resumes_to_the_bit(config, tmp_path, tiny_model):
    config.train.update(export=True)
    whole = tmp_path / "whole"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    references = json.loads((whole / "frozen.json").read_text())
    assert references["reference"]["network"] == "unet"
    assert references["reference"]["path"] == str(tiny_model)
    assert not (whole / "frozen.safetensors").exists()
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    last = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(last) if "train/loss" in row)
    for name in ("win_loss", "lose_loss", "accuracy"):
        assert f"train/{name}" in last
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(whole / "diffusers")
    start = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model)
    ours, theirs = (p.unet.conv_in.weight.detach().numpy() for p in (pipeline, start))
    assert ours.shape == theirs.shape and not np.array_equal(ours, theirs)
    assert {p.split(".")[0] for p in read_any(whole).params} == {"unet", "vae", "text_encoder"}
    # A copy that holds everything resumes too.
    alone = broken_off(whole, tmp_path / "alone", 1)
    assert "reference" in bundle(alone) and not (alone / "frozen.json").exists()
    assert loop.run(resolve(config), str(alone)) == loop.DONE
    assert_same_run(whole, alone)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weighting": "min_snr"}, "objective.weighting is 'min_snr'.*set it to 'uniform'"),
        ({"offset_noise": 0.1}, "objective.offset_noise is 0.1"),
        ({"loss": "huber"}, "objective.loss is 'huber'"),
    ],
)
def test_other_losses_are_refused(fields, words, config):
    assembled = assemble(resolve(config))
    objective = dataclasses.replace(assembled.config.objective, **fields)
    changed = dataclasses.replace(assembled.config, objective=objective)
    with pytest.raises(UserError, match=words):
        method_of_run(changed, assembled.tokenizers)


def test_a_start_without_weights_is_refused(config, tmp_path):
    config.update(init_from="", vae_from=config.init_from, text_encoder_from=config.init_from)
    with pytest.raises(ConfigError, match="the reference has no weights"):
        loop.run(resolve(config), str(tmp_path))


@pytest.mark.parametrize("fields", [{"loss": "log"}, {"beta": 0.0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        dpo.DPOConfig(**fields)
