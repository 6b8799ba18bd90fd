"""Reading and writing the `scheduler_config.json` of a diffusers pipeline.

A scheduler file says three things at once: the noise schedule a network was trained on, what the
network predicts, and how to sample from it. What sdjax cannot do of the first two is an error. What
it cannot do of the third is kept for whoever draws with that very sampler.

Some pipelines correct old files when they load them (`Family.scheduler_changes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.diffusion.consistency import TIMESTEP_SCALING
from sdjax.diffusion.flow_levels import SPREADS, FlowConfig
from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.prediction import PREDICTIONS
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.formats.scheduler_classes import CLASSES, FLOW_CLASSES, KNOWN_FIELDS, SchedulerClass
from sdjax.system.untrusted import brief, plain

# Fields of `FlowConfig` and of the file that say the same.
_FLOW_FIELDS = {
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_tokens": "base_image_seq_len",
    "max_tokens": "max_image_seq_len",
    "stochastic": "stochastic_sampling",
}
# The steps that a model was distilled to, of which no class has a field; diffusers passes over what
# begins with "_".
DISTILLED = "_distilled_steps"
LCM_STEPS = 4  # what latent consistency models are drawn with, of which the file has no field
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The meaning of a scheduler file.

    schedule, prediction_type: what the network was trained on.
    sampler: how the file says to sample; the nearest to it where `unsupported` says something.
    unsupported: the sampler that the file asks for and sdjax does not have, in words, or "".
    """

    schedule: ScheduleConfig
    prediction_type: str
    sampler: SamplerConfig
    unsupported: str = ""


def scheduler_from_diffusers(
    config: Mapping[str, Any],
    where: str = "scheduler_config.json",
    *,
    changes: Mapping[str, Any] | None = None,
) -> Scheduler:
    """Reads a scheduler file.

    config: the parsed JSON; where: its name, for messages; changes: what the pipeline
    corrects in the file.
    Raises ValueError naming every field that is unknown or that asks for a noise schedule or a
    prediction that sdjax does not have.
    """
    name = config.get("_class_name")
    cls = (CLASSES | FLOW_CLASSES).get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or cls is None:
        raise ValueError(
            f"{where}: _class_name is {brief(name)}; expected one of "
            + ", ".join(CLASSES | FLOW_CLASSES)
        )
    config = {**config, **(changes or {})}
    if name in FLOW_CLASSES:  # of which files have nulls for defaults
        config = {field: value for field, value in config.items() if value is not None}
    _check_fields(name, cls, config, where)
    own = {field: value for field, value in config.items() if field in cls.defaults}
    fields = {**cls.defaults, **own}
    try:
        unsupported = _unsupported(name, cls, {**config, **fields})
        if name in FLOW_CLASSES:
            schedule, sampler = _flow(cls, fields, changes or {})
            return Scheduler(schedule, "flow", sampler, unsupported)
        schedule = ScheduleConfig(
            kind=fields["beta_schedule"],
            beta_start=fields["beta_start"],
            beta_end=fields["beta_end"],
            num_train_timesteps=fields["num_train_timesteps"],
            zero_terminal_snr=bool(fields.get("rescale_betas_zero_snr")),
        )
        sampler = _distilled(_sampler(cls, fields), config.get(DISTILLED))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Scheduler(schedule, fields["prediction_type"], sampler, unsupported)


def _sampler(cls: SchedulerClass, fields: Mapping[str, Any]) -> SamplerConfig:
    """The sampler of a class; what the class has no field for is as in Stable Diffusion."""
    default = SamplerConfig()
    sampler = SamplerConfig(
        name=cls.sampler,
        spacing=fields.get("timestep_spacing", default.spacing),
        steps_offset=fields.get("steps_offset", default.steps_offset),
        set_alpha_to_one=fields.get("set_alpha_to_one", default.set_alpha_to_one),
        karras=bool(fields.get("use_karras_sigmas")),
    )
    if cls.sampler == "lcm":
        original = fields["original_inference_steps"]
        return dataclasses.replace(sampler, original_steps=original, steps=min(LCM_STEPS, original))
    if fields.get("clip_sample"):
        limit = fields["clip_sample_range"]
        sampler = dataclasses.replace(sampler, clip_sample=True, clip_sample_range=limit)
    return sampler


def _distilled(sampler: SamplerConfig, steps: Any) -> SamplerConfig:
    """The sampler of a model that was distilled to so many steps; None for one that was not."""
    if steps is None:
        return sampler
    if not _is_like(steps, 1):
        raise ValueError(f"{DISTILLED} is {brief(steps)}; expected a whole number")
    return dataclasses.replace(sampler, steps=steps, distilled=True)


