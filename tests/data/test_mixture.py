"""Mixtures: exact proportions, phases, and a closed form that agrees with counting along."""

import math

import pytest

from sdjax.data import mixture
from sdjax.data.config import DataConfig, parts
from sdjax.data.mixture import Part, PartOrder, counts, interleave
from sdjax.errors import UserError


@pytest.mark.parametrize(
    "weights", [(1,), (3, 1), (1, 1, 1), (5, 2, 7, 1), (1, 1000), (2, 3, 4, 5, 6)]
)
def test_each_period_holds_each_part_exactly_its_weight_times(weights):
    total, seen = sum(weights), [0] * len(weights)
    for place in range(3 * total):
        which, before = interleave(weights, place)
        assert before == seen[which]  # the closed form agrees with counting along
        seen[which] += 1
        assert counts(weights, place + 1) == seen
        depth = math.ceil(math.log2(len(weights))) if len(weights) > 1 else 0
        for weight, had in zip(weights, seen, strict=True):
            assert abs(had - (place + 1) * weight / total) <= max(depth, 0.5)
        if (place + 1) % total == 0:
            assert seen == [weight * (place + 1) // total for weight in weights]


def test_weights_are_taken_as_they_are_written():
    schedule = PartOrder((Part(weight=0.1), Part(weight=0.7), Part(weight=0.2)), per_step=1)
    which = [schedule.locate(place)[0] for place in range(10)]
    assert [which.count(part) for part in range(3)] == [1, 7, 2]


def test_parts_come_and_go_and_continue_where_they_stood():
    described = (Part(end=4), Part(weight=3.0, start=2), Part(start=3, end=9))
    schedule, per_step, seen = PartOrder(described, per_step=6), 6, [0, 0, 0]
    for step in range(30):
        here = []
        for place in range(step * per_step, (step + 1) * per_step):
            part, before = schedule.locate(place)
            assert before == seen[part]
            seen[part] += 1
            here.append(part)
        active = {i for i, p in enumerate(described) if p.start <= step < (p.end or math.inf)}
        assert set(here) <= active
        if step == 0:
            assert here == [0] * 6
        if step >= 9:
            assert here == [1] * 6
    # Steps 3 (weights 1, 3, 1), 4 to 8 (3, 1): ten of the third part in 36 places, +-1 a phase.
    assert abs(seen[2] - (6 / 5 + 5 * 6 / 4)) <= 2


def test_any_order_of_asking_gives_the_same():
    schedule = PartOrder((Part(end=5), Part(start=1), Part(weight=2.5)), per_step=4)
    forward = [schedule.locate(place) for place in range(60)]
    assert [schedule.locate(place) for place in reversed(range(60))] == forward[::-1]


@pytest.mark.parametrize(
    "described, message",
    [
        ((Part(start=3),), "no part at step 0"),
        ((Part(end=10), Part(start=20)), "no part at step 10"),
        ((Part(end=10), Part(end=7)), "no part at step 10"),
    ],
)
def test_a_step_without_data_is_named(described, message):
    with pytest.raises(UserError, match=message):
        mixture.check(described)
    with pytest.raises(UserError, match=message):
        DataConfig(mixture=described)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": 0.0}, {"weight": math.inf}, {"start": -1}, {"start": 5, "end": 5},
        {"loss_weight": -1.0}, {"loss_weight": math.inf},
    ],
)  # fmt: skip
def test_wrong_fields_are_named(fields):
    with pytest.raises(UserError, match=list(fields)[-1] if "end" in fields else list(fields)[0]):
        Part(**fields)


def test_a_part_is_checked_as_a_source_is():
    with pytest.raises(UserError, match="data.path is empty; data.name = 'webdataset'"):
        DataConfig(mixture=(Part(), Part(name="webdataset")))


def test_what_a_part_leaves_open_is_the_datas():
    config = DataConfig(
        name="mnist", data_dir="here", resolution=32, batch_size=7,
        mixture=(Part(), Part(name="cifar10", text_key="label", resolution=16)),
    )  # fmt: skip
    found = [(c.name, c.data_dir, c.text_key, c.resolution, c.batch_size) for c in parts(config)]
    assert found == [("mnist", "here", "text", 32, 7), ("cifar10", "here", "label", 16, 7)]
    assert all(c.mixture == () for c in parts(config))
    assert parts(DataConfig()) == [DataConfig()]
