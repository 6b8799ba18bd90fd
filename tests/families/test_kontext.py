"""FLUX.1-Kontext has dev's shape: its pipeline's class says what it is, and is kept."""

import json
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.config import default, resolve
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.formats.single_file import Hints
from sdjax.formats.single_file_writer import write_single_file
from tests.families import torch_transformers

diffusers = pytest.importorskip("diffusers")


def class_of(folder):
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


@pytest.fixture(scope="module")
def folder(torch_pipeline, tmp_path_factory):
    """A folder that `FluxKontextPipeline` has written."""
    place = tmp_path_factory.mktemp("kontext")
    parts = torch_transformers.flux(torch_pipeline.tokenizer, place / "t5").components
    diffusers.FluxKontextPipeline(**parts).save_pretrained(place / "folder")
    return place / "folder"


def test_folder_is_read_and_written_as_kontext(folder, tmp_path):
    model = read_diffusers(folder)
    assert class_of(folder) == "FluxKontextPipeline" and model.settings == {"kontext": True}
    save_workdir(tmp_path / "workdir", model)
    write_diffusers(tmp_path / "folder", read_any(tmp_path / "workdir"))
    assert class_of(tmp_path / "folder") == "FluxKontextPipeline"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipeline) is diffusers.FluxKontextPipeline


def test_single_file_of_ours_says_it_and_others_by_config_from(folder, tmp_path):
    model, file = read_diffusers(folder), tmp_path / "m.safetensors"
    write_single_file(file, model)
    hints = Hints(tokenizer=str(folder))
    assert read_any(file, hints=hints).settings["kontext"] is True
    save_file(load_file(file), file)  # without the header
    assert "kontext" not in read_any(file, hints=Hints(like=replace(model, settings={}))).settings
    assert read_any(file, hints=Hints(like=model)).settings["kontext"] is True


@pytest.mark.parametrize("cls", ["FluxPipeline", "FluxKontextInpaintPipeline"])
def test_run_from_a_folder_knows_what_it_trains(cls, folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": cls}
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    recipe = default(family="flux")
    recipe.init_from = str(tmp_path)
    assert assemble(resolve(recipe)).config.model.kontext is ("Kontext" in cls)
