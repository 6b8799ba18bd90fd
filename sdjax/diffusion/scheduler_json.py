"""Reading and writing the `scheduler_config.json` of a diffusers pipeline.

A scheduler file says three things at once: the noise schedule a network was trained on, what the
network predicts, and how to sample from it. What sdjax cannot do exactly is an error, not ignored.

Two fields are read as `StableDiffusionPipeline` reads them, which corrects old files when it loads
them: steps_offset is 1 and clip_sample is False, whatever the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule

# The sampler a scheduler class stands for. PNDM's grid and end are DDIM's, its multistep rule is
# not ours: a pipeline that has it is sampled with DDIM.
_SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}

# Values a class takes where the file has none (diffusers 0.42, the constructors' signatures).
_COMMON_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "linspace",
    "shift": 1.0,
}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"timestep_spacing": "leading"},
    "DDIMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}

# What each class must have for its sampler here to be the same sampler: field -> accepted values.
_NO_OTHER_SIGMAS = {"use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None)}
_ENDS_AT_ZERO = {"final_sigmas_type": ("zero",)}
_MULTISTEP = {
    **_NO_OTHER_SIGMAS,
    **_ENDS_AT_ZERO,
    "solver_order": (2,),
    "thresholding": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
_REQUIRED: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": {"thresholding": (False,), "variance_type": ("fixed_small",)},
    "DDIMScheduler": {"thresholding": (False,)},
    "PNDMScheduler": {},
    "EulerDiscreteScheduler": {
        **_NO_OTHER_SIGMAS,
        **_ENDS_AT_ZERO,
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "sigma_min": (None,),
        "sigma_max": (None,),
    },
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": _NO_OTHER_SIGMAS,
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads "deis" as "dpmsolver++"
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and these as "midpoint"
        "use_lu_lambdas": (False,),
        "lambda_min_clipped": (float("-inf"),),
        "variance_type": (None,),
    },
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # diffusers reads these as "bh2"
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([], ()),
        "solver_p": (None,),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "shift_terminal": (None,),
    },
    "FlowMatchEulerDiscreteScheduler": {
        "use_dynamic_shifting": (False,),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "use_karras_sigmas": (False, None),
        "stochastic_sampling": (False,),
        **_NO_OTHER_SIGMAS,
    },
}

# Fields that are read, and fields that change nothing given the accepted values above. Files carry
# fields of other classes along, from having been converted between them.
_READ = {*_COMMON_DEFAULTS, "set_alpha_to_one", "use_karras_sigmas", "trained_betas"}
_WITHOUT_EFFECT = {
    "steps_offset",
    "clip_sample",
    "clip_sample_range",
    "sample_max_value",
    "dynamic_thresholding_ratio",
    "skip_prk_steps",
    "lower_order_final",
    "euler_at_final",
    "flow_shift",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
}
_KNOWN = _READ | _WITHOUT_EFFECT | {field for fields in _REQUIRED.values() for field in fields}
_KARRAS_CLASSES = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def scheduler_from_diffusers(
    config: Mapping[str, Any], where: str = "scheduler_config.json"
) -> tuple[ScheduleConfig, str, SamplerConfig]:
    """Reads a scheduler file: (noise schedule, prediction_type, how to sample by default).

    config: the parsed JSON; where: its name, for messages.
    Raises ValueError naming every field that is unknown or that asks for what sdjax does not do.
    """
    cls = config.get("_class_name")
    if cls not in _SAMPLERS:
        raise ValueError(f"{where}: _class_name is {cls!r}; expected one of {', '.join(_SAMPLERS)}")
    _check_fields(cls, config, where)
    fields = {**_COMMON_DEFAULTS, **_CLASS_DEFAULTS.get(cls, {}), **config}
    try:
        if cls == "FlowMatchEulerDiscreteScheduler":
            schedule = ScheduleConfig(
                kind="flow",
                num_train_timesteps=fields["num_train_timesteps"],
                shift=fields["shift"],
            )
            return schedule, "flow", SamplerConfig(name="flow_euler")
        schedule = ScheduleConfig(
            kind=fields["beta_schedule"],
            beta_start=fields["beta_start"],
            beta_end=fields["beta_end"],
            num_train_timesteps=fields["num_train_timesteps"],
            zero_terminal_snr=bool(fields["rescale_betas_zero_snr"]),
        )
        # Only DDIM and PNDM have set_alpha_to_one; in other files it is left over from a conversion
        # and says nothing, and Stable Diffusion's value is the default.
        own_end = _CLASS_DEFAULTS.get(cls, {}).get("set_alpha_to_one") is not None
        sampler = SamplerConfig(
            name=_SAMPLERS[cls],
            spacing=fields["timestep_spacing"],
            steps_offset=1,
            karras=cls in _KARRAS_CLASSES and bool(fields.get("use_karras_sigmas")),
            set_alpha_to_one=own_end and fields["set_alpha_to_one"],
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return schedule, fields["prediction_type"], sampler


def _check_fields(cls: str, config: Mapping[str, Any], where: str) -> None:
    """Collects everything in `config` that cannot be honoured into one ValueError."""
    present = {field: value for field, value in config.items() if not field.startswith("_")}
    problems = [
        f"{field} = {value!r}: unknown field"
        for field, value in present.items()
        if field not in _KNOWN
    ]
    required = {"trained_betas": (None,), **_REQUIRED[cls]}
    if cls != "FlowMatchEulerDiscreteScheduler":
        required["prediction_type"] = ("epsilon", "v_prediction", "sample")
    for field, accepted in required.items():
        if field in present and present[field] not in accepted:
            expected = " or ".join(repr(value) for value in accepted)
            problems.append(f"{field} = {present[field]!r}: expected {expected}")
    if problems:
        raise ValueError(
            f"{where} ({cls}) has settings that sdjax does not support:\n  " + "\n  ".join(problems)
        )


def scheduler_to_diffusers(
    schedule: ScheduleConfig, prediction_type: str, sampler: SamplerConfig | None = None
) -> dict[str, Any]:
    """The contents of a `scheduler_config.json` with the same noise schedule.

    DDIMScheduler (DDPMScheduler for the "sigmoid" schedule, which DDIM does not have), or
    FlowMatchEulerDiscreteScheduler for flow. sampler gives its timestep grid; without one, it is
    "trailing" for a zero terminal SNR and "leading" otherwise. A schedule with an snr_scale is
    written as trained_betas, which scheduler_from_diffusers does not read.
    Raises ValueError for a prediction_type that diffusers cannot sample with this schedule.
    """
    if (prediction_type == "flow") != (schedule.kind == "flow"):
        raise ValueError(
            f"prediction_type is {prediction_type!r} with schedule.kind {schedule.kind!r}; "
            "diffusers has flow schedules with prediction_type 'flow' only, and no other schedule "
            "with it"
        )
    if schedule.kind == "flow":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": schedule.num_train_timesteps,
            "shift": schedule.shift,
        }
    if sampler is None:
        sampler = SamplerConfig(spacing="trailing" if schedule.zero_terminal_snr else "leading")
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler" if schedule.kind == "sigmoid" else "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.kind,
        "trained_betas": None,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "prediction_type": prediction_type,
        "timestep_spacing": sampler.spacing,
        "steps_offset": sampler.steps_offset,
        "clip_sample": False,
        "thresholding": False,
    }
    if schedule.kind != "sigmoid":
        config["set_alpha_to_one"] = sampler.set_alpha_to_one
    if schedule.snr_scale != 1.0:  # no field of a diffusers scheduler says this but the betas
        alphas_cumprod = make_schedule(schedule).alphas_cumprod
        kept = alphas_cumprod[1:] / alphas_cumprod[:-1]
        config["trained_betas"] = [1.0 - alphas_cumprod[0], *(1.0 - kept)]
        config["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
    return config
