"""The scheduler of a folder: read as torch's pipeline reads it, kept in all that is written."""

import dataclasses
import json
import shutil

import diffusers
import pytest

from sdjax import sample
from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.config import Config, resolve
from sdjax.config_model import model_of_run
from sdjax.convert import convert
from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.errors import UserError
from sdjax.families.sampler import choose_sampler
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.formats.single_file import Hints
from sdjax.train import startup

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LMS = {"_class_name": "LMSDiscreteScheduler", "steps_offset": 1, "timestep_spacing": "leading"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
DDPM = {"_class_name": "DDPMScheduler", "clip_sample": True, "clip_sample_range": 2.0}


@pytest.fixture
def folder_with(pipeline_folder, xl_folder, tmp_path):
    """(scheduler file, "" or "XL") -> a folder of a pipeline that has it."""

    def make(scheduler, xl=""):
        folder = shutil.copytree(xl_folder if xl else pipeline_folder, tmp_path / f"folder{xl}")
        scheduler = {**SD, **scheduler}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


def scheduler_of(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize("file", (LMS, DDPM), ids=lambda file: file["_class_name"])
def test_conversions_keep_the_scheduler_of_the_folder(file, folder_with, tmp_path):
    folder = folder_with(file)
    read = read_diffusers(folder)
    assert read.schedule == ScheduleConfig() and read.prediction_type == "epsilon"
    for target in ("workdir", "file.safetensors"):
        lines = convert(folder, tmp_path / target)
        told = any("which sdjax does not have" in line for line in lines)
        assert told == (bool(read.unsupported_sampler) and target == "workdir")
        between = read_any(tmp_path / target, hints=Hints(str(folder / "tokenizer")))
        assert between.sampler == read.sampler
        out = write_diffusers(tmp_path / f"out-{target}", between)
        assert scheduler_of(out) == {**SD, **file}
        index = json.loads((out / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", file["_class_name"]]


def test_offset_and_clipping_are_corrected_for_sd_and_kept_for_sdxl(folder_with):
    file = {"_class_name": "DDIMScheduler"}  # whose defaults are to clip, and no offset
    sd, xl = (read_diffusers(folder_with(file, kind), with_weights=False) for kind in ("", "XL"))
    assert (sd.sampler.steps_offset, sd.sampler.clip_sample) == (1, False)
    assert (xl.sampler.steps_offset, xl.sampler.clip_sample) == (0, True)


def test_class_of_the_index_is_the_one_that_counts(folder_with, tmp_path):
    folder = folder_with({"_class_name": "DDIMScheduler"})
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "HeunDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "HeunDiscreteScheduler"
    assert read_diffusers(folder).sampler.name == "heun"


def test_another_prediction_type_is_not_hidden_by_the_old_file(folder_with, tmp_path):
    read = read_diffusers(folder_with(LMS))
    changed = dataclasses.replace(read, prediction_type="v_prediction")
    out = write_diffusers(tmp_path / "out", changed)
    assert scheduler_of(out)["prediction_type"] == "v_prediction"
    assert read_diffusers(out).prediction_type == "v_prediction"


# ---- drawing -------------------------------------------------------------------------------------


def test_drawing_with_a_sampler_that_is_not_there_names_the_remedy(folder_with, tmp_path, capsys):
    folder = folder_with(LMS)
    options = [f"--model={folder}", "--prompts=a circle", f"--output={tmp_path / 'out'}"]
    assert sample.main(options) == 2
    message = capsys.readouterr().err
    assert "LMSDiscreteScheduler" in message and "--sampler=euler" in message
    assert len(message.strip().splitlines()) == 1

    read = read_diffusers(folder, with_weights=False)
    args = sample.parser().parse_args([*options, "--sampler=heun", "--steps=7"])
    chosen = sample._sampler(read, args)
    assert chosen == SamplerConfig(name="heun", steps=7, spacing="leading", steps_offset=1)
    note = capsys.readouterr().err
    assert "LMSDiscreteScheduler" in note and "heun draws instead" in note


def test_pndm_is_drawn_with_as_it_is(folder_with, capsys):
    read = read_diffusers(folder_with(PNDM), with_weights=False)
    args = sample.parser().parse_args(["--model=m", "--prompts=p", "--output=o"])
    assert sample._sampler(read, args) == SamplerConfig(name="pndm")
    assert capsys.readouterr().err == ""


def test_another_sampler_keeps_the_grid_and_clips_if_it_can(folder_with):
    read = read_diffusers(folder_with({**DDPM, "steps_offset": 2}, "XL"), with_weights=False)
    assert read.sampler.clip_sample_range == 2.0
    ddim = choose_sampler(read, {"name": "ddim"}, "m")
    assert ddim.clip_sample and ddim.clip_sample_range == 2.0 and ddim.steps_offset == 2
    euler = choose_sampler(read, {"name": "euler"}, "m")
    assert not euler.clip_sample and euler.steps_offset == 2
    with pytest.raises(UserError, match="sampler.clip_sample is True with sampler 'euler'"):
        choose_sampler(read, {"name": "euler", "clip_sample": True}, "m")


# ---- training ------------------------------------------------------------------------------------


def test_training_from_any_folder_says_what_draws_and_keeps_the_scheduler(
    folder_with, tiny_config, tmp_path
):
    folder = folder_with(LMS)
    tiny_config.update(init_from=str(folder), vae_from="")
    config: Config = resolve(tiny_config)
    assembled = assemble(config)
    [note] = [note for note in assembled.notes if "LMSDiscreteScheduler" in note]
    assert f"config.sample.sampler, {config.sample.sampler.name}" in note
    assert assembled.config.schedule == ScheduleConfig()

    # What a run writes at its start, and reads when it goes on
    workdir = tmp_path / "run"
    workdir.mkdir()
    startup.write_workdir(workdir, assembled.config, assembled.tokenizers, assembled.scheduler)
    again = startup.load(config, workdir, assembled.config)
    assert again.scheduler == assembled.scheduler == {**SD, **LMS}
    run = model_of_run(again.config, again.tokenizers, assembled.params, again.scheduler)
    assert scheduler_of(write_diffusers(tmp_path / "out", run)) == {**SD, **LMS}
