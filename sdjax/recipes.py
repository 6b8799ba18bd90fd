"""A recipe file out of a configuration: what differs from the defaults, as `sdjax.main` runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sdjax.config import VARIANTS, beginning
from sdjax.families.config import ModelConfig
from sdjax.methods.method import MethodConfig
from sdjax.system import untrusted


def recipe(config: Mapping[str, Any], about: str) -> str:
    """Python code with a `get_config()` that gives `config` again.

    It may be a stranger's: a name becomes code only if it is of a field, and values are literals.

    Args:
        config: nested, as `to_dict` gives it or as config.json holds it.
        about: docstring of the file.
    """
    variants = _variants(config)
    names = {argument: name for argument, name, _ in variants.values()}
    own = beginning(names.get("family", "sd"), "base", names.get("method", "denoise"))
    defaults = json.loads(json.dumps(own))  # tuples become lists, as in a file
    fields, unknown = differences(defaults, config)
    chosen = ", ".join(f"{argument}={name!r}" for argument, name, _ in variants.values())
    lines = [f"    c.{name} = {_literal(value)}" for name, value in fields]
    if unknown:
        lines.insert(0, f"    # Left out, as there are no such fields: {untrusted.brief(unknown)}")
    quoted = about.replace("\\", "\\\\").replace('"""', "'''")
    return "\n".join([
        f'"""{quoted}"""', "",
        "from sdjax.config import default", "", "",
        "def get_config():", f"    c = default({chosen})", *lines, "    return c", "",
    ])  # fmt: skip


def _variants(config: Mapping[str, Any]) -> dict[str, tuple[str, str, type]]:
    """{group: (argument of `default`, its value, dataclass)} where that is not the default's."""
    found = {}
    groups = (("model", "family", ModelConfig), ("method", "method", MethodConfig))
    for group, argument, base in groups:
        tag, known = VARIANTS[base]
        values = config.get(group)
        name = values.get(tag) if isinstance(values, Mapping) else None
        if isinstance(name, str) and name in known and name != next(iter(known)):
            found[group] = (argument, name, known[name])
    return found


def differences(
    defaults: Mapping[str, Any], config: Mapping[str, Any], prefix: str = ""
) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return what in `config` is not as in `defaults`.

    Returns:
        (dotted name, value) of fields that differ; dotted names that `defaults` does not have.
    """
    found: list[tuple[str, Any]] = []
    unknown: list[str] = []
    for name, value in config.items():
        if name not in defaults:
            unknown.append(prefix + name)
            continue
        default = defaults[name]
        if isinstance(value, dict) and isinstance(default, dict):
            inner, missing = differences(default, value, f"{prefix}{name}.")
            found += inner
            unknown += missing
        elif _plain(value) != default:
            found.append((prefix + name, _plain(value)))
    return found, unknown


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON has them; `resolve` makes tuples of them again."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _literal(value: Any) -> str:
    """`repr`, which writes inf and nan as names that Python does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_literal(v)}' for k, v in value.items())}}}"
    return repr(value)
