"""Reading a model's `config.json` (diffusers or transformers) into a frozen dataclass, strictly.

A checkpoint's config decides what the network computes. A field that is silently dropped makes a
model that silently differs. So each key of the file must be one of three:

- a field of the dataclass;
- a field that does not change the maths (returned as ignored);
- a field of the reference implementation at the one value under which it does nothing.

Any other key is an error.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from sdjax.errors import UserError
from sdjax.system.untrusted import brief, check_depth, plain

Config = TypeVar("Config")
_MOST_PROBLEMS = 40  # problems that an error shows


class ConfigError(UserError):
    """A model config that this code cannot honour. The message lists every problem found."""


def read_config(
    cls: type[Config],
    data: Mapping[str, Any],
    *,
    where: str,
    ignored: frozenset[str] = frozenset(),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    absent: Mapping[str, Any] | None = None,
    null: Mapping[str, Any] | None = None,
) -> tuple[Config, list[str]]:
    """Build `cls` from parsed JSON; return it and the sorted names of the keys that were ignored.

    Args:
        cls: a frozen dataclass whose fields bear the names of the JSON.
        data: the parsed file.
        where: the file, for messages.
        ignored: names that cannot change the maths. Names with a leading underscore
            (`_class_name`, `_diffusers_version`) are always among them.
        neutral: reference fields that are not implemented, with the values that switch them off. A
            list in the file passes when each of its entries does.
        absent: the reference's defaults for fields missing from the file, where they are not the
            defaults of `cls`.
        null: the meaning of `null` in fields that the reference declares optional.

    Raises:
        ConfigError: listing every unknown or unsupported field with its value.
    """
    try:
        check_depth(data)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    neutral, null = neutral or {}, null or {}
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(absent or {})
    skipped: list[str] = []
    problems: list[str] = []
    for name, value in sorted(data.items()):
        if name in names:
            value = null[name] if value is None and name in null else _tuples(value)
            if matches(value, hints[name]):
                values[name] = value
            else:
                problems.append(f"{name} = {brief(value)} (expected {_type_name(hints[name])})")
        elif name in neutral:
            if not _is_neutral(value, neutral[name]):
                allowed = " or ".join(repr(v) for v in neutral[name])
                problems.append(f"{name} = {brief(value)} (supported: {allowed})")
        elif name in ignored or name.startswith("_"):
            skipped.append(name)
        else:
            problems.append(f"{plain(name)} = {brief(value)} (unknown field)")
    if problems:
        raise ConfigError(_report(where, cls.__name__, problems))
    try:
        return cls(**values), skipped
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(_report(where, cls.__name__, [str(error)])) from error


def json_values(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass as `json.dump` takes them: tuples become lists."""
    return {field.name: _lists(getattr(config, field.name)) for field in dataclasses.fields(config)}


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` has the annotated type: bool, int, float, str, None, tuples and unions.

    An int passes for a float; a bool passes for neither.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(matches(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def check(condition: bool, field: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names the field, its value and `expected`, unless `condition`."""
    if not condition:
        raise ValueError(f"{field} = {brief(value)}: expected {expected}")


def check_bounds(config: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Check the numbers of a config, or each number of a tuple; None passes.

    Args:
        bounds: {field: (least, most)}. Without bounds, a file could ask for a network that no
            machine can build, or that takes for ever to describe.

    Raises:
        ValueError: naming the field, its value and its bounds. NaN is outside all.
    """
    for field, (least, most) in bounds.items():
        value = getattr(config, field)
        for number in value if isinstance(value, tuple) else (value,):
            within = number is None or least <= number <= most
            check(within, field, value, f"{least:,} to {most:,}")


def _report(where: str, name: str, problems: list[str]) -> str:
    """The message of a ConfigError about `problems`."""
    more = len(problems) - _MOST_PROBLEMS
    shown = [*problems[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
    lines = "\n".join(f"  {problem}" for problem in shown)
    return (
        f"{where}: not a config that {name} can honour:\n{lines}\n"
        "Use a checkpoint without these, or edit the file if they are mistaken."
    )


def _is_neutral(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether `value`, or each entry of it, is one of the allowed values."""
    entries = value if isinstance(value, (list, tuple)) and value else [value]
    return all(
        any(entry == a and isinstance(entry, bool) == isinstance(a, bool) for a in allowed)
        for entry in entries
    )


def _tuples(value: Any) -> Any:
    """The value with lists as tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _lists(value: Any) -> Any:
    """The value with tuples as lists."""
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def _type_name(hint: Any) -> str:
    return str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
