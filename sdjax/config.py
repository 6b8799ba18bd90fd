"""The configuration tree: every field, its default and its type, in one place.

A recipe in `configs/` starts from `default()`, a locked `ConfigDict`, and changes what differs. The
command line changes it further (`--config.train.steps=10`). `resolve` then checks the whole once
and hands out frozen dataclasses; nothing below sees a ConfigDict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sdjax.data.config import DataConfig
from sdjax.data.mixture import Part
from sdjax.diffusion.losses import ObjectiveConfig
from sdjax.diffusion.losses import check as check_objective
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families.config import ModelConfig
from sdjax.families.registry import FAMILIES
from sdjax.families.sd import SDConfig
from sdjax.methods.adapter_rules import AdaptersConfig
from sdjax.methods.denoise import DenoiseConfig
from sdjax.methods.method import MethodConfig
from sdjax.methods.registry import METHODS
from sdjax.models.config import ConfigError
from sdjax.monitor_config import MonitorConfig
from sdjax.optim.ema import EMAConfig
from sdjax.optim.optimizers import OptimConfig
from sdjax.parallel import xla
from sdjax.parallel.mesh import MeshConfig
from sdjax.sampling.settings import SampleConfig
from sdjax.system.untrusted import brief
from sdjax.typed_tree import build, to_dict
from sdjax.validation_config import ValidationConfig

if TYPE_CHECKING:
    import ml_collections  # of the verbs alone: the dataclasses are complete without it

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; one that comes with loaded weights wins over this."""

    # A folder with vocab.json and merges.txt, or a pipeline with a tokenizer for each text encoder;
    # "" trains one on the captions.
    path: str = ""
    path_2: str = (
        ""  # the same for a second text encoder, which may pad otherwise; "" takes that of `path`
    )
    vocab_size: int = 1024  # upper bound, for a trained one


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
    bundle_frozen: bool = False  # copy frozen weights into the workdir, in place of a reference
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
class Stage:
    """From step `start` on the run goes on with these; what is None stays as it was."""

    start: int = 0  # optimizer steps done before it
    resolution: int | None = None  # data.resolution
    batch_size: int | None = None  # data.batch_size
    mixture: tuple[Part, ...] | None = None  # data.mixture, its own steps counted from `start`
    timestep_min: int | None = None  # objective.timestep_min
    timestep_max: int | None = None  # objective.timestep_max
    learning_rate: float | None = None  # optim.learning_rate, the peak of the one schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    # Diffusers folder, sdjax workdir or single file to start from: all its networks.
    init_from: str = ""
    init_prediction_type: str = ""  # "epsilon" or "v_prediction", where init_from says it wrong
    init_zero_terminal_snr: bool = False  # the schedule has one, where init_from does not say so
    vae_from: str = ""  # the same for one network; "tiny" is the VAE shipped with sdjax
    text_encoder_from: str = ""  # brings SDXL's second encoder too
    method: MethodConfig = DenoiseConfig()  # what is trained, and how; `method.name` tells which
    model: ModelConfig = SDConfig()  # the networks; `model.family` tells which
    tokenizer: TokenizerConfig = TokenizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()
    monitor: MonitorConfig = MonitorConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[Stage, ...] = ()  # a curriculum: what changes on the way, in order
    # Folder of XLA's persistent cache; "" is $JAX_COMPILATION_CACHE_DIR, or ~/.cache/sdjax/xla.
    compilation_cache: str = ""

    def __post_init__(self):
        if self.data.batch_size % self.train.accumulation:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}, not divisible by "
                f"train.accumulation = {self.train.accumulation}"
            )
        if self.init_prediction_type not in ("", "epsilon", "v_prediction"):
            raise ValueError(
                f"init_prediction_type is {self.init_prediction_type!r}; expected 'epsilon', "
                "'v_prediction', or '' for what init_from says"
            )
        if self.sample.fidelity and (self.data.mixture or self.data.name != "captioned_shapes"):
            raise ValueError(
                f"sample.fidelity is {self.sample.fidelity} with data.name {self.data.name!r}"
                f"{' and a mixture' if self.data.mixture else ''}; "
                "pictures of captioned_shapes alone can be read back, set it to 0"
            )
        if self.draws:
            check_objective(self.schedule, self.objective)
        elif self.validation.maxima_every or self.validation.metrics:
            raise ValueError(
                f"validation.maxima_every is {self.validation.maxima_every} and validation.metrics "
                f"is {self.validation.metrics!r} with method {self.method.name!r}; they are of "
                "denoisers and what these draw, set them to 0 and ()"
            )
        if METHODS[self.method.name].steers and self.validation.metrics:
            raise ValueError(
                f"validation.metrics is {self.validation.metrics!r} with method "
                f"{self.method.name!r}, whose pictures follow others that metrics do not have; set "
                "it to ()"
            )
        changes = METHODS[self.method.name].changes(self.method, FAMILIES[self.model.family])
        frozen = [pattern for pattern, rate in self.optim.groups if rate == 0]
        if changes and frozen:
            raise ValueError(
                f"optim.groups freezes {frozen} with method {self.method.name!r}, whose files need "
                "all that it adds; leave such a group out (adapters: by method.targets, "
                "method.text_targets, or a rank of 0 in method.ranks)"
            )
        if self.model.frozen_dtype and not isinstance(self.method, AdaptersConfig):
            raise ValueError(
                f"model.frozen_dtype is {self.model.frozen_dtype!r} with method "
                f"{self.method.name!r}, which trains more than adapters; set it to ''"
            )
        starts = [0, *(stage.start for stage in self.stages)]
        if sorted(set(starts)) != starts:
            raise ValueError(f"stages start at {starts[1:]}; expected rising steps above 0")
        moved = any((s.timestep_min, s.timestep_max) != (None, None) for s in self.stages)
        if self.objective.resampling != "none" and moved:
            raise ValueError(
                f"objective.resampling is {self.objective.resampling!r}, and a stage has another "
                "range of timesteps, of which the history says nothing; set it to 'none', or train "
                "the stage as a run of its own"
            )
        for i, stage in enumerate(self.stages):
            try:
                self.at_step(stage.start)
            except ValueError as error:
                raise ValueError(f"stages[{i}]: {error}") from error

    @property
    def draws(self) -> bool:
        """Whether what is trained draws pictures from prompts."""
        return METHODS[self.method.name].draws

    def at_step(self, step: int) -> Config:
        """The configuration in force after `step` optimizer steps, without stages."""
        begun = [stage for stage in self.stages if stage.start <= step]
        groups: dict[str, dict[str, Any]] = {"data": {}, "objective": {}, "optim": {}}
        for stage in begun:
            for group, names in _STAGED.items():
                changed = {name: getattr(stage, name) for name in names}
                groups[group] |= {k: v for k, v in changed.items() if v is not None}
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


