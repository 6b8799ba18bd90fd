"""FLUX.1-Kontext has dev's shape: its pipeline's class says what it is, and is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.checkpoints.adapter_conversion import AdapterOptions, convert_adapter
from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.widening import widened
from sdjax.checkpoints.workdir import save_workdir
from sdjax.config import default, resolve
from sdjax.families.family import EDITS, FILLS, said_task
from sdjax.formats.adapters.layers import AdapterLayer
from sdjax.formats.adapters.writing import write_diffusers_adapter, write_kohya_adapter
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.formats.single_file import Hints
from sdjax.formats.single_file_writer import write_single_file
from sdjax.models.config import ConfigError
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


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """{name: a file of a LoRA} of a run on Kontext, and one of dev's."""
    place, model = tmp_path_factory.mktemp("loras"), read_diffusers(folder)
    rng = np.random.default_rng(0)
    path = "transformer.transformer_blocks.0.attn.to_q"
    down, up = rng.normal(size=(2, 2, 32)).astype(np.float32)
    adapter = {path: AdapterLayer("lora", {"lora_down": down, "lora_up": up.T})}
    files = {
        name: place / name / "a.safetensors" for name in ("diffusers", "kohya", "again", "dev")
    }
    write_diffusers_adapter(files["diffusers"], model, adapter)
    write_kohya_adapter(files["kohya"], model, adapter)
    write_kohya_adapter(files["dev"], replace(model, settings={}), adapter)
    options = {"form": "diffusers", "base": str(folder)}
    files["again"].parent.mkdir()
    convert_adapter(
        files["kohya"], files["again"], AdapterOptions(**options), weights="ema", step=None,
        dtype="float32", force=False, hints=Hints(),
    )  # fmt: skip
    return files


@pytest.mark.parametrize("name", ["diffusers", "kohya", "again", "dev"])
def test_lora_of_kontext_has_dev_read_a_picture_and_says_so(name, folder, loras, caplog):
    kontext = read_diffusers(folder)
    dev = replace(kontext, settings={})
    merged = with_loras(dev, [str(loras[name])])
    assert said_task(merged) == ("" if name == "dev" else EDITS)
    assert merged.denoiser == dev.denoiser
    assert ("give that as the model" in caplog.text) == (name != "dev")
    caplog.clear()
    assert with_loras(kontext, [str(loras[name])]).settings["kontext"] is True
    assert not caplog.records


def test_lora_of_kontext_does_not_fit_fill(folder, loras):
    model = widened(replace(read_diffusers(folder), settings={}), FILLS, name="dev")[0]
    with pytest.raises(ConfigError, match="kohya.*for another task"):
        with_loras(model, [str(loras["kohya"])])
