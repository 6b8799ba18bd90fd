"""What is said of networks that are read from a folder: a line for each folder, if it decides."""

import dataclasses

import pytest

from sdjax.checkpoints import assemble
from sdjax.checkpoints.references import Source
from sdjax.config import Config, to_dict
from sdjax.families.family import Model
from sdjax.families.sd import SD
from sdjax.families.sdxl import SDXL


@pytest.fixture(scope="module")
def recipe():
    return dataclasses.replace(Config(), vae_from="tiny")


def loaded(monkeypatch, found):
    """Every source is a pipeline without weights."""
    monkeypatch.setattr(assemble, "locate", lambda field, folder: Source(field, f"/{folder}"))
    monkeypatch.setattr(assemble, "read_source", lambda *args: found)
    monkeypatch.setattr(assemble, "folder_kind", lambda place: "diffusers")


def test_the_tiny_vae_is_told_in_one_line(recipe):
    assembled = assemble.assemble(recipe, with_tokenizer=False)
    assert assembled.notes == (
        "vae_from=tiny decides model.vae (block_out_channels, layers_per_block, norm_num_groups, "
        "sample_size, scaling_factor)",
    )


def test_a_pipeline_is_told_in_one_line_with_the_values_that_are_few(recipe, monkeypatch):
    config = dataclasses.replace(recipe, init_from="DIR", vae_from="")
    networks = {
        "unet": dataclasses.replace(config.model.unet, sample_size=99, layers_per_block=3),
        "text_encoder": config.model.text_encoder,
        "text_encoder_2": config.model.text_encoder,
        "vae": config.model.vae,
    }
    whole = Model(
        SDXL,
        networks,
        {"zero_empty_prompt": True},
        schedule=dataclasses.replace(config.schedule, beta_start=0.001),
        prediction_type="v_prediction",
    )
    loaded(monkeypatch, whole)
    assembled = assemble.assemble(config, with_tokenizer=False)
    (note,) = assembled.notes
    assert note.startswith("init_from=DIR decides model.unet (sample_size, layers_per_block), ")
    values = "schedule.beta_start = 0.001, objective.prediction_type = 'v_prediction'"
    for part in ("model.text_encoder_2, ", "model.zero_empty_prompt = True", values):
        assert part in note
    assert "model.vae" not in note and "\n" not in note
    assert to_dict(assembled.config)["schedule"]["beta_start"] == 0.001


def test_a_folder_that_agrees_with_the_recipe_is_not_mentioned(recipe, monkeypatch):
    config = dataclasses.replace(recipe, vae_from="DIR")
    loaded(monkeypatch, Model(SD, {"vae": config.model.vae}))
    assert assemble.assemble(config, with_tokenizer=False).notes == ()


def test_many_fields_of_a_network_are_counted(recipe, monkeypatch):
    config = dataclasses.replace(recipe, vae_from="DIR")
    vae = config.model.vae
    changes = {"sample_size": 96, "layers_per_block": 3, "norm_num_groups": 4, "latent_channels": 8,
               "scaling_factor": 0.5, "block_out_channels": (8, 8, 8, 8)}  # fmt: skip
    loaded(monkeypatch, Model(SD, {"vae": dataclasses.replace(vae, **changes)}))
    (note,) = assemble.assemble(config, with_tokenizer=False).notes
    assert note.endswith("and 1 more)") and note.count(",") == 4
