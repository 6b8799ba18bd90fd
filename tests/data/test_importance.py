"""Examples that are drawn by weights: how often they come, and the loss that stays the same."""

import collections
import json
import re

import numpy as np
import pytest

from sdjax.data.buckets import Buckets
from sdjax.data.config import DataConfig, DataError, is_weighted
from sdjax.data.importance import table
from sdjax.data.importance.config import ImportanceConfig
from sdjax.data.importance.order import Shares
from sdjax.data.mixture import Part
from sdjax.data.pipeline import make_iterator
from sdjax.data.stream import Bucketed, Squares, Stream, _corrections
from sdjax.errors import UserError


class Numbers:
    """A tokenizer stand-in."""

    def encode(self, texts):
        return np.zeros((len(texts), 1), np.int32)


class FakeSource:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def example(self, index):
        return {"index": index}


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.mark.parametrize("cap", [1.0, 2.0, 3.0])
def test_capped_weights_have_mean_one_and_keep_to_the_cap(cap):
    ratios = np.random.default_rng(0).lognormal(0, 1.5, 500)
    values = table.capped(ratios, cap)
    assert values.mean() == pytest.approx(1) and values.max() <= cap + 1e-9
    assert values.min() >= 1 / cap - 1e-9
    inside = (values < cap - 1e-6) & (values > 1 / cap + 1e-6)
    if inside.any():  # proportional where no bound holds
        np.testing.assert_allclose(np.ptp(values[inside] / ratios[inside]), 0, atol=1e-6)
    np.testing.assert_allclose(table.capped(np.full(7, 0.3), cap), 1)


def test_places_of_an_epoch_are_shared_out_by_the_weights():
    weights = table.capped(np.random.default_rng(1).lognormal(0, 1, 40), 3.0)
    shares, total = Shares(weights, 40), np.zeros(40)
    offsets = (np.arange(400) + 0.5) / 400
    for offset in offsets:
        counts = np.bincount([shares.at(place, offset) for place in range(40)], minlength=40)
        assert counts.sum() == 40
        assert (counts >= np.floor(weights - 1e-9)).all() and (counts <= np.ceil(weights)).all()
        total += counts
    np.testing.assert_allclose(total / len(offsets), weights, atol=1 / 400 + 1e-9)


def test_even_weights_change_nothing():
    plain, even = (Squares(30, 8, (3, 0), s) for s in (None, Shares(np.ones(30), 30)))
    assert [plain.locate(i) for i in range(90)] == [even.locate(i) for i in range(90)]
    members = [np.arange(0, 20), np.arange(20, 30)]
    buckets = Buckets([(8, 8), (8, 16)], members, {}, {}, 0.0)
    one, two = Bucketed(buckets, 4, (3, 0)), Bucketed(buckets, 4, (3, 0), np.ones(30))
    assert [one.locate(i) for i in range(90)] == [two.locate(i) for i in range(90)]


def test_the_expected_gradient_is_the_plain_one():
    """For losses (w - x_i)^2 per example, over all offsets: analytic, without a random number."""
    x = np.random.default_rng(2).normal(size=25)
    weights = table.capped(np.exp(x), 3.0)
    shares = Shares(weights, 25)
    correction = 1 / shares.expected
    gradient = lambda index: 2 * (0.3 - x[index])  # noqa: E731
    drawn = []
    for offset in (np.arange(2000) + 0.5) / 2000:
        for place in range(25):
            index = shares.at(place, offset)
            drawn.append(correction[index] * gradient(index))
    assert np.mean(drawn) == pytest.approx(np.mean(gradient(np.arange(25))), rel=1e-3)
    biased = np.mean(weights * gradient(np.arange(25)))
    assert abs(biased - np.mean(gradient(np.arange(25)))) > 0.1  # what the correction undoes


def test_buckets_keep_the_weights_and_the_mean():
    members = [np.arange(0, 40), np.arange(40, 60)]
    buckets = Buckets([(8, 8), (8, 16)], members, {}, {}, 0.0)
    weights = table.capped(np.random.default_rng(3).lognormal(0, 1, 60), 3.0)
    order = Bucketed(buckets, 5, (7, 0), weights)
    factors = _corrections(order, 60)
    places = [order.locate(i)[0] for i in range(60 * 300)]
    counts = np.bincount(places, minlength=60) / 300
    np.testing.assert_allclose(counts, weights, rtol=0.12, atol=0.08)
    np.testing.assert_allclose(np.mean(factors[places]), 1, rtol=0.02)
    assert np.sum(factors[places] * (np.array(places) < 40)) / len(places) == pytest.approx(
        40 / 60, rel=0.02
    )


