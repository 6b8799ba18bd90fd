"""Fuzzing: hostile files, made from a seed, are given to the readers of sdjax.

A target is a pair (name, function). The function takes a numpy Generator and an empty folder, makes
one hostile input there, and gives it to a reader. It returns a word for what became of the input,
such as "read" or "refused", which the runner counts. It catches the errors that the reader may
raise; whatever else it raises is a fault.

`python -m tests.fuzz` runs all targets, each in a process of its own; tests/test_fuzz.py runs a
few inputs of each.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

Target = Callable[[np.random.Generator, Path], str | None]

MODULES = (
    "targets_adapters",
    "targets_data",
    "targets_embeddings",
    "targets_models",
    "targets_pickles",
    "targets_settings",
)


def targets() -> dict[str, Target]:
    """Return {name: function} of every target there is.

    Raises:
        ValueError: two targets have one name.
    """
    found: dict[str, Target] = {}
    for module in MODULES:
        if importlib.util.find_spec(f"tests.fuzz.{module}") is None:
            continue
        for name, function in importlib.import_module(f"tests.fuzz.{module}").TARGETS:
            if name in found:
                raise ValueError(f"two fuzzing targets have the name {name!r}")
            found[name] = function
    return found