# The groups that are one of several dataclasses: {base: (the field that tells which, {its value:
# dataclass})}.
VARIANTS: dict[type, tuple[str, dict[str, type]]] = {
    ModelConfig: ("family", {name: family.config for name, family in FAMILIES.items()}),
    MethodConfig: ("name", {name: kind.config for name, kind in METHODS.items()}),
}
_chosen: dict[str, str] = {}


@contextlib.contextmanager
def choosing(**names: str) -> Iterator[None]:
    """Let the command line choose variants for the recipe that is read within.

    Args:
        names: `family` and `method`; they win over what the recipe asks of `default`.

    Raises:
        ConfigError: there is no such family or method.
    """
    _named("model.family", names.get("family", "sd"), FAMILIES)
    _named("method.name", names.get("method", "denoise"), METHODS)
    before = dict(_chosen)
    _chosen.update(names)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def default(
    family: str = "sd", preset: str = "base", method: str = "denoise"
) -> ml_collections.ConfigDict:
    """Return all fields at their defaults, locked: setting a field that is not there is an error.

    Args:
        family: a name of `FAMILIES`.
        preset: a name of the family's presets, published shapes of its networks.
        method: a name of `METHODS`.

    Raises:
        ConfigError: there is no such family, preset or method.
    """
    import ml_collections

    chosen = _chosen.get("family", family)
    preset = preset if chosen == family else "base"
    fields = beginning(chosen, preset, _chosen.get("method", method))
    # Types are checked by `resolve`, which also knows unions such as `int | tuple`.
    return ml_collections.ConfigDict(fields, type_safe=False).lock()


def beginning(family: str, preset: str, method: str) -> dict[str, Any]:
    """Return the nested fields that `default` begins with: everyone's, then those of the family.

    Raises:
        ConfigError: there is no such family, preset or method.
    """
    kind = _named("model.family", family, FAMILIES)
    config = Config(
        model=_named(f"the preset of the family {family!r}", preset, kind.presets),
        method=_named("method.name", method, METHODS).config(),
    )
    fields = to_dict(config)
    for path, value in kind.defaults.items():
        *groups, name = path.split(".")
        group = functools.reduce(dict.__getitem__, groups, fields)
        assert name in group, path
        group[name] = value
    return fields


def all_fields() -> dict[str, Any]:
    """Return the default configuration with the fields of every family and every method."""
    fields = to_dict(Config())
    for name, base in (("model", ModelConfig), ("method", MethodConfig)):
        for variant in VARIANTS[base][1].values():
            fields[name] = {**to_dict(variant()), **fields[name]}
    return fields


def _named(what: str, name: str, there: Mapping[str, T]) -> T:
    if name not in there:
        raise ConfigError(f"{what} is {brief(name)}; expected one of {', '.join(there)}")
    return there[name]


def resolve(config: ml_collections.ConfigDict | dict) -> Config:
    """Check every field and return the frozen configuration.

    Raises:
        ConfigError: lists every unknown field, wrong type and value out of range at once.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    built = build(Config, config, "config", VARIANTS)
    data = METHODS[built.method.name].data(built.method, built.data)
    return built if data == built.data else dataclasses.replace(built, data=data)
