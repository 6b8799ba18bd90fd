"""Pictures for CLIP on devices, against Pillow's."""

import jax
import numpy as np
import pytest

from sdjax.data.clip_pixels import CLIP_MEAN, CLIP_STD, ClipPreprocess, clip_pixels


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (50, 30), (17, 17)])
def test_pixels_on_devices_are_those_of_pillow_but_for_its_rounding(size):
    side, short = 24, min(size)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    # The processor resizes before it crops, by which the middle may be off by a part of a pixel.
    top, left = ((length - short) // 2 for length in size)
    square = images[:, top : top + short, left : left + short]
    want = ClipPreprocess(side, (side, side)).pixels(square)
    made = jax.jit(lambda x: clip_pixels(x, side, mean=CLIP_MEAN, std=CLIP_STD))(images / 255.0)
    # Pillow rounds to whole numbers after each axis.
    np.testing.assert_allclose(made, want, atol=2.1 / 255 / min(CLIP_STD))
