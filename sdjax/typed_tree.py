"""Trees of frozen dataclasses from nested dicts, strictly: every mistake is told at once."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sdjax.models.config import ConfigError
from sdjax.system.untrusted import brief, listed, plain

T = TypeVar("T")
Variants = Mapping[type, tuple[str, Mapping[str, type]]]
_MOST_UNKNOWN = 20  # fields of a group, or mistakes of a list of groups, that an error shows


def to_dict(config: Any) -> Any:
    """Nested dataclasses -> nested dicts with the same leaves (tuples stay tuples)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return tuple(to_dict(item) for item in config)
    return config


def build(cls: type[T], values: Any, where: str, variants: Variants) -> T:
    """Return the dataclass of a nested dict.

    Args:
        where: the name of the tree, in messages.
        variants: {base dataclass: (the field that tells which, {its value: dataclass})}, of groups
            that are one of several dataclasses.

    Raises:
        ConfigError: lists unknown fields, wrong types and values out of range at once, up to fifty.
    """
    errors: list[str] = []
    built = _build(cls, values, where, errors, variants)
    if errors:
        raise ConfigError(f"the configuration has errors:\n  {listed(errors)}")
    assert built is not None
    return built


def _variant(
    cls: type, values: Any, where: str, errors: list[str], variants: Variants
) -> type | None:
    """The dataclass that a group is; None, and an error, if it names none."""
    if cls not in variants or not isinstance(values, dict):
        return cls
    tag, known = variants[cls]
    name = values.get(tag, next(iter(known)))
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(str(name)[:100], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        errors.append(f"{where}.{tag} is {brief(name)}; expected one of {', '.join(known)}{hint}")
        return None
    return known[name]


def _build(cls: type, values: Any, where: str, errors: list[str], variants: Variants) -> Any | None:
    if not isinstance(values, dict):
        errors.append(f"{where} is {brief(values)}; expected a group of fields")
        return None
    found = _variant(cls, values, where, errors, variants)
    if found is None:
        return None
    hints = typing.get_type_hints(found)
    known = {field.name for field in dataclasses.fields(found)}
    before = len(errors)
    _note_unknown(values, known, where, errors)
    kwargs = {
        name: _field(hints[name], values[name], f"{where}.{name}", errors, variants)
        for name in known & set(values)
    }
    if len(errors) > before:
        return None
    try:
        return found(**kwargs)
    except (ValueError, ArithmeticError) as error:
        errors.append(f"{where}: {error}")
        return None


def _note_unknown(
    values: Mapping[str, Any], known: set[str], where: str, errors: list[str]
) -> None:
    unknown = [name for name in values if name not in known]
    listed = f"; known: {sorted(known)}"  # once
    for name in unknown[:_MOST_UNKNOWN]:
        name = plain(name)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {where}.{close[0]}?" if close else listed
        listed = listed if close else ""
        errors.append(f"{where}.{name} is not a field{hint}")
    if len(unknown) > _MOST_UNKNOWN:
        errors.append(f"{where} has {len(unknown) - _MOST_UNKNOWN} more fields that it has not")


def _field(hint: Any, value: Any, where: str, errors: list[str], variants: Variants) -> Any:
    """The value of one field; None, and an error, if it is wrong."""
    group, optional = _group(hint)
    several = _group_in_tuple(hint)
    if optional and value is None:
        return None
    if group is not None:
        return _build(group, value, where, errors, variants)
    if several and isinstance(value, tuple | list):
        return _groups(several, value, where, errors, variants)
    try:
        return _cast(hint, value)
    except TypeError:
        errors.append(
            f"{where} is {brief(value)} ({type(value).__name__}); expected {_describe(hint)}"
        )
        return None


def _groups(
    cls: type, values: Sequence[Any], where: str, errors: list[str], variants: Variants
) -> tuple[Any, ...]:
    """The dataclasses of a list; after `_MOST_UNKNOWN` errors the rest is left."""
    found: list[Any] = []
    before = len(errors)
    for i, item in enumerate(values):
        if len(errors) - before >= _MOST_UNKNOWN:
            errors.append(f"{where} has {len(values) - i} more groups that were not looked at")
            break
        found.append(_build(cls, item, f"{where}[{i}]", errors, variants))
    return tuple(found)


def _group_in_tuple(hint: Any) -> Any:
    """The dataclass of `tuple[Dataclass, ...]`, which may also be None, else None."""
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        first, *_ = typing.get_args(option) or (None,)
        if typing.get_origin(option) is tuple and dataclasses.is_dataclass(first):
            return first
    return None


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
