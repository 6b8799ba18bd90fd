"""The one door to TensorFlow Datasets: quiet, and with a TensorFlow that sees no accelerator.

TFDS imports TensorFlow when it needs it. Import `tfds` from here, and only where it is used.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from absl import logging

from sdjax import tensorflow_on_cpu

tensorflow_on_cpu.prepare()

import tensorflow_datasets as tfds  # noqa: E402

tfds.disable_progress_bar()

__all__ = ["quiet_tfds", "tfds"]


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Holds back what TFDS says of builders that download nothing ("Using custom data ...")."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
