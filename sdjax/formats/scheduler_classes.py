"""The scheduler classes of diffusers (0.42): what each takes, and which sampler here it is.

Fields that a class does not take say nothing in its file: files carry them along from having been
converted between classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# The noise schedule and the prediction, which every class but those of flows takes.
_TABLE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_K_DIFFUSION = {**_TABLE, "beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {**_K_DIFFUSION, "beta_schedule": "scaled_linear"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_RESCALE = {"rescale_betas_zero_snr": False}
_KARRAS = {"use_karras_sigmas": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}

# What the sampler of a class must be told to be the same sampler here: field -> accepted values.
_NO_OTHER_SIGMAS = {"use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None)}
_MULTISTEP = {
    **_NO_OTHER_SIGMAS,
    "final_sigmas_type": ("zero",),
    "solver_order": (2,),
    "thresholding": (False,),
}
# What no sampler can make up for, as it says what the network was trained on.
_NO_FLOW = {"use_flow_sigmas": (False,), "use_dynamic_shifting": (False,)}
_FIXED_VARIANCE = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
_NOT_LEARNED = {"variance_type": (None, *_FIXED_VARIANCE)}


@dataclasses.dataclass(frozen=True)
class SchedulerClass:
    """A scheduler class of diffusers.

    sampler: the sampler here; the one nearest to it where `same` is False.
    defaults: {field: value where the file has none} of the fields that are read.
    trained: {field: accepted values} of those that decide what the network was trained on.
    drawn: {field: accepted values} with which `sampler` is the same sampler. Without the field, a
        class takes the first.
    same: whether sdjax has the sampler of this class.
    """

    sampler: str
    defaults: dict[str, Any]
    trained: dict[str, tuple] = dataclasses.field(default_factory=dict)
    drawn: dict[str, tuple] = dataclasses.field(default_factory=dict)
    same: bool = True


_DDPM = SchedulerClass(
    "ddpm",
    _TABLE | _LEADING | _RESCALE | _CLIP,
    trained={"variance_type": _FIXED_VARIANCE},
    drawn={"thresholding": (False,), "variance_type": ("fixed_small", "fixed_small_log")},
)
_DDIM = SchedulerClass(
    "ddim",
    _TABLE | _LEADING | _RESCALE | _CLIP | {"set_alpha_to_one": True},
    drawn={"thresholding": (False,)},
)
_FEW_STEPS = {
    **_DISTILLED, **_LEADING, **_RESCALE, **_NO_CLIP, "set_alpha_to_one": True,
    "original_inference_steps": 50,
}  # fmt: skip

CLASSES = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "PNDMScheduler": SchedulerClass(
        "pndm",
        _TABLE | _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        drawn={"skip_prk_steps": (True,)},
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        "euler",
        _TABLE | _LINSPACE | _RESCALE | _KARRAS,
        trained={"timestep_type": ("discrete",)},
        drawn={
            **_NO_OTHER_SIGMAS,
            "final_sigmas_type": ("zero",),
            "interpolation_type": ("linear",),
            "sigma_min": (None,),
            "sigma_max": (None,),
        },
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        "euler_ancestral", _TABLE | _LINSPACE | _RESCALE
    ),
    "HeunDiscreteScheduler": SchedulerClass(
        "heun", _K_DIFFUSION | _LINSPACE | _KARRAS | _NO_CLIP, drawn=_NO_OTHER_SIGMAS
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpmpp_2m",
        _TABLE | _LINSPACE | _RESCALE | _KARRAS,
        trained={**_NO_FLOW, **_NOT_LEARNED},
        drawn={
            **_MULTISTEP,
            "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads "deis" as "dpmsolver++"
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and these as "midpoint"
            "use_lu_lambdas": (False,),
            "lambda_min_clipped": (float("-inf"),),
        },
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        "unipc",
        _TABLE | _LINSPACE | _RESCALE | _KARRAS,
        trained={**_NO_FLOW, "shift_terminal": (None,)},
        drawn={
            **_MULTISTEP,
            "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # diffusers reads these as "bh2"
            "predict_x0": (True,),
            "lower_order_final": (True,),
            "disable_corrector": ([], ()),
            "solver_p": (None,),
            "sigma_min": (None,),
            "sigma_max": (None,),
        },
    ),
    # The classes below sample in ways that sdjax has not, from networks like any other.
    "LMSDiscreteScheduler": SchedulerClass("euler", _TABLE | _LINSPACE | _KARRAS, same=False),
    "KDPM2DiscreteScheduler": SchedulerClass(
        "heun", _K_DIFFUSION | _LINSPACE | _KARRAS, same=False
    ),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(
        "euler_ancestral", _K_DIFFUSION | _LINSPACE, same=False
    ),
    "DPMSolverSDEScheduler": SchedulerClass(
        "euler_ancestral", _K_DIFFUSION | _LINSPACE, same=False
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        "dpmpp_2m",
        _TABLE | _KARRAS,
        trained={**_NO_FLOW, **_NOT_LEARNED},
        same=False,
    ),
    "DEISMultistepScheduler": SchedulerClass(
        "dpmpp_2m", _TABLE | _LINSPACE | _KARRAS, trained=_NO_FLOW, same=False
    ),
    "SASolverScheduler": SchedulerClass(
        "dpmpp_2m",
        _TABLE | _LINSPACE | _KARRAS,
        trained={"use_flow_sigmas": (False,), **_NOT_LEARNED},
        same=False,
    ),
    "TCDScheduler": SchedulerClass("ddim", _FEW_STEPS, same=False),
    # Its own grid, whose points the fields of spacing do not move.
    "LCMScheduler": SchedulerClass(
        "lcm",
        _FEW_STEPS,
        drawn={"thresholding": (False,), "clip_sample": (False,), "timestep_scaling": (10.0,)},
    ),
}

FLOW_CLASSES = {
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        "flow_euler",
        {
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": False,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "time_shift_type": "exponential",
            "stochastic_sampling": False,
        },
        # The network takes 1 - sigma, as Mochi's.
        trained={"invert_sigmas": (False,)},
    ),
}

# Fields that change nothing with the values accepted above, or in a class that is not `same`.
_OTHERS = {
    "algorithm_type",
    "corrector_order",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "flow_shift",
    "lower_order_final",
    "noise_sampler_seed",
    "predictor_order",
    "sample_max_value",
    "tau_func",
    "timestep_scaling",
}
KNOWN_FIELDS = _OTHERS.union(
    *(
        fields
        for cls in (CLASSES | FLOW_CLASSES).values()
        for fields in (cls.defaults, cls.trained, cls.drawn)
    )
)
