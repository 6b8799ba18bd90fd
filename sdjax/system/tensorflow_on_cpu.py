"""TensorFlow as every package imports it: quiet, without an accelerator, and only when needed.

It takes two seconds to load. Readers of prepared datasets do without it. TFDS needs it for most
datasets of others, etils for `gs://`, and clu for TensorBoard's event files there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_NAME = "tensorflow"


def prepare() -> None:
    """Make TensorFlow hide accelerators from itself as soon as it is imported.

    JAX must own them: a TensorFlow that sees a GPU takes all of its memory.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow announces that it is on
    if _NAME in sys.modules:
        _hide_accelerators(sys.modules[_NAME])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _hide_accelerators(tf: Any) -> None:
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)


class _Finder(importlib.abc.MetaPathFinder):
    """A finder of TensorFlow whose loader hides accelerators once it has loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that hides accelerators after the loader it wraps has run."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _hide_accelerators(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # readers of resources call get_data, is_package, ...
