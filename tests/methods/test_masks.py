"""Masks of random shapes: each against another rasteriser, and their shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.spatial import KDTree

from sdjax.methods import masks
from sdjax.methods.inpaint import InpaintConfig

H, W = 48, 64
SCALE = 32  # of the pictures that Pillow draws, so that its rounding of corners matters little


def middles():
    x, y = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    return np.stack([x, y], axis=-1).astype(np.float32)


def drawn(method, points, **options):
    """Pillow's picture of a shape, at the middles of pixels."""
    picture = Image.new("1", (W * SCALE, H * SCALE))
    getattr(ImageDraw.Draw(picture), method)([(x * SCALE, y * SCALE) for x, y in points], **options)
    return np.asarray(picture)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]


@pytest.mark.parametrize("seed", range(3))
def test_shapes_are_those_that_pillow_fills(seed):
    key, sides = jax.random.key(seed), jnp.array([W, H], jnp.float32)
    centre, size = masks._box(key, sides)
    corners = masks._corners(key, sides)
    box = [tuple(np.asarray(centre - size / 2)), tuple(np.asarray(centre + size / 2))]
    grid = middles()
    found = {
        "rectangle": (masks.inside_box(grid, centre, size), box),
        "ellipse": (masks.inside_ellipse(grid, centre, size), box),
        "polygon": (masks.inside_polygon(grid, corners), list(map(tuple, np.asarray(corners)))),
    }
    for method, (ours, points) in found.items():
        theirs = drawn(method, points, fill=1)
        assert theirs.any() and not theirs.all()
        # Pillow paints the edge itself: a row of a 32nd of a pixel.
        assert (np.asarray(ours) != theirs).mean() < 0.004, method
    assert (np.asarray(centre - size / 2) >= -1e-3).all()
    assert (np.asarray(centre + size / 2) <= [W + 1e-3, H + 1e-3]).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_stroke_is_what_is_near_its_path(seed):
    points, width = masks._path(jax.random.key(seed), jnp.array([W, H], jnp.float32))
    share = np.linspace(0, 1, 400)[:, None]
    path = np.asarray(points, np.float64)
    dense = np.concatenate([a + share * (b - a) for a, b in zip(path, path[1:], strict=False)])
    distance, _ = KDTree(dense).query(middles().reshape(-1, 2))
    ours = np.asarray(masks.near_path(middles(), points, width)).reshape(-1)
    differs = ours != (distance < float(width) / 2)
    assert ours.any() and (np.abs(distance[differs] - float(width) / 2) < 0.01).all()


def test_shares_say_how_often_each_shape_comes_and_a_mask_is_of_its_key():
    keys = jax.random.split(jax.random.key(0), 400)
    shares = {"boxes": 3.0, "ellipses": 0.0, "polygons": 0.0, "strokes": 1.0}
    draw = lambda keys, shares: jax.jit(lambda k: masks.draw_masks(k, (H, W), shares))(keys)  # noqa: E731
    made = np.asarray(draw(keys, shares))
    assert made.shape == (400, H, W, 1) and set(np.unique(made)) == {0.0, 1.0}
    boxes = draw(keys, {"boxes": 1.0})
    strokes = draw(keys, {"strokes": 1.0})
    is_box = (made == np.asarray(boxes)).all(axis=(1, 2, 3))
    is_stroke = (made == np.asarray(strokes)).all(axis=(1, 2, 3))
    assert (is_box | is_stroke).all() and abs(is_box.mean() - 0.75) < 0.06
    # A box has half of each side on average, so a quarter of the picture.
    assert abs(float(boxes.mean()) - 0.25) < 0.03
    np.testing.assert_array_equal(draw(keys[7:9], shares), made[7:9])
    whole = masks.whole_masks(keys, jnp.zeros((400, 4, 4, 1)), 0.25).mean(axis=(1, 2, 3))
    assert set(np.unique(whole)) == {0.0, 1.0} and abs(float(whole.mean()) - 0.25) < 0.05


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"whole": 1.5}, "method.whole is 1.5; expected 0 to 1"),
        ({"boxes": -1.0}, "expected 0 or more"),
        ({n: 0.0 for n in masks.SHAPES}, "and one above 0"),
    ],
)
def test_shares_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        InpaintConfig(**fields)