def _flow(
    cls: SchedulerClass, fields: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[ScheduleConfig, SamplerConfig]:
    """The schedule and the sampler of a flow. Dynamic shifting leaves the training table as it is.

    Whether levels are "trailing" is the pipeline's affair, of which the file has no field.
    """
    dynamic = fields["use_dynamic_shifting"]
    schedule = ScheduleConfig(
        kind="flow",
        num_train_timesteps=fields["num_train_timesteps"],
        shift=1.0 if dynamic else fields["shift"],
    )
    terminal = fields["shift_terminal"] or 0.0
    if not _is_like(terminal, 0.0):
        raise ValueError(f"shift_terminal is {brief(terminal)}; expected a number or null")
    spreads = [kind for kind in SPREADS if kind and fields[f"use_{kind}_sigmas"]]
    if len(spreads) > 1:
        raise ValueError(f"use_{spreads[0]}_sigmas and use_{spreads[1]}_sigmas: expected one")
    flow = FlowConfig(
        dynamic=fields["time_shift_type"] if dynamic else "",
        **{ours: fields[theirs] for ours, theirs in _FLOW_FIELDS.items()},
        terminal=terminal,
        spread=spreads[0] if spreads else "",
    )
    spacing = changes.get("timestep_spacing", SamplerConfig.spacing)
    return schedule, SamplerConfig(name=cls.sampler, spacing=spacing, flow=flow)


def _unsupported(name: str, cls: SchedulerClass, fields: Mapping[str, Any]) -> str:
    """The sampler that is asked for, in words, if sdjax does not have it."""
    if not cls.same:
        return name
    others = [
        f"{field} = {brief(fields[field])}"
        for field, accepted in cls.drawn.items()
        if field in fields and fields[field] not in accepted
    ]
    return f"{name} with {', '.join(others)}" if others else ""


def _check_fields(name: str, cls: SchedulerClass, config: Mapping[str, Any], where: str) -> None:
    """Collects everything in `config` that the networks cannot be used with into one ValueError."""
    present = {field: value for field, value in config.items() if not field.startswith("_")}
    problems = [
        f"{plain(field)} = {brief(value)}: unknown field"
        for field, value in present.items()
        if field not in KNOWN_FIELDS
    ]
    required: dict[str, tuple] = {"trained_betas": (None,), **cls.trained}
    if name not in FLOW_CLASSES:
        required["prediction_type"] = tuple(kind for kind in PREDICTIONS if kind != "flow")
    for field, accepted in required.items():
        if field in present and present[field] not in accepted:
            expected = " or ".join(repr(value) for value in accepted)
            problems.append(f"{field} = {brief(present[field])}: expected {expected}")
    for field, default in cls.defaults.items():
        if field in present and not _is_like(present[field], default):
            expected = _KINDS[type(default)]
            problems.append(f"{field} = {brief(present[field])}: expected {expected}")
    rescales = "rescale_betas_zero_snr"
    if name not in FLOW_CLASSES and rescales not in cls.defaults and present.get(rescales):
        problems.append(
            f"{rescales} = {brief(present[rescales])}: diffusers' {name} does not read it, so that "
            "what the network was trained on is unclear. Set it to False, or name a class that has "
            "it, as DDIMScheduler"
        )
    if problems:
        raise ValueError(
            f"{where} ({name}) has settings that sdjax does not support:\n  "
            + "\n  ".join(problems)
        )


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value has the type of a field's default. Files write a null for False."""
    if default is None or isinstance(default, bool):
        return default is None or value is None or isinstance(value, bool)
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def scheduler_to_diffusers(
    schedule: ScheduleConfig, prediction_type: str, sampler: SamplerConfig | None = None
) -> dict[str, Any]:
    """The contents of a `scheduler_config.json` with the same noise schedule.

    DDIMScheduler (DDPMScheduler for the "sigmoid" schedule, which DDIM does not have; LCMScheduler
    for the sampler "lcm"), or FlowMatchEulerDiscreteScheduler for flow. sampler gives its timestep
    grid; without one, it is "trailing" for a zero terminal SNR and "leading" otherwise. A schedule
    with an snr_scale is written as trained_betas, which scheduler_from_diffusers does not read.
    Raises ValueError for a prediction_type that diffusers cannot sample with this schedule.
    """
    if (prediction_type == "flow") != (schedule.kind == "flow"):
        raise ValueError(
            f"prediction_type is {prediction_type!r} with schedule.kind {schedule.kind!r}; "
            "diffusers has flow schedules with prediction_type 'flow' only, and no other schedule "
            "with it"
        )
    if schedule.kind == "flow":
        return _flow_to_diffusers(schedule, sampler.flow if sampler else FlowConfig())
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
        "clip_sample": sampler.clip_sample,
        "clip_sample_range": sampler.clip_sample_range,
        "thresholding": False,
    }
    if schedule.kind != "sigmoid":
        config["set_alpha_to_one"] = sampler.set_alpha_to_one
    if sampler.name == "lcm":
        config |= _lcm_to_diffusers(schedule, sampler)
    if sampler.distilled:
        config[DISTILLED] = sampler.steps
    if schedule.snr_scale != 1.0:  # no field of a diffusers scheduler says this but the betas
        alphas_cumprod = make_schedule(schedule).alphas_cumprod
        kept = alphas_cumprod[1:] / alphas_cumprod[:-1]
        config["trained_betas"] = [1.0 - alphas_cumprod[0], *(1.0 - kept)]
        config["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
    return config


def _lcm_to_diffusers(schedule: ScheduleConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """The fields of LCMScheduler that another class of the same schedule has not."""
    if schedule.kind == "sigmoid":
        raise ValueError(
            "schedule.kind is 'sigmoid' with the sampler 'lcm': diffusers' LCMScheduler does not "
            "have that schedule"
        )
    return {
        "_class_name": "LCMScheduler",
        "original_inference_steps": sampler.original_steps,
        "set_alpha_to_one": True,
        "timestep_scaling": TIMESTEP_SCALING,
    }


def _flow_to_diffusers(schedule: ScheduleConfig, flow: FlowConfig) -> dict[str, Any]:
    """The contents of a file of FlowMatchEulerDiscreteScheduler."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "shift": schedule.shift,
        "use_dynamic_shifting": bool(flow.dynamic),
        "time_shift_type": flow.dynamic or "exponential",
        **{theirs: getattr(flow, ours) for ours, theirs in _FLOW_FIELDS.items()},
        "shift_terminal": flow.terminal or None,
        "invert_sigmas": False,
        **{f"use_{kind}_sigmas": flow.spread == kind for kind in SPREADS if kind},
    }
