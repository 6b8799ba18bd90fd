"""The space file of a sweep: which fields of the configuration are tried, and how.

fields:
  optim.learning_rate: {low: 1e-5, high: 1e-2, log: true}
  data.batch_size: {low: 32, high: 256, step: 32}
  objective.weighting: {choices: [uniform, min_snr]}
pruner: {name: median, startup_trials: 5}
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from sdjax.config import Config, resolve, to_dict
from sdjax.models.config import ConfigError
from sdjax.system import paths, text_files, yaml_files
from sdjax.system.untrusted import brief, explained, listed, plain

Value = None | bool | int | float | str

# {pruner or sampler: {option: default}}; min_steps 0 is the interval of validation.
PRUNERS: dict[str, dict[str, int]] = {
    "median": {"startup_trials": 5, "warmup_steps": 0},
    "hyperband": {"min_steps": 0, "reduction_factor": 3},
    "none": {},
}
SAMPLERS: dict[str, dict[str, int]] = {
    "tpe": {"seed": 0, "startup_trials": 10},
    "random": {"seed": 0},
}
_KEYS = ("fields", "metric", "mode", "pruner", "sampler")
_RANGE = {"low", "high", "log", "step"}


@dataclasses.dataclass(frozen=True)
class Space:
    """A space file, checked.

    fields: the distribution that each is drawn from.
    choices: {field: {label: value}}; the label of a list is JSON, since a journal holds no lists.
    metric, mode: what is made small or large; "" takes the configuration's.
    pruner, sampler: {"name": ..., option: ...}, all options there.
    """

    fields: Mapping[str, BaseDistribution]
    choices: Mapping[str, Mapping[Value, Any]]
    metric: str
    mode: str
    pruner: Mapping[str, Any]
    sampler: Mapping[str, Any]

    def values(self, drawn: Mapping[str, Value]) -> dict[str, Any]:
        """Return what the configuration takes for what was drawn."""
        choices = self.choices
        return {
            name: choices[name][value] if name in choices else value
            for name, value in drawn.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        fields = {name: json.loads(distribution_to_json(d)) for name, d in self.fields.items()}
        parts = {key: getattr(self, key) for key in _KEYS if key != "fields"}
        return {"fields": fields, **parts}


def no_space() -> Space:
    """Return the space of a sweep that tries the configuration as it is."""
    none = {"name": "none"}
    return Space({}, {}, "", "", none, {"name": "random", **SAMPLERS["random"]})


def read_space(file: paths.PathLike, base: Config) -> Space:
    """Read a space file.

    Args:
        base: the configuration that the fields belong to.

    Raises:
        ConfigError: all that is wrong with it, by file, field and value.
    """
    file = paths.to_path(file)
    try:
        content = yaml_files.read_yaml(file)
    except text_files.TextError as error:
        raise ConfigError(f"--space={error}") from error
    with explained(f"--space={file}", "a search space", error=ConfigError, remedy="mend it"):
        return _space(file, content, base)


def _space(file: paths.Path, content: Any, base: Config) -> Space:
    """The search space in the value of a file."""
    if not isinstance(content, dict) or not isinstance(content.get("fields"), dict):
        raise ConfigError(
            f"--space={file}: expected a group `fields:` with at least one field, such as\n"
            "fields:\n  optim.learning_rate: {low: 1e-5, high: 1e-2, log: true}"
        )
    problems = [
        f"{plain(key)} is unknown; expected some of {', '.join(_KEYS)}"
        for key in content
        if key not in _KEYS
    ]
    fields: dict[str, BaseDistribution] = {}
    choices: dict[str, dict[Value, Any]] = {}
    for name, given in content["fields"].items():
        try:
            fields[str(name)] = _field(str(name), given, base, choices)
        except ConfigError as error:
            problems.append(str(error))
    metric, mode = content.get("metric", ""), content.get("mode", "")
    if not isinstance(metric, str):
        problems.append(f"metric is {brief(metric)}; expected a name of metrics.jsonl")
    if mode not in ("", "min", "max"):
        problems.append(f"mode is {brief(mode)}; expected min or max")
    parts = {}
    for key, kinds in (("pruner", PRUNERS), ("sampler", SAMPLERS)):
        try:
            parts[key] = _named(key, content.get(key), kinds)
        except ConfigError as error:
            problems.append(str(error))
    if not content["fields"]:
        problems.append("fields is empty; name at least one field of the configuration")
    if problems:
        raise ConfigError(f"--space={file} has errors:\n  {listed(problems)}")
    return Space(fields, choices, metric, mode, parts["pruner"], parts["sampler"])


def changed(base: Config, values: Mapping[str, Any]) -> Config:
    """`base` with other values of some fields, checked as a whole.

    Raises:
        ConfigError: the values do not go together.
    """
    tree = copy.deepcopy(to_dict(base))
    for name, value in values.items():
        *groups, last = name.split(".")
        group = tree
        for part in groups:
            group = group[part]
        group[last] = value
    return resolve(tree)


def _field(
    name: str, given: Any, base: Config, choices: dict[str, dict[Value, Any]]
) -> BaseDistribution:
    """Return the distribution of one entry of `fields`, and put its choices, if any, to the others.

    Raises:
        ConfigError: it is none; the message names it.
    """
    hint = _type(name, base)
    if not isinstance(given, dict):
        raise ConfigError(
            f"{name} is {brief(given)}; expected {{low: ..., high: ...}} or {{choices: [...]}}"
        )
    if "choices" not in given:
        found = _range(name, given, hint)
        _check_values(name, (found.low, found.high), base)
        return found
    if extra := sorted(map(str, given.keys() - {"choices"})):
        raise ConfigError(f"{name} has choices and {', '.join(extra)}; choices stand alone")
    values = given["choices"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name}.choices is {brief(values)}; expected a list of values")
    if any(isinstance(value, dict) for value in values):
        raise ConfigError(f"{name}.choices has a group; name its fields one by one")
    labels = [json.dumps(value) if isinstance(value, list) else value for value in values]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"{name}.choices is {brief(values)}; expected each value once")
    _check_values(name, values, base)
    choices[name] = dict(zip(labels, values, strict=True))
    return CategoricalDistribution(labels)


def _range(name: str, given: Mapping[str, Any], hint: Any) -> IntDistribution | FloatDistribution:
    """Return the distribution of a range; 1e-5, which YAML takes for a word, is a number."""
    if unknown := sorted(map(str, given.keys() - _RANGE)):
        raise ConfigError(
            f"{name}.{unknown[0]} is unknown; expected low and high, log or step, or choices"
        )
    options = [*typing.get_args(hint)] or [hint]
    if float not in options and int not in options:
        raise ConfigError(f"{name} is no number ({_say(hint)}) and has no range; give it choices")
    numbers = {key: _number(f"{name}.{key}", given[key]) for key in given if key != "log"}
    if missing := sorted({"low", "high"} - numbers.keys()):
        raise ConfigError(f"{name}.{missing[0]} is missing; a range has low and high")
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    log = given.get("log", False)
    integer = float not in options
    if integer and (bad := [k for k, v in numbers.items() if v != int(v)]):
        raise ConfigError(f"{name}.{bad[0]} is {numbers[bad[0]]:g}; the field takes whole numbers")
    if not low < high:
        raise ConfigError(f"{name}: low {low:g} is not below high {high:g}; the range is empty")
    if not isinstance(log, bool):
        raise ConfigError(f"{name}.log is {brief(log)}; expected true or false")
    if log and low <= 0:
        raise ConfigError(f"{name}.low is {low:g}; with log it must be above 0")
    if step is not None and (log or not 0 < step <= high - low):
        raise ConfigError(
            f"{name}.step is {step:g}; expected above 0, at most high - low, and no log beside it"
        )
    if integer:
        return IntDistribution(int(low), int(high), log, int(step or 1))
    return FloatDistribution(low, high, log, step)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name} is {brief(value)}; expected a number") from error
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {brief(value)}; expected a finite number")
    return number


def _type(name: str, base: Config) -> Any:
    """The type of a field, as the configuration declares it. ConfigError if there is none."""
    group: Any = base
    parts = name.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(["config", *parts[:depth]])
        if not dataclasses.is_dataclass(group):
            raise ConfigError(f"{name}: {where} is {group!r} in this configuration, and no group")
        known = [f.name for f in dataclasses.fields(group)]
        if part not in known:
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            raise ConfigError(f"{name}: {where} has no field {part!r}{hint}")
        parent, group = group, getattr(group, part)
    if dataclasses.is_dataclass(group):
        raise ConfigError(f"{name} is a group of fields; name its fields one by one")
    return typing.get_type_hints(type(parent))[parts[-1]]


def _check_values(name: str, values: Iterable[Any], base: Config) -> None:
    """Check that the field alone takes the values; a trial may change what they must fit too."""
    for value in values:
        try:
            changed(base, {name: value})
        except ConfigError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            own = [line for line in lines if line and not line.startswith("config: ")]
            if own:
                raise ConfigError(f"{name} can be {brief(value)}, but {'; '.join(own)}") from error


def _named(key: str, given: Any, kinds: Mapping[str, dict[str, int]]) -> dict:
    """{"name": ..., options and their defaults} of the pruner or sampler."""
    given = next(iter(kinds)) if given is None else given
    given = {"name": given} if isinstance(given, str) else given
    name = str(given.get("name")) if isinstance(given, dict) else ""
    if not isinstance(given, dict) or name not in kinds:
        raise ConfigError(f"{key} is {brief(given)}; expected {{name: {' | '.join(kinds)}, ...}}")
    options = kinds[name]
    for option, value in given.items():
        if option == "name":
            continue
        if option not in options:
            known = ", ".join(options) or "no options"
            raise ConfigError(f"{key}.{option} is unknown; {name} has {known}")
        low = 2 if option == "reduction_factor" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(
                f"{key}.{option} is {brief(value)}; expected a whole number from {low}"
            )
    return {"name": name, **{o: given.get(o, default) for o, default in options.items()}}


def _say(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
