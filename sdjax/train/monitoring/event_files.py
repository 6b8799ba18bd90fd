"""TensorBoard's event files, through clu.

Importing this module imports TensorFlow, which takes seconds; `metrics_log` does it in a thread.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from sdjax.system import tensorflow_on_cpu

tensorflow_on_cpu.prepare()

import tensorflow as tf  # noqa: E402
from clu import metric_writers  # noqa: E402


class EventFiles:
    """clu's writer of a folder; its methods raise OSError where they cannot write."""

    def __init__(self, folder: str):
        self._folder = folder
        self._writer = self._with_os_errors(metric_writers.SummaryWriter)(folder)

    def __getattr__(self, name: str) -> Any:
        return self._with_os_errors(getattr(self._writer, name))

    def _with_os_errors(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except tf.errors.OpError as error:
                # "{{function_node ...}} Not a directory [Op:CreateSummaryFileWriter] name: "
                cause = re.sub(r"\{\{.*?\}\} *| *\[Op:.*", "", error.message)
                raise OSError(f"{self._folder}: {cause}") from error

        return called
