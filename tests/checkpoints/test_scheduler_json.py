"""Scheduler files: what they mean, what is refused, and that diffusers reads what is written."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from types import ModuleType, SimpleNamespace

import diffusers
import numpy as np
import pytest

from sdjax.diffusion.flow_levels import FlowConfig
from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.formats.diffusers_folder import PIPELINES as READ
from sdjax.formats.scheduler_classes import CLASSES, FLOW_CLASSES, KNOWN_FIELDS
from sdjax.formats.scheduler_json import (
    Scheduler,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)

# The files of the hub checkpoints of Stable Diffusion 1.5, 2.1 and SDXL.
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = {
    **SD15,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
READ_FIELDS = {field for cls in CLASSES.values() for field in cls.defaults}
PIPELINES = [
    f"StableDiffusion{xl}{kind}Pipeline" for xl in ("", "XL") for kind in ("", "Img2Img", "Inpaint")
]


def scheduler_class(name):
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    with pytest.MonkeyPatch.context() as patch:  # its file imports what only its steps use
        patch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return getattr(module, name)


def test_hub_files_are_understood():
    read = scheduler_from_diffusers(SD15)
    assert read.schedule == ScheduleConfig() and read.prediction_type == "epsilon"
    assert read.sampler == SamplerConfig(name="pndm") and not read.unsupported
    read = scheduler_from_diffusers(SD21)
    assert read.schedule == ScheduleConfig() and read.prediction_type == "v_prediction"
    assert read.sampler == SamplerConfig(name="ddim", spacing="leading", steps_offset=1)
    read = scheduler_from_diffusers(SDXL)
    assert read.schedule == ScheduleConfig() and read.sampler.name == "euler"
    read = scheduler_from_diffusers(SD3)
    assert read.schedule == ScheduleConfig(kind="flow", shift=3.0)
    assert read.prediction_type == "flow" and read.sampler.name == "flow_euler"


def test_alpha_flag_of_a_class_without_it_is_not_inherited():
    assert not scheduler_from_diffusers(SDXL).sampler.set_alpha_to_one
    ddim = {**SD21, "set_alpha_to_one": True}
    assert scheduler_from_diffusers(ddim).sampler.set_alpha_to_one
    del ddim["set_alpha_to_one"]
    assert scheduler_from_diffusers(ddim).sampler.set_alpha_to_one  # the default of DDIMScheduler


@pytest.mark.parametrize("cls", CLASSES | FLOW_CLASSES)
def test_files_written_by_diffusers_are_read_with_its_defaults(cls):
    reference = scheduler_class(cls)()
    full = scheduler_from_diffusers(json.loads(reference.to_json_string()))
    # A file that leaves every field out means the same as one that spells out the defaults
    assert scheduler_from_diffusers({"_class_name": cls}) == full
    if full.prediction_type != "flow":
        np.testing.assert_allclose(
            make_schedule(full.schedule).alphas_cumprod, reference.alphas_cumprod, rtol=2e-5
        )


@pytest.mark.parametrize("cls", CLASSES | FLOW_CLASSES)
def test_fields_and_defaults_are_those_of_the_constructors(cls):
    found = (CLASSES | FLOW_CLASSES)[cls]
    constructor = scheduler_class(cls).__init__
    parameters = inspect.signature(constructor).parameters
    defaults = {
        name: p.default
        for name, p in parameters.items()
        if name in READ_FIELDS | found.defaults.keys()
    }
    if found.same and cls in CLASSES:
        assert found.defaults == defaults
    else:  # a sampler in its place needs not take everything
        assert found.defaults.items() <= defaults.items()
    for accepted in (found.trained, found.drawn):
        for field, values in accepted.items():
            default = parameters[field].default
            assert default in values or field == "skip_prk_steps"
    assert {name for name in parameters if name not in ("self", "kwargs")} <= KNOWN_FIELDS


@pytest.mark.parametrize("cls", ["DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_offset_and_clipping_are_as_the_file_or_its_class_says(cls):
    default = cls != "HeunDiscreteScheduler"
    assert scheduler_from_diffusers({"_class_name": cls}).sampler.clip_sample is default
    file = {"_class_name": cls, "clip_sample": True, "clip_sample_range": 2.5, "steps_offset": 3}
    for pipeline in ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"):
        changes = READ[pipeline].scheduler_changes(pipeline)
        sampler = scheduler_from_diffusers(file, changes=changes).sampler
        assert (sampler.steps_offset, sampler.clip_sample_range) == (3, 2.5) and sampler.clip_sample
    no_clip = scheduler_from_diffusers({**file, "clip_sample": False}).sampler
    assert not no_clip.clip_sample


@pytest.mark.parametrize("cls", [name for name, found in CLASSES.items() if found.same])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
def test_a_file_means_what_the_pipeline_of_diffusers_makes_of_it(cls, pipeline):
    """The constructors of some pipelines correct what they are given."""
    file = {"_class_name": cls, "skip_prk_steps": False}
    scheduler = getattr(diffusers, cls).from_config(file)
    network = SimpleNamespace(config=SimpleNamespace(sample_size=64, in_channels=9))
    parts = {"vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"}
    parts |= {"text_encoder_2", "tokenizer_2"}
    constructor = getattr(diffusers, pipeline)
    parts &= set(inspect.signature(constructor.__init__).parameters)
    given = dict.fromkeys(parts) | {"unet": network if "XL" not in pipeline else None}
    if "XL" not in pipeline:
        given["requires_safety_checker"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constructor, "register_modules", lambda self, **modules: None)
        patch.setattr(constructor, "vae", None, raising=False)
        constructor(scheduler=scheduler, **given)
    changes = READ[pipeline].scheduler_changes(pipeline)
    read = scheduler_from_diffusers(file, changes=changes)
    theirs = scheduler.config
    assert read.sampler.spacing == theirs.timestep_spacing
    assert read.sampler.steps_offset == theirs.steps_offset
    assert read.sampler.clip_sample is theirs.get("clip_sample", False)
    assert bool(read.unsupported) == (cls == "PNDMScheduler" and not theirs.skip_prk_steps)


def test_everything_unsupported_is_named_at_once():
    file = {**SD21, "prediction_type": "score", "trained_betas": [0.1, 0.2], "bogus": 3}
    with pytest.raises(ValueError) as error:
        scheduler_from_diffusers(file, "model/scheduler/scheduler_config.json")
    for part in ("model/scheduler", "'score'", "trained_betas", "[0.1, 0.2]", "bogus = 3"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "cls, field, value",
    [
        ("DDPMScheduler", "variance_type", "learned_range"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("PNDMScheduler", "rescale_betas_zero_snr", True),
        ("FlowMatchEulerDiscreteScheduler", "invert_sigmas", True),
        ("FlowMatchEulerDiscreteScheduler", "shift_terminal", "low"),
        ("LMSDiscreteScheduler", "trained_betas", [0.1]),
        ("DDIMScheduler", "beta_schedule", "laplace"),
        ("DDIMScheduler", "timestep_spacing", "random"),
        ("DDIMScheduler", "prediction_type", "score"),
    ],
)
def test_settings_that_change_what_was_trained_on_are_refused(cls, field, value):
    with pytest.raises(ValueError, match=f"file.json.*{value}|(?s:file.json.*{field})"):
        scheduler_from_diffusers({"_class_name": cls, field: value}, "file.json")


@pytest.mark.parametrize(
    "cls, field, value",
    [
        ("DDPMScheduler", "variance_type", "fixed_large"),
        ("DDIMScheduler", "thresholding", True),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
        ("EulerDiscreteScheduler", "use_exponential_sigmas", True),
        ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("PNDMScheduler", "skip_prk_steps", False),
    ],
)
def test_settings_of_the_sampler_alone_are_told_and_the_schedule_is_read(cls, field, value):
    plain = scheduler_from_diffusers({**SD15, "_class_name": cls})
    read = scheduler_from_diffusers({**SD15, "_class_name": cls, field: value})
    assert not plain.unsupported and read.unsupported == f"{cls} with {field} = {value!r}"
    assert read == dataclasses.replace(plain, unsupported=read.unsupported)


@pytest.mark.parametrize("cls", [name for name, found in CLASSES.items() if not found.same])
def test_schedule_of_a_class_without_its_sampler_is_read(cls):
    read = scheduler_from_diffusers({**SDXL, "_class_name": cls, "use_karras_sigmas": True})
    assert read.schedule == ScheduleConfig() and read.prediction_type == "epsilon"
    assert read.unsupported == cls
    assert (read.sampler.spacing, read.sampler.steps_offset) == ("leading", 1)


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="'EDMEulerScheduler'; expected one of DDPMScheduler"):
        scheduler_from_diffusers({"_class_name": "EDMEulerScheduler"})


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_written_file_gives_diffusers_the_same_schedule(kind, zero_terminal_snr, tmp_path):
    schedule = ScheduleConfig(kind=kind, zero_terminal_snr=zero_terminal_snr)
    written = scheduler_to_diffusers(schedule, "v_prediction")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    loaded = getattr(diffusers, written["_class_name"]).from_pretrained(tmp_path)
    expected = make_schedule(schedule).alphas_cumprod
    # torch multiplies a thousand float32 numbers near 1
    np.testing.assert_allclose(loaded.alphas_cumprod, expected, rtol=1e-3, atol=2e-6)
    assert loaded.config.prediction_type == "v_prediction"
    read = scheduler_from_diffusers(written)
    assert (read.schedule, read.prediction_type) == (schedule, "v_prediction")


def test_written_file_keeps_the_sampler_grid():
    sampler = SamplerConfig(
        spacing="trailing", set_alpha_to_one=True, clip_sample=True, clip_sample_range=2.0
    )
    written = scheduler_to_diffusers(ScheduleConfig(), "epsilon", sampler)
    read = Scheduler(ScheduleConfig(), "epsilon", sampler)
    assert scheduler_from_diffusers(written) == read


FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip


def test_dynamic_shifting_is_the_samplers_and_leaves_the_trained_schedule():
    read = scheduler_from_diffusers(FLUX, changes={"timestep_spacing": "trailing"})
    assert read.schedule == ScheduleConfig(kind="flow") and not read.unsupported
    flow = FlowConfig(dynamic="exponential")
    assert read.sampler == SamplerConfig(name="flow_euler", spacing="trailing", flow=flow)
    # The grid is the pipeline's: a field of the file that the class does not take says nothing.
    carried = scheduler_from_diffusers({**FLUX, "timestep_spacing": "trailing"})
    assert carried.sampler.spacing == SamplerConfig().spacing


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.02},
        {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192},
        {"shift": 3.0, "use_karras_sigmas": True, "base_shift": None},
        {"shift": 1.5, "use_exponential_sigmas": True, "stochastic_sampling": True},
        {"use_beta_sigmas": True, "num_train_timesteps": 500},
    ],
)
def test_every_setting_of_a_flow_is_read_and_written(fields):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
    read = scheduler_from_diffusers(dict(theirs.config) | {"_class_name": type(theirs).__name__})
    assert not read.unsupported
    written = scheduler_to_diffusers(read.schedule, read.prediction_type, read.sampler)
    again = diffusers.FlowMatchEulerDiscreteScheduler.from_config(written)
    for field, value in theirs.config.items():
        unread = field == "base_shift" and value is None
        assert field.startswith("_") or unread or again.config[field] == value, field
    assert scheduler_from_diffusers(written) == read


def test_flow_file_with_two_spreads_is_refused():
    file = {**SD3, "use_karras_sigmas": True, "use_beta_sigmas": True}
    with pytest.raises(ValueError, match="use_karras_sigmas and use_beta_sigmas: expected one"):
        scheduler_from_diffusers(file)
    with pytest.raises(ValueError, match="file.json: sampler.flow.dynamic is 'cubic'"):
        scheduler_from_diffusers({**FLUX, "time_shift_type": "cubic"}, "file.json")


def test_flow_file_round_trip():
    schedule = ScheduleConfig(kind="flow", shift=3.0)
    written = scheduler_to_diffusers(schedule, "flow")
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(written).shift == 3.0
    read = scheduler_from_diffusers(written)
    assert (read.schedule, read.prediction_type) == (schedule, "flow")
    with pytest.raises(ValueError, match="flow schedules with prediction_type 'flow' only"):
        scheduler_to_diffusers(schedule, "sample")
    with pytest.raises(ValueError, match="no other schedule"):
        scheduler_to_diffusers(ScheduleConfig(), "flow")


def test_snr_scaled_schedule_is_written_as_betas_diffusers_reproduces():
    schedule = ScheduleConfig(snr_scale=(64 / 96) ** 2)
    loaded = diffusers.DDIMScheduler.from_config(scheduler_to_diffusers(schedule, "epsilon"))
    expected = make_schedule(schedule).alphas_cumprod
    np.testing.assert_allclose(loaded.alphas_cumprod, expected, rtol=1e-5, atol=2e-6)
