"""The peers of benchmarks/input_pipeline.py: the same work by torch's DataLoader and by tf.data.

Both read the files of the image folder and give batches float32 [b, r, r, 3] in [-1, 1]: decoded,
short side resized to r by antialiased Lanczos, cut out of the middle, normalised. Endless.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import torch
from PIL import Image


class Photos(torch.utils.data.Dataset):
    """Pillow's transforms, as torchvision applies them to Pillow's images."""

    def __init__(self, files: list[str], resolution: int):
        self.files = files
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        side = self.resolution
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        scale = max(side / image.height, side / image.width)
        width, height = (max(side, round(x * scale)) for x in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).to(torch.float32).div_(127.5).sub_(1.0)


def torch_batches(
    files: list[str], resolution: int, batch: int, *, workers: int, prefetch: int, shuffle: bool
) -> Iterator[np.ndarray]:
    """workers = 0 decodes in this thread; prefetch: batches ahead, for each worker."""
    loader = torch.utils.data.DataLoader(
        Photos(files, resolution),
        batch_size=batch,
        shuffle=shuffle,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # This process has threads by now, which a fork would not survive.
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=prefetch if workers else None,
    )
    while True:
        for images in loader:
            yield images.numpy()


def tf_batches(
    files: list[str], resolution: int, batch: int, *, threads: int, prefetch: int, shuffle: bool
) -> Iterator[np.ndarray]:
    """threads = 0 decodes in the thread that asks."""
    side = resolution

    def load(path: tf.Tensor) -> tf.Tensor:
        # Pillow decodes with libjpeg's accurate DCT, too.
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")
        shape = tf.cast(tf.shape(image)[:2], tf.float64)
        scale = tf.reduce_max(side / shape)
        size = tf.maximum(tf.cast(tf.round(shape * scale), tf.int32), side)
        image = tf.image.resize(image, size, "lanczos3", antialias=True)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        image = tf.clip_by_value(image[top : top + side, left : left + side], 0.0, 255.0)
        return tf.ensure_shape(image / 127.5 - 1.0, (side, side, 3))

    options = tf.data.Options()
    options.threading.private_threadpool_size = max(threads, 1)
    options.threading.max_intra_op_parallelism = 1  # as fast, and the threads are those asked for
    dataset = tf.data.Dataset.from_tensor_slices(files)
    if shuffle:
        dataset = dataset.shuffle(len(files))
    dataset = dataset.repeat().map(load, num_parallel_calls=threads or None)
    dataset = dataset.batch(batch, drop_remainder=True)
    if threads:
        dataset = dataset.prefetch(prefetch)
    return dataset.with_options(options).as_numpy_iterator()
