"""Strips over time: they grow, go back, and begin anew where they do not fit."""

import numpy as np
import pytest
from PIL import Image

from sdjax.sampling import strips


def pictures(value, count=3, side=16):
    return np.full((count, side, side, 3), value, np.uint8)


def column(path, index, row=0, side=96):
    """The middle pixel of one picture of the strip."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    x = index * (side + strips.GAP) + side // 2
    return sheet[strips.HEADER + row * (side + strips.GAP) + side // 2, x].tolist()


def test_a_strip_grows_to_the_right(tmp_path):
    path = tmp_path / "deeper" / "strip.png"
    assert strips.append_column(path, 100, pictures(10)) == [100]
    assert strips.append_column(path, 200, pictures(20)) == [100, 200]
    assert column(path, 0) == [10] * 3 and column(path, 1, row=2) == [20] * 3
    assert Image.open(path).size == (2 * 100, strips.HEADER + 3 * 100)
    assert Image.open(path).text["steps"] == "100,200"


def test_going_back_draws_later_columns_again(tmp_path):
    path = tmp_path / "strip.png"
    for step in (100, 200, 300):
        strips.append_column(path, step, pictures(step // 10))
    assert strips.append_column(path, 200, pictures(99)) == [100, 200]
    assert [column(path, i) for i in (0, 1)] == [[10] * 3, [99] * 3]
    assert Image.open(path).width == 200


@pytest.mark.parametrize("spoil", ["other count", "other file", "half a file"])
def test_what_does_not_fit_is_begun_anew(tmp_path, spoil):
    path = tmp_path / "strip.png"
    strips.append_column(path, 100, pictures(10))
    if spoil == "other file":
        Image.new("RGB", (100, 316)).save(path)
    if spoil == "half a file":
        path.write_bytes(path.read_bytes()[:200])
    images = pictures(20, count=2 if spoil == "other count" else 3)
    assert strips.append_column(path, 200, images) == [200]


def test_only_the_first_rows_and_wide_pictures_keep_their_shape(tmp_path):
    path = tmp_path / "strip.png"
    strips.append_column(path, 1, np.zeros((20, 200, 400, 3), np.uint8), rows=8)
    assert Image.open(path).size == (192 + strips.GAP, strips.HEADER + 8 * 100)
