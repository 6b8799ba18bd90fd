"""Masks of random shapes, each a function of one key: boxes, ellipses, polygons, strokes, all.

A mask is 1 inside its shape and 0 outside, taken at the middles of pixels. Points are (x, y) in
pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CORNERS = 8  # of a polygon
SEGMENTS = 8  # of the longest stroke


def inside_box(grid: jax.Array, centre: jax.Array, size: jax.Array) -> jax.Array:
    """Whether points lie in a box of a size (width, height): bool [H, W]."""
    return jnp.all(jnp.abs(grid - centre) < size / 2, axis=-1)


def inside_ellipse(grid: jax.Array, centre: jax.Array, size: jax.Array) -> jax.Array:
    """Whether points lie in the ellipse that fills a box: bool [H, W]."""
    return jnp.sum(jnp.square((grid - centre) / (size / 2)), axis=-1) < 1.0


def inside_polygon(grid: jax.Array, corners: jax.Array) -> jax.Array:
    """Whether points lie in a polygon [K, 2], by the even-odd rule: bool [H, W].

    A ray to the right crosses an odd number of edges.
    """
    x, y = grid[..., 0], grid[..., 1]
    starts = corners[:, :, None, None]  # [K, 2, 1, 1]
    ends = jnp.roll(starts, -1, axis=0)
    spans = (starts[:, 1] > y) != (ends[:, 1] > y)  # [K, H, W]
    rise = ends[:, 1] - starts[:, 1]
    slope = (ends[:, 0] - starts[:, 0]) / jnp.where(rise == 0, 1.0, rise)
    crossed = spans & (x < starts[:, 0] + (y - starts[:, 1]) * slope)
    return jnp.sum(crossed, axis=0) % 2 == 1


def near_path(grid: jax.Array, points: jax.Array, width: jax.Array) -> jax.Array:
    """Whether points lie within width / 2 of a path [K, 2]: bool [H, W]."""
    starts = points[:-1, None, None]  # [K - 1, 1, 1, 2]
    along = jnp.diff(points, axis=0)[:, None, None]
    length = jnp.maximum(jnp.sum(along**2, axis=-1), 1e-6)
    share = jnp.clip(jnp.sum((grid - starts) * along, axis=-1) / length, 0.0, 1.0)
    away = grid - starts - share[..., None] * along  # [K - 1, H, W, 2]
    return jnp.any(jnp.sum(away**2, axis=-1) < jnp.square(width / 2), axis=0)


def _box(key: jax.Array, sides: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The centre and the size of a box within the picture, each side uniform up to the whole.

    diffusers examples/research_projects/dreambooth_inpaint, random_mask.
    """
    places = jax.random.uniform(key, (2, 2))
    size = jnp.maximum(places[0] * sides, 1.0)
    return size / 2 + places[1] * (sides - size), size


def _corners(key: jax.Array, sides: jax.Array) -> jax.Array:
    """A polygon round a centre, its corners in the order of their angles, [CORNERS, 2]."""
    angle, radius, place = jax.random.split(key, 3)
    angles = jnp.sort(jax.random.uniform(angle, (CORNERS,), maxval=2 * jnp.pi))
    reach = jax.random.uniform(radius, (CORNERS + 1,))
    # From a half of the largest radius on, which is 10 to 60 % of the shorter side.
    radii = (0.1 + 0.5 * reach[0]) * jnp.min(sides) * (0.5 + 0.5 * reach[1:])
    round_ = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jax.random.uniform(place, (2,)) * sides + radii[:, None] * round_


def _path(key: jax.Array, sides: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A stroke of one to SEGMENTS segments that turns at most a right angle, and its width."""
    start, first, turn, length, thick, many = jax.random.split(key, 6)
    turns = jax.random.uniform(turn, (SEGMENTS,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    angles = jax.random.uniform(first, maxval=2 * jnp.pi) + jnp.cumsum(turns)
    lengths = jnp.min(sides) * jax.random.uniform(length, (SEGMENTS,), minval=0.05, maxval=0.4)
    count = jax.random.randint(many, (), 1, SEGMENTS + 1)
    lengths = jnp.where(jnp.arange(SEGMENTS) < count, lengths, 0.0)
    steps = lengths[:, None] * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    begin = jax.random.uniform(start, (1, 2)) * sides
    points = jnp.concatenate([begin, begin + jnp.cumsum(steps, axis=0)])  # [SEGMENTS + 1, 2]
    width = jnp.min(sides) * jax.random.uniform(thick, minval=0.04, maxval=0.2)
    return points, width


def _boxes(key: jax.Array, grid: jax.Array, sides: jax.Array) -> jax.Array:
    return inside_box(grid, *_box(key, sides))


def _ellipses(key: jax.Array, grid: jax.Array, sides: jax.Array) -> jax.Array:
    return inside_ellipse(grid, *_box(key, sides))


def _polygons(key: jax.Array, grid: jax.Array, sides: jax.Array) -> jax.Array:
    return inside_polygon(grid, _corners(key, sides))


def _strokes(key: jax.Array, grid: jax.Array, sides: jax.Array) -> jax.Array:
    return near_path(grid, *_path(key, sides))


SHAPES = {"boxes": _boxes, "ellipses": _ellipses, "polygons": _polygons, "strokes": _strokes}


def draw_masks(keys: jax.Array, size: tuple[int, int], shares: dict[str, float]) -> jax.Array:
    """Return a mask for each key, float32 [b, H, W, 1] of zeros and ones.

    Args:
        size: height and width.
        shares: {name in `SHAPES`: its share}; any scale.
    """
    height, width = size
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    grid, sides = jnp.stack([x, y], axis=-1), jnp.array([width, height], jnp.float32)
    names = [name for name, share in shares.items() if share > 0]
    weights = jnp.array([shares[name] for name in names])

    def one(key: jax.Array) -> jax.Array:
        which = jax.random.choice(jax.random.fold_in(key, 0), len(names), p=weights / sum(weights))
        own = jax.random.fold_in(key, 1)
        return jnp.stack([SHAPES[name](own, grid, sides) for name in names])[which]

    return jax.vmap(one)(keys)[..., None].astype(jnp.float32)


def are_whole(keys: jax.Array, share: float) -> jax.Array:
    """Return which examples, a share by the keys [b], are masked whole: bool [b, 1, 1, 1]."""
    return (jax.vmap(jax.random.uniform)(keys) < share)[:, None, None, None]


def whole_masks(keys: jax.Array, masks: jax.Array, share: float) -> jax.Array:
    """Return masks [b, H, W, 1] of which a share, by the keys [b], covers the whole picture."""
    return jnp.where(are_whole(keys, share), 1.0, masks)
