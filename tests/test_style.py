"""Rules of style for sdjax/ that a machine can check: docstrings, sizes and names.

The sets below name the files that break a rule today. They only shrink: a file that is mended is
taken out, and none is added.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests import conftest

PACKAGE = Path(__file__).parents[1] / "sdjax"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400  # of a file
MOST_FUNCTION_LINES = 60  # from `def` to its last line, without decorators
RIDDLES = ("Of ", "What ")  # beginnings of docstrings that need the function's name to be read
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# The loop of training is one page.
LONG_FUNCTIONS = {("train/loop.py", "_train_stage")}

RIDDLES_LEFT: set[str] = set()
LONG_FUNCTIONS_LEFT: set[str] = set()


def name(file):
    """The path of a file below sdjax/."""
    return file.relative_to(PACKAGE).as_posix()


@functools.cache
def nodes(file):
    """Every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(file.read_text())))


def docstrings(file):
    """The docstrings of a file, with the names of what they describe."""
    for node in nodes(file):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), text


def functions(file):
    """The functions of a file, each with its number of lines."""
    for node in nodes(file):
        if isinstance(node, FUNCTIONS):
            yield node.name, node.end_lineno - node.lineno + 1


def assert_only(offenders, known):
    """Fail unless the offenders are those that are known.

    offenders: {file: what is wrong with it}.
    """
    added = {file: why for file, why in offenders.items() if file not in known}
    assert not added, f"mend these: {added}"
    mended = sorted(known - offenders.keys())
    assert not mended, (
        f"these are mended; take them out of the set in {Path(__file__).name}: {mended}"
    )


def test_no_docstring_begins_with_a_riddle():
    found = {}
    for file in FILES:
        for owner, text in docstrings(file):
            if text.startswith(RIDDLES):
                found.setdefault(name(file), []).append(f"{owner}: {text.splitlines()[0]}")
    assert_only(found, RIDDLES_LEFT)


def test_no_file_is_longer_than_400_lines():
    lengths = {name(file): len(file.read_text().splitlines()) for file in FILES}
    found = {file: lines for file, lines in lengths.items() if lines > MOST_LINES}
    assert not found, f"split these: {found}"


def test_no_function_is_longer_than_60_lines():
    found = {}
    for file in FILES:
        for function, lines in functions(file):
            if lines > MOST_FUNCTION_LINES and (name(file), function) not in LONG_FUNCTIONS:
                found.setdefault(name(file), []).append(f"{function}: {lines} lines")
    assert_only(found, LONG_FUNCTIONS_LEFT)


@pytest.mark.parametrize("part", ["utils", "util", "helpers", "common", "misc"])
def test_no_module_has_a_name_that_says_nothing(part):
    named = [name(file) for file in FILES if part in file.with_suffix("").parts]
    assert not named, f"name these after what is in them: {named}"


def test_what_make_check_runs_starts_no_process_and_needs_no_reference():
    for name in sorted(conftest.UNIT - {"test_style.py"}):
        text = (Path(__file__).parent / name).read_text()
        found = re.findall(r"import subprocess|import torch|import diffusers|importorskip", text)
        assert not found, f"{name}: {found}"
