"""TensorBoard's event files: by TensorBoard's own writer of records, or in a bucket by clu.

clu's writer imports TensorFlow, which takes two seconds of a processor at each start, so it is for
`gs://` alone, where etils needs TensorFlow anyway. Importing this module imports TensorBoard.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from sdjax.data.encoded import to_png
from sdjax.system import paths, tensorflow_on_cpu

tensorflow_on_cpu.prepare()  # a plugin of TensorBoard may import it

_COUNT: Iterator[int] = itertools.count()  # files of one second in one process


class Writer(Protocol):
    """The part of `clu.metric_writers.MetricWriter` that is called."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...
    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...
    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def open_writer(folder: str) -> Writer:
    """Open an event file in a folder, which is made if it is not there.

    Raises:
        OSError: nothing can be written there; the methods of the writer raise it too.
    """
    if paths.is_remote(folder):
        in_bucket: Any = _InBucket(folder)  # passes every call on
        return in_bucket
    return EventFile(folder)


class EventFile:
    """An event file of a local folder, in the format of TensorFlow 2's summaries."""

    def __init__(self, folder: str):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        path = os.path.join(folder, f"{name}.{os.getpid()}.{next(_COUNT)}.v2")
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError:
            pass  # a file: the next line says so
        try:
            self._file = open(path, "xb")
        except OSError as error:
            raise OSError(f"{folder}: {error.strerror}") from error
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers, as float32."""
        metadata = scalar_metadata.create_summary_metadata("", "")
        values = {tag: np.float32(value) for tag, value in scalars.items()}
        self._summary(step, metadata, values)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures [N, H, W, C], uint8 or float in [0, 1], as PNG."""
        metadata = image_metadata.create_summary_metadata("", "")
        self._summary(step, metadata, {tag: _encoded(value) for tag, value in images.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write Markdown."""
        metadata = text_metadata.create_summary_metadata("", "")
        values = {tag: np.array(text.encode(), object) for tag, text in texts.items()}
        self._summary(step, metadata, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the settings of the run, once."""
        self._write(Event(summary=hparams_summary.hparams_pb(dict(hparams))))

    def flush(self) -> None:
        """Wait until all is on disk."""
        self._records.flush()

    def close(self) -> None:
        """Flush, and close the file."""
        self._records.close()

    def _summary(
        self, step: int, metadata: SummaryMetadata, values: Mapping[str, np.ndarray | np.float32]
    ) -> None:
        found = [
            Summary.Value(tag=tag, tensor=make_tensor_proto(value), metadata=metadata)
            for tag, value in values.items()
        ]
        self._write(Event(step=step, summary=Summary(value=found)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _encoded(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> width, height and N files as strings: `tf.summary.image`'s tensor."""
    if images.dtype != np.uint8:  # as tf.image.convert_image_dtype
        images = np.clip(np.nan_to_num(images) * 255.5, 0, 255).astype(np.uint8)
    height, width = images.shape[1:3]
    files = [to_png(image) for image in images]
    return np.array([str(width).encode(), str(height).encode(), *files], object)


class _InBucket:
    """clu's writer; its methods raise OSError where they cannot write."""

    def __init__(self, folder: str):
        from clu import metric_writers

        self._folder = folder
        self._writer = self._with_os_errors(metric_writers.SummaryWriter)(folder)

    def __getattr__(self, name: str) -> Any:
        return self._with_os_errors(getattr(self._writer, name))

    def _with_os_errors(self, call: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf

        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except tf.errors.OpError as error:
                # "{{function_node ...}} Not a directory [Op:CreateSummaryFileWriter] name: "
                cause = re.sub(r"\{\{.*?\}\} *| *\[Op:.*", "", error.message)
                raise OSError(f"{self._folder}: {cause}") from error

        return called
