"""The configuration tree: every field, its default and its type, in one place.

A recipe in `configs/` starts from `default()`, a locked `ConfigDict`, and changes what differs. The
command line changes it further (`--config.train.steps=10`). `resolve` then checks the whole once
and hands out frozen dataclasses; nothing below sees a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from sdjax.data.config import DataConfig
from sdjax.data.mixture import Part
from sdjax.diffusion.losses import ObjectiveConfig
from sdjax.diffusion.losses import check as check_objective
from sdjax.diffusion.samplers import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families.model import ModelConfig
from sdjax.models.config import ConfigError
from sdjax.optim.ema import EMAConfig
from sdjax.optim.optimizers import OptimConfig
from sdjax.parallel import xla
from sdjax.parallel.mesh import MeshConfig
from sdjax.system.untrusted import brief, plain
from sdjax.validation_config import ValidationConfig

if TYPE_CHECKING:
    import ml_collections  # of the verbs alone: the dataclasses are complete without it

T = TypeVar("T")
_MOST_UNKNOWN = 20  # fields that an error shows


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; one that comes with loaded weights wins over this."""

    path: str = ""  # a folder with vocab.json and merges.txt; "" trains one on the captions
    path_2: str = ""  # the same for text_encoder_2, which pads otherwise; "" takes that of `path`
    vocab_size: int = 1024  # upper bound, for a trained one


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Objective of `task="autoencoder"` (LDM `LPIPSWithDiscriminator` without its two networks)."""

    loss: str = "l1"  # "l1" or "l2", mean over pixels
    kl_weight: float = 1e-6  # times KL(q(z|x) || N(0, 1)), summed over the latent

    def __post_init__(self):
        if self.loss not in ("l1", "l2"):
            raise ValueError(f"autoencoder.loss is {self.loss!r}; expected 'l1' or 'l2'")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how often, and when to give up. Counts are optimizer steps."""

    steps: int = 1000
    accumulation: int = 1  # micro-batches an optimizer step is the mean of
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_last: int = 2  # checkpoints kept: the newest of these ...
    keep_every: int = 0  # ... and every one whose step is a multiple of this (0: none)
    sample_every: int = 1000  # 0: only at the end
    timestep_buckets: int = 4  # the loss is also logged for this many ranges of the timestep
    max_nonfinite: int = 20  # steps in a row with a NaN or Inf before the run stops
    # A spike is a loss or gradient norm so many deviations above its running mean. It is told; and
    # the first `rollbacks` of a run send it back to its last checkpoint, without that batch.
    spike_factor: float = 6.0
    rollbacks: int = 0
    export: bool = True  # write a diffusers folder at the end
    report: bool = True  # write report.html at every validation and at the end
    xla_options: tuple[
        str, ...
    ] = ()  # of the step, "NAME=VALUE"; they win over sdjax/parallel/xla.py

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "checkpoint_every", "keep_last",
                     "timestep_buckets", "max_nonfinite"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("keep_every", "sample_every", "rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected 0 or more")
        xla.parse(self.xla_options)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The pictures made while training."""

    prompts: tuple[str, ...] = ()  # () takes captions of the evaluation split
    count: int = 16  # how many of those
    compare: bool = False  # also with the raw weights, and without guidance, side by side
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    negative_prompt: str = ""
    sampler: SamplerConfig = SamplerConfig()
    fidelity: int = 0  # pictures the reader of captioned_shapes checks at the end (0: none)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"sample.count is {self.count}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """From step `start` on the run goes on with these; what is 0, None or () stays as it was."""

    start: int = 0  # optimizer steps done before it
    resolution: int = 0  # data.resolution
    batch_size: int = 0  # data.batch_size
    mixture: tuple[Part, ...] = ()  # data.mixture, its own steps counted from `start`
    timestep_min: int | None = None  # objective.timestep_min
    timestep_max: int | None = None  # objective.timestep_max
    learning_rate: float | None = None  # optim.learning_rate, the peak of the one schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    task: str = "text_to_image"  # or "autoencoder"
    seed: int = 0
    init_from: str = ""  # diffusers folder or sdjax workdir to start from: all its networks
    vae_from: str = ""  # the same for one network; "tiny" is the VAE shipped with sdjax
    text_encoder_from: str = ""  # brings SDXL's second encoder too
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[Stage, ...] = ()  # a curriculum: what changes on the way, in order
    # Folder of XLA's persistent cache; "" is $JAX_COMPILATION_CACHE_DIR, or ~/.cache/sdjax/xla.
    compilation_cache: str = ""

    def __post_init__(self):
        if self.task not in ("text_to_image", "autoencoder"):
            raise ValueError(f"task is {self.task!r}; expected 'text_to_image' or 'autoencoder'")
        if self.data.batch_size % self.train.accumulation:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}, not divisible by "
                f"train.accumulation = {self.train.accumulation}"
            )
        if self.sample.fidelity and (self.data.mixture or self.data.name != "captioned_shapes"):
            raise ValueError(
                f"sample.fidelity is {self.sample.fidelity} with data.name {self.data.name!r}"
                f"{' and a mixture' if self.data.mixture else ''}; "
                "pictures of captioned_shapes alone can be read back, set it to 0"
            )
        if self.task == "autoencoder" and (self.validation.maxima_every or self.validation.metrics):
            raise ValueError(
                f"validation.maxima_every is {self.validation.maxima_every} and validation.metrics "
                f"is {self.validation.metrics!r} with task 'autoencoder'; they are of UNets and "
                "what these draw, set them to 0 and ()"
            )
        if self.task == "text_to_image":
            check_objective(self.schedule, self.objective)
        starts = [0, *(stage.start for stage in self.stages)]
        if sorted(set(starts)) != starts:
            raise ValueError(f"stages start at {starts[1:]}; expected rising steps above 0")
        for i, stage in enumerate(self.stages):
            try:
                self.at_step(stage.start)
            except ValueError as error:
                raise ValueError(f"stages[{i}]: {error}") from error

    def at_step(self, step: int) -> Config:
        """The configuration in force after `step` optimizer steps, without stages."""
        begun = [stage for stage in self.stages if stage.start <= step]
        groups: dict[str, dict[str, Any]] = {"data": {}, "objective": {}, "optim": {}}
        for stage in begun:
            for group, names in _STAGED.items():
                changed = {name: getattr(stage, name) for name in names}
                groups[group] |= {k: v for k, v in changed.items() if v not in (None, ())
                                  and (v or group != "data")}  # fmt: skip
        replaced = {
            group: dataclasses.replace(getattr(self, group), **fields)
            for group, fields in groups.items()
        }
        return dataclasses.replace(self, stages=(), **replaced)


# The groups of the configuration that a stage's fields belong to.
_STAGED = {
    "data": ("resolution", "batch_size", "mixture"),
    "objective": ("timestep_min", "timestep_max"),
    "optim": ("learning_rate",),
}


def default() -> ml_collections.ConfigDict:
    """All fields at their defaults, locked: setting a field that does not exist is an error."""
    import ml_collections

    # Types are checked by `resolve`, which also knows unions such as `int | tuple`.
    config = ml_collections.ConfigDict(to_dict(Config()), type_safe=False)
    return config.lock()


def to_dict(config: Any) -> Any:
    """Nested dataclasses -> nested dicts with the same leaves (tuples stay tuples)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return tuple(to_dict(item) for item in config)
    return config


