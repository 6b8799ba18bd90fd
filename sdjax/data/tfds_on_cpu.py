"""The one door to TensorFlow Datasets, which brings in TensorFlow: quietly, and without a GPU.

Import `tfds` from here, and only where it is used: TensorFlow takes seconds to load.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

from absl import logging

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or TensorFlow announces that it is on

import tensorflow as tf  # noqa: E402

# JAX must own the accelerators: a TensorFlow that sees a GPU takes all of its memory.
tf.config.set_visible_devices([], "GPU")

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
