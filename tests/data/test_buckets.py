"""Buckets: their shapes, who goes where, and that every picture is used once an epoch."""

import collections
import itertools

import numpy as np
import pytest

from sdjax.data.buckets import BucketConfig, assign, bucket_shapes
from sdjax.data.stream import Bucketed
from sdjax.errors import UserError


@pytest.mark.parametrize(
    "resolution, step, max_aspect",
    [(512, 64, 2.0), (1024, 64, 4.0), (500, 64, 3.0), (96, 8, 2.5), (64, 64, 1)],
)
def test_shapes_by_trying_all(resolution, step, max_aspect):
    sides = range(step, resolution**2 // step + 1, step)
    fits = {(h, w) for h, w in itertools.product(sides, sides) if h * w <= resolution**2}
    expected = {
        (h, w)
        for h, w in fits
        if (h + step, w) not in fits and (h, w + step) not in fits
        and max(h / w, w / h) <= max_aspect
    }  # fmt: skip
    found = bucket_shapes(resolution, BucketConfig(step=step, max_aspect=max_aspect))
    assert set(found) == expected and len(found) == len(expected)
    assert found == sorted(found, key=lambda shape: shape[1] / shape[0])


def test_the_resolutions_of_sdxl_are_among_them():
    """Of appendix I of the SDXL paper (arXiv 2307.01952), those up to 7:4."""
    published = [(1024, 1024), (1152, 896), (1216, 832), (1344, 768)]
    found = bucket_shapes(1024, BucketConfig(step=64))
    assert {*published, *((w, h) for h, w in published)} <= set(found)


def test_no_shape_is_an_error():
    with pytest.raises(UserError, match="no multiple of data.buckets.step = 64 within data.resol"):
        bucket_shapes(50, BucketConfig(step=64))


def some_sizes(count, seed=0):
    rng = np.random.default_rng(seed)
    area = np.exp(rng.uniform(np.log(40**2), np.log(300**2), count))
    ratio = np.exp(rng.normal(0, 0.5, count))
    return np.round(np.sqrt(area / ratio)).astype(int), np.round(np.sqrt(area * ratio)).astype(int)


SHAPES = bucket_shapes(96, BucketConfig(step=16, max_aspect=3.0))


@pytest.mark.parametrize("limit", [0.0, 1.2])
def test_pictures_go_to_the_nearest_that_does_not_enlarge_too_much(limit):
    heights, widths = some_sizes(300)
    heights[7] = 0  # could not be read
    found = assign(heights, widths, SHAPES, batch_size=1, max_upscale=limit)
    where = {n: s for s, numbers in zip(found.shapes, found.members, strict=True) for n in numbers}
    refused = collections.Counter()
    for number, (h, w) in enumerate(zip(heights, widths, strict=True)):
        if number == 7:
            refused["unreadable"] += 1
            continue
        fits = [s for s in SHAPES if not limit or max(s[0] / h, s[1] / w) <= limit]
        if not fits:
            refused["would be enlarged too much"] += 1
            assert number not in where
            continue
        distance = {s: abs(np.log(w / h) - np.log(s[1] / s[0])) for s in fits}
        assert distance[where[number]] == pytest.approx(min(distance.values()), abs=1e-9)
    assert found.refused == refused and found.images == len(where)
    assert (limit > 0) == ("would be enlarged too much" in refused)


def test_buckets_without_a_batch_close_and_lose_nothing():
    heights, widths = some_sizes(200)
    found = assign(heights, widths, SHAPES, batch_size=32)
    assert all(len(members) >= 32 for members in found.members) and len(found.shapes) > 1
    assert set(found.closed) | set(found.shapes) <= set(SHAPES) and found.closed
    assert not set(found.closed) & set(found.shapes)
    assert sorted(np.concatenate(found.members)) == list(range(200)) and not found.refused
    aspects = np.log(np.array([w / h for h, w in found.shapes]))
    for i, members in enumerate(found.members):  # each is at the nearest of those left
        own = np.log(widths[members] / heights[members])
        nearest = np.abs(own[:, None] - aspects).min(1)
        np.testing.assert_allclose(np.abs(own - aspects[i]), nearest, atol=1e-9)


def test_fewer_pictures_than_a_batch_share_one_bucket():
    found = assign(*some_sizes(20), SHAPES, batch_size=64)
    assert len(found.shapes) == 1 and found.images == 20


def test_cropped_share_by_hand():
    """100 x 300 onto 1:2 keeps 2/3; 100 x 200 keeps all."""
    found = assign(np.array([100, 100]), np.array([300, 200]), [(64, 128)], batch_size=1)
    assert found.cropped == pytest.approx((1 / 3 + 0) / 2)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count, batch_size", [(300, 8), (37, 8), (240, 1), (11, 16)])
def test_every_picture_once_before_any_comes_again(count, batch_size, shuffle):
    buckets = assign(*some_sizes(count), SHAPES, batch_size=batch_size)
    epochs = Bucketed(buckets, batch_size, (3, 0) if shuffle else None)
    of = {n: i for i, numbers in enumerate(buckets.members) for n in numbers}
    seen = collections.Counter()
    orders = []
    for epoch in range(3):
        first, end = sum(epochs.batches_before(epoch)), sum(epochs.batches_before(epoch + 1))
        order = []
        for batch in range(first, end):
            places = [epochs.locate(batch * batch_size + row) for row in range(batch_size)]
            (shape,) = {shape for _, shape in places}
            assert {buckets.shapes[of[number]] for number, _ in places} == {shape}
            order += [number for number, _ in places]
            for number, _ in places:
                seen[number] += 1
                mates = buckets.members[of[number]]
                assert seen[number] <= 1 + min(seen[mate] for mate in mates) + (
                    len(mates) < batch_size)  # fmt: skip
        # Of each bucket at most what does not fill a batch has not yet been used.
        for members in buckets.members:
            missing = sum(seen[number] < epoch + 1 for number in members)
            assert missing == (epoch + 1) * len(members) % batch_size or len(members) < batch_size
        orders.append(order)
    if shuffle and count > 100:
        assert orders[0] != orders[1] and sorted(orders[0]) != orders[0]


def test_whole_batches_make_whole_epochs():
    heights = np.repeat([100, 100, 200], [48, 16, 32])
    widths = np.repeat([100, 200, 100], [48, 16, 32])
    epochs = Bucketed(assign(heights, widths, SHAPES, batch_size=16), 16, (0, 0))
    shapes = []
    for epoch in range(4):
        places = [epochs.locate(place) for place in range(96 * epoch, 96 * (epoch + 1))]
        assert sorted(number for number, _ in places) == list(range(96))
        shapes.append([shape for _, shape in places[::16]])
    assert len({tuple(order) for order in shapes}) > 1  # batches of an epoch are shuffled


@pytest.mark.parametrize(
    "fields", [{"step": -1}, {"max_aspect": 0.5}, {"max_upscale": -1.0}]
)  # fmt: skip
def test_wrong_fields_are_named(fields):
    with pytest.raises(UserError, match=f"data.buckets.{next(iter(fields))}"):
        BucketConfig(**fields)