def resolve(config: ml_collections.ConfigDict | dict) -> Config:
    """Check every field and return the frozen configuration.

    Raises:
        ConfigError: lists every unknown field, wrong type and value out of range at once.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    errors: list[str] = []
    resolved = _build(Config, config, "config", errors)
    if errors:
        raise ConfigError("the configuration has errors:\n  " + "\n  ".join(errors))
    assert resolved is not None
    return resolved


def _build(cls: type[T], values: Any, where: str, errors: list[str]) -> T | None:
    if not isinstance(values, dict):
        errors.append(f"{where} is {brief(values)}; expected a group of fields")
        return None
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    before = len(errors)
    unknown = [name for name in values if name not in known]
    for name in unknown[:_MOST_UNKNOWN]:
        name = plain(name)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {where}.{close[0]}?" if close else f"; known: {sorted(known)}"
        errors.append(f"{where}.{name} is not a field{hint}")
    if len(unknown) > _MOST_UNKNOWN:
        errors.append(f"{where} has {len(unknown) - _MOST_UNKNOWN} more fields that it has not")
    kwargs: dict[str, Any] = {}
    for name in known & set(values):
        field = f"{where}.{name}"
        group, optional = _group(hints[name])
        several = _group_in_tuple(hints[name])
        if optional and values[name] is None:
            kwargs[name] = None
        elif group is not None:
            kwargs[name] = _build(group, values[name], field, errors)
        elif several and isinstance(values[name], tuple | list):
            kwargs[name] = tuple(
                _build(several, value, f"{field}[{i}]", errors)
                for i, value in enumerate(values[name])
            )
        else:
            try:
                kwargs[name] = _cast(hints[name], values[name])
            except TypeError:
                errors.append(
                    f"{field} is {brief(values[name])} ({type(values[name]).__name__}); "
                    f"expected {_describe(hints[name])}"
                )
    if len(errors) > before:
        return None
    try:
        return cls(**kwargs)
    except (ValueError, ArithmeticError) as error:
        errors.append(f"{where}: {error}")
        return None


def _group_in_tuple(hint: Any) -> Any:
    """The dataclass of `tuple[Dataclass, ...]`, else None."""
    first, *_ = typing.get_args(hint) or (None,)
    return first if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(first) else None


def _group(hint: Any) -> tuple[Any, bool]:
    """(dataclass of a field or None, whether the field may be None instead)."""
    options = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    groups = [option for option in options if dataclasses.is_dataclass(option)]
    return (groups[0] if groups else None), bool(groups) and type(None) in options


def _cast(hint: Any, value: Any) -> Any:
    """`value` as type `hint` (int passes for float, list for tuple), or TypeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _cast(option, value)
            except TypeError:
                continue
        raise TypeError
    if hint is type(None):
        if value is None:
            return None
        raise TypeError
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise TypeError
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_cast(args[0], v) for v in value)
        if len(args) != len(value):
            raise TypeError
        return tuple(_cast(a, v) for a, v in zip(args, value, strict=True))
    if hint is tuple:
        return tuple(value) if isinstance(value, tuple | list) else _fail()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if value.bit_length() < 1000 else _fail()  # larger than any float
    if hint is int and isinstance(value, bool):
        raise TypeError
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise TypeError


def _fail() -> Any:
    raise TypeError


def _describe(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")