def test_a_stream_weighs_losses_only_where_it_is_unbiased():
    weights = np.array([0.5, 1.5, 1.0])
    order = Squares(3, 8, (1, 0), Shares(weights, 3))
    stream = Stream(
        [FakeSource(3)], (Part(loss_weight=2.0),), [order], batch_size=1, whole_batches=False,
        corrections=[(1 / weights).astype(np.float32)],
    )  # fmt: skip
    for place in range(9):
        example = stream[place]
        assert example["weight"] == pytest.approx(2 / weights[example["index"]])
    biased = Stream([FakeSource(3)], (Part(),), [order], batch_size=1, whole_batches=False)
    assert all("weight" not in biased[place] for place in range(9))


def test_losses_become_ratios_to_the_mean_at_their_timestep(tmp_path):
    rows = [
        {"key": "a", "score": 2, "loss": 5, "loss_at": {"t0100": 1.0, "t0900": 9.0}},
        {"key": "b", "score": 0, "loss": 2, "loss_at": {"t0100": 3.0, "t0900": 1.0}},
    ]
    found = table.read(lines(tmp_path / "example_loss.jsonl", rows))
    assert found == {0: pytest.approx({"a": (0.5 + 1.8) / 2, "b": (1.5 + 0.2) / 2})}
    for row in rows:
        row["loss_at"] = {}
    assert table.read(lines(tmp_path / "vae.jsonl", rows)) == {
        0: pytest.approx({"a": 10 / 7, "b": 4 / 7})
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no lines"),
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1: expected an object with a 'key'"),
        ('{"key": "a", "weight": 0}', "line 1: the weight is 0.0; expected a number above 0"),
        ('{"key": "a", "weight": 1}\n{"key": "b"}', "line 2: 'weight' is None; expected a number"),
        ('{"key": "a", "loss_at": {"t1": 1}}\n{"key": "b"}', "line 2: 't1' is None"),
        ('{"key": "a", "weight": 1, "part": -1}', "line 1: expected an object"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text, words, tmp_path):
    (tmp_path / "w.jsonl").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        table.read(str(tmp_path / "w.jsonl"))


def test_batches_of_a_dataset_come_by_its_weights(shapes_dir, tmp_path):
    rows = [{"key": str(i), "weight": 9.0 if i < 8 else 1.0} for i in range(40)]
    file = lines(tmp_path / "weights.jsonl", rows)
    config = DataConfig(
        data_dir=str(shapes_dir), shapes_train=40, shapes_test=8, resolution=16, batch_size=40,
        threads=1, prefetch=0, importance=ImportanceConfig(file, cap=3.0),
    )  # fmt: skip
    assert is_weighted(config)
    data = make_iterator(config, {"tokens": Numbers()}, split="train", seed=1)
    assert any("which has 40 of 40 examples: 0.50 to 3.00" in line for line in data.summary.lines)
    seen, sums = collections.Counter(), 0.0
    for _ in range(10):
        weights = next(data)["weight"]
        seen.update(round(float(weight), 3) for weight in weights)
        sums += weights.sum()
    assert set(seen) == {0.333, 2.0}
    assert seen[0.333] == 240  # 8 examples, three times in each of 10 epochs
    assert sums == pytest.approx(400, rel=0.02)
    state = data.get_state()
    data.close()
    assert state["importance"][1] is True
    lines(tmp_path / "weights.jsonl", [{**row, "weight": 1 + i} for i, row in enumerate(rows)])
    other = make_iterator(config, {"tokens": Numbers()}, split="train", seed=1)
    with pytest.raises(DataError, match="importance"):
        other.set_state(state)
    test = make_iterator(config, {"tokens": Numbers()}, split="test", seed=1)
    assert "importance" not in test.get_state()


def test_a_file_about_other_examples_is_refused(shapes_dir, tmp_path):
    config = DataConfig(
        data_dir=str(shapes_dir), shapes_train=40, shapes_test=8, resolution=16, batch_size=4,
        importance=ImportanceConfig(lines(tmp_path / "w", [{"key": "a.jpg", "weight": 1}])),
    )  # fmt: skip
    with pytest.raises(UserError, match="has none of the 40 examples of .*'a.jpg'"):
        make_iterator(config, {"tokens": Numbers()}, split="train", seed=1)
    lines(tmp_path / "w", [{"key": "1", "weight": 1, "part": 2}])
    with pytest.raises(DataError, match="examples of part 2, and data.mixture has 1 parts"):
        make_iterator(config, {"tokens": Numbers()}, split="train", seed=1)
    with pytest.raises(UserError, match="data.importance.cap is 0.5; expected 1 or more"):
        ImportanceConfig(cap=0.5)
