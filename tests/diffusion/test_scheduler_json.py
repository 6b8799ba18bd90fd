"""Scheduler files: what they mean, what is refused, and that diffusers reads what is written."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest

from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.scheduler_json import scheduler_from_diffusers, scheduler_to_diffusers
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule

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


def test_hub_files_are_understood():
    schedule, prediction, sampler = scheduler_from_diffusers(SD15)
    assert schedule == ScheduleConfig() and prediction == "epsilon" and sampler == SamplerConfig()
    schedule, prediction, sampler = scheduler_from_diffusers(SD21)
    assert schedule == ScheduleConfig() and prediction == "v_prediction"
    assert sampler == SamplerConfig(name="ddim", spacing="leading", steps_offset=1)
    schedule, prediction, sampler = scheduler_from_diffusers(SDXL)
    assert schedule == ScheduleConfig() and sampler.name == "euler"
    schedule, prediction, sampler = scheduler_from_diffusers(SD3)
    assert schedule == ScheduleConfig(kind="flow", shift=3.0)
    assert prediction == "flow" and sampler.name == "flow_euler"


def test_alpha_flag_of_a_class_without_it_is_not_inherited():
    assert not scheduler_from_diffusers(SDXL)[2].set_alpha_to_one
    ddim = {**SD21, "set_alpha_to_one": True}
    assert scheduler_from_diffusers(ddim)[2].set_alpha_to_one
    del ddim["set_alpha_to_one"]
    assert scheduler_from_diffusers(ddim)[2].set_alpha_to_one  # the default of DDIMScheduler


@pytest.mark.parametrize(
    "cls, sampler",
    [
        ("DDPMScheduler", "ddpm"),
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("HeunDiscreteScheduler", "heun"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("UniPCMultistepScheduler", "unipc"),
        ("FlowMatchEulerDiscreteScheduler", "flow_euler"),
    ],
)
def test_files_written_by_diffusers_are_read_with_its_defaults(cls, sampler):
    written = json.loads(getattr(diffusers, cls)().to_json_string())
    full = scheduler_from_diffusers(written)
    assert full[2].name == sampler
    # A file that leaves every field out means the same as one that spells out the defaults
    assert scheduler_from_diffusers({"_class_name": cls}) == full
    if cls != "FlowMatchEulerDiscreteScheduler":
        reference = getattr(diffusers, cls)()
        np.testing.assert_allclose(
            make_schedule(full[0]).alphas_cumprod, reference.alphas_cumprod, rtol=2e-5
        )


def test_everything_unsupported_is_named_at_once():
    file = {**SD21, "thresholding": True, "trained_betas": [0.1, 0.2], "bogus": 3}
    with pytest.raises(ValueError) as error:
        scheduler_from_diffusers(file, "model/scheduler/scheduler_config.json")
    for part in ("model/scheduler", "thresholding", "trained_betas", "[0.1, 0.2]", "bogus = 3"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "cls, field, value",
    [
        ("DDPMScheduler", "variance_type", "learned_range"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True),
        ("DDIMScheduler", "beta_schedule", "laplace"),
        ("DDIMScheduler", "timestep_spacing", "random"),
        ("DDIMScheduler", "prediction_type", "score"),
    ],
)
def test_settings_that_change_the_maths_are_refused(cls, field, value):
    with pytest.raises(ValueError, match=f"file.json.*{value}|(?s:file.json.*{field})"):
        scheduler_from_diffusers({"_class_name": cls, field: value}, "file.json")


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="'LMSDiscreteScheduler'; expected one of DDPMScheduler"):
        scheduler_from_diffusers({"_class_name": "LMSDiscreteScheduler"})


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
    assert scheduler_from_diffusers(written)[:2] == (schedule, "v_prediction")


def test_written_file_keeps_the_sampler_grid():
    sampler = SamplerConfig(spacing="trailing", set_alpha_to_one=True)
    written = scheduler_to_diffusers(ScheduleConfig(), "epsilon", sampler)
    assert scheduler_from_diffusers(written) == (ScheduleConfig(), "epsilon", sampler)


def test_flow_file_round_trip():
    schedule = ScheduleConfig(kind="flow", shift=3.0)
    written = scheduler_to_diffusers(schedule, "flow")
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(written).shift == 3.0
    assert scheduler_from_diffusers(written)[:2] == (schedule, "flow")
    with pytest.raises(ValueError, match="flow schedules with prediction_type 'flow' only"):
        scheduler_to_diffusers(schedule, "sample")
    with pytest.raises(ValueError, match="no other schedule"):
        scheduler_to_diffusers(ScheduleConfig(), "flow")


def test_snr_scaled_schedule_is_written_as_betas_diffusers_reproduces():
    schedule = ScheduleConfig(snr_scale=(64 / 96) ** 2)
    loaded = diffusers.DDIMScheduler.from_config(scheduler_to_diffusers(schedule, "epsilon"))
    expected = make_schedule(schedule).alphas_cumprod
    np.testing.assert_allclose(loaded.alphas_cumprod, expected, rtol=1e-5, atol=2e-6)
