"""TensorFlow Datasets, imported here only: quiet, and with a TensorFlow without accelerators.

TFDS imports TensorFlow when it needs it. Import `tfds` from here, and only where it is used.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from absl import logging

from sdjax.data.config import DataError
from sdjax.system import tensorflow_on_cpu, untrusted

tensorflow_on_cpu.prepare()

import tensorflow_datasets as tfds  # noqa: E402

tfds.disable_progress_bar()

__all__ = ["foreign", "own_classes", "quiet_tfds", "tfds"]


def own_classes() -> frozenset[str]:
    """Return the names of the feature classes of TFDS, with their older names."""
    names: set[str] = set()
    for kind in vars(tfds.features).values():
        if isinstance(kind, type) and issubclass(kind, tfds.features.FeatureConnector):
            names |= {f"{kind.__module__}.{kind.__name__}", *vars(kind).get("ALIASES", ())}
    return frozenset(names)


def foreign(name: Any) -> str:
    """Return the message about a feature class that is not of TFDS, to stand after a file."""
    return (
        f"names the feature class {untrusted.brief(name)}, which is not of TFDS: Python would run "
        "the module that it is in. Store the dataset with features of TFDS alone, such as Image, "
        "Text and ClassLabel"
    )


def _refuse_foreign_classes() -> None:
    """Make TFDS refuse to import a module that a dataset's files name.

    `sdjax.data.tfds.stored` checks the files of a known folder first. TFDS also finds folders by
    the names of datasets.
    """
    base, known = tfds.features.FeatureConnector, own_classes()
    theirs = base.cls_from_name.__func__

    def cls_from_name(cls: Any, python_class_name: str) -> Any:
        if python_class_name not in known:
            raise DataError(f"features.json {foreign(python_class_name)}")
        return theirs(cls, python_class_name)

    base.cls_from_name = classmethod(cls_from_name)


_refuse_foreign_classes()


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """A context that hides TFDS's messages about builders that download nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
