"""Clip skip of SD1 against diffusers; kept in folders, refused for SD2."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch

from sdjax.config import default
from sdjax.errors import UserError
from sdjax.families.conditioning import encode_text, make_conditioner
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers

PROMPTS = ["a red circle", "a green star and a small red circle"]


@pytest.fixture(scope="module")
def model(pipeline_folder):
    return read_diffusers(pipeline_folder)


def skipping(model, count):
    return dataclasses.replace(model, settings={"clip_skip": count})


@pytest.mark.parametrize("count", [1, 2])
def test_context_is_that_of_diffusers(count, model, torch_pipeline):
    encoder, batch = torch_pipeline.text_encoder, encode_text(model.tokenizers, PROMPTS)
    ids = torch.from_numpy(np.asarray(batch["tokens"])).long()
    with torch.no_grad():  # StableDiffusionPipeline.encode_prompt, with its clip_skip = count - 1
        states = encoder(ids, output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(states[-count])
    conditioner = make_conditioner(skipping(model, count), model.tokenizers)
    with jax.default_matmul_precision("highest"):
        found = conditioner(dict(model.params), batch, target=(16, 16))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
    other = make_conditioner(skipping(model, 3 - count), model.tokenizers)
    assert np.abs(other(dict(model.params), batch, target=(16, 16)) - expected.numpy()).max() > 0.1


def test_a_folder_keeps_it_and_diffusers_loads_the_folder(model, tmp_path, caplog):
    write_diffusers(tmp_path / "folder", skipping(model, 2))
    assert read_diffusers(tmp_path / "folder").settings == {"clip_skip": 2}
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert "clip_skip" not in caplog.text
    write_diffusers(tmp_path / "plain", skipping(model, 1))
    assert read_diffusers(tmp_path / "plain").settings == {}


@pytest.mark.parametrize("count, act, message", [
    (3, "quick_gelu", "model.clip_skip is 3; expected 1 to 2"),
    (0, "quick_gelu", "model.clip_skip is 0; expected 1 to 2"),
    (2, "gelu", "expected 1 to 1, for SD2's text encoder comes without its last layer"),
])  # fmt: skip
def test_what_is_no_state_of_the_encoder_is_refused(count, act, message, model):
    encoder = dataclasses.replace(model.networks["text_encoder"], hidden_act=act)
    networks = {**model.networks, "text_encoder": encoder}
    with pytest.raises(UserError, match=message):
        model.family.check(dataclasses.replace(skipping(model, count), networks=networks))


def test_sdxl_has_no_such_setting():
    with pytest.raises(AttributeError):
        default(family="sdxl").model.clip_skip = 2
