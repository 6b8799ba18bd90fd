"""Write docs/config.md, a table of every field of the configuration, from the dataclasses.

    python -m tests.config_table > docs/config.md

A field's description is the comment beside it, or above it, or its line in the docstring of its
class. Where a field has a comment beside it, one above it is a heading for the fields that follow.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator

from sdjax.config import VARIANTS, Config

ABOUT = """# Every field

A recipe sets these fields, `c.data.batch_size = 64`.
The command line changes them, `--config.data.batch_size=64`.
An unknown field, a wrong type and a value out of range are errors that name the field.

This page is generated from the dataclasses by `python -m tests.config_table > docs/config.md`.
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """A row of a table. `groups`: the dataclasses that it may hold."""

    name: str
    default: str
    description: str
    heading: str
    groups: tuple[type, ...]


def fields_of(cls: type) -> list[Field]:
    """Return the fields of a dataclass, its base's first, each with its description."""
    described: dict[str, tuple[str, str]] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            described |= {
                n: d for n, d in descriptions(part).items() if any(d) or n not in described
            }
    hints = typing.get_type_hints(cls)
    return [
        Field(f.name, default_of(f), *described[f.name], tuple(held_by(hints[f.name])))
        for f in dataclasses.fields(cls)
    ]


def descriptions(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (description, the heading before it)} of those that a class defines itself."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt")
    }
    written = from_docstring(cls)
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        lines = range(node.lineno, node.end_lineno + 1)
        beside = " ".join(comments[n][0] for n in lines if n in comments)
        first = node.lineno
        while comments.get(first - 1, ("", False))[1]:
            first -= 1
        above = " ".join(comments[n][0] for n in range(first, node.lineno))
        heading = above.rstrip(".") if beside else ""
        parts = (written.get(node.target.id, ""), beside or above)
        found[node.target.id] = (" ".join(filter(None, parts)), heading)
    return found


def from_docstring(cls: type) -> dict[str, str]:
    """{field: text} of the lines "field: text" and "field, field: text" of a docstring."""
    found: dict[str, str] = {}
    names: list[str] = []
    names_of = {field.name for field in dataclasses.fields(cls)}
    indent = 0
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        start = re.match(r"(\s*)(\w+(?:, \w+)*): (.*)", line)
        if start and set(start[2].split(", ")) <= names_of:
            names, indent = start[2].split(", "), len(start[1])
            found |= dict.fromkeys(names, start[3])
        elif names and line.strip() and len(line) - len(line.lstrip()) > indent:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def about(cls: type) -> str:
    """What the docstring says of the class itself, one sentence a line."""
    kept = []
    names_of = {field.name for field in dataclasses.fields(cls)}
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        start = re.match(r"\s*(\w+(?:, \w+)*): ", line)
        if line.strip() in ("Attributes:", "Raises:"):
            break
        if start and set(start[1].split(", ")) <= names_of:
            break
        kept.append(line)
    text = " ".join(filter(None, map(str.strip, kept)))
    return escaped(re.sub(r"(?<=\.) (?=[A-Z])", "\n", text))


def held_by(hint: typing.Any) -> list[type]:
    """The dataclasses in a type, such as both of `A | tuple[B, ...]`."""
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [held for part in typing.get_args(hint) for held in held_by(part)]


def default_of(field: dataclasses.Field) -> str:
    """The default as Python writes it, large whole numbers with their thousands apart."""
    value = field.default
    return f"`{value:_}`" if type(value) is int and value > 9999 else f"`{value!r}`"


def spelled(text: str, cls: type) -> str:
    """The text with its lists by name, such as SAMPLERS, written out."""

    def values(name: re.Match) -> str:
        found = getattr(sys.modules[cls.__module__], name[1], None)
        return ", ".join(map(str, found)) if isinstance(found, tuple | dict) else name[0]

    return re.sub(r"`?\b([A-Z][A-Z_]{3,})\b`?", values, text)


def escaped(text: str) -> str:
    """The text as a cell of a table; what is in backticks stays."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [
        re.sub(r"([|*\[\]])", r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2]
    ]
    return "".join(pieces)


def sections() -> Iterator[tuple[str, type, list[Field]]]:
    """(name, dataclass, its fields) of every group, each after the one that holds it, once."""
    seen = {Config}
    todo: list[tuple[str, type]] = [("", Config)]
    while todo:
        name, cls = todo.pop(0)
        tag, variants = VARIANTS.get(cls, ("", {}))
        parts = [(name, cls, fields_of(cls))]
        common = {field.name for field in parts[0][2]}
        for value, variant in variants.items():
            own = [field for field in fields_of(variant) if field.name not in common]
            parts.append((f'{name}.{tag} = "{value}"', variant, own))
        yield from parts
        inner: list[tuple[str, type]] = []
        for field in itertools.chain(*(fields for _, _, fields in parts)):
            new = [held for held in field.groups if held not in seen]
            inner += [(f"{name}.{field.name}".lstrip("."), held) for held in new]
            seen |= set(new)
        todo = inner + todo


def page() -> str:
    """The whole of docs/config.md."""
    found = list(sections())
    names = {cls: name for name, cls, _ in found}
    lines = [ABOUT]
    for name, cls, fields in found:
        lines += [f"## {name or 'config'}", "", about(cls), ""]
        lines += ["| field | default | what |", "| --- | --- | --- |"] if fields else []
        for field in fields:
            if field.heading:
                lines.append(f"| **{escaped(field.heading)}** | | |")
            default, text = field.default, field.description
            for group in field.groups:
                text = text or about(group).split("\n")[0]
                link = f"[a group](#{names[group].replace('.', '')})"
                default = f"{default}, each {link}" if default == "`()`" else link
            if cls in VARIANTS and field.name == VARIANTS[cls][0]:
                default = "or ".join(f'`"{value}"` ' for value in VARIANTS[cls][1]).strip()
            lines.append(f"| `{field.name}` | {default} | {escaped(spelled(text, cls))} |")
        lines += [""] if fields else []
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    print(page(), end="")
