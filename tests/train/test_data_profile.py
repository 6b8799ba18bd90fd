"""The profile of training data, and the index of how far from it something else is."""

import colorsys
import json

import numpy as np
import pytest
from scipy import stats

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.system import paths
from sdjax.train.monitoring import data_profile
from sdjax.train.monitoring.data_profile import (
    EXAMPLES,
    FILE,
    DataProfiler,
    distribution,
    picture_measures,
    prompt_lengths,
    read_profile,
)

WORDS = ["a red circle", "a blue square", "a green star and a small red circle"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(WORDS * 4, 560, context_length=16)


def test_measures_of_pictures_are_those_of_the_standard_library():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(3, 8, 6, 3)).astype(np.float32)
    found = picture_measures(images)
    hsv = [[colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.reshape(-1, 3)] for image in images]
    luma = [[colorsys.rgb_to_yiq(*pixel)[0] for pixel in image.reshape(-1, 3)] for image in images]
    np.testing.assert_allclose(found["saturation"], np.mean(hsv, 1), rtol=1e-5)
    np.testing.assert_allclose(found["brightness"], np.mean(luma, 1), rtol=0.01)  # .30 .59 .11
    np.testing.assert_allclose(found["contrast"], np.std(luma, 1), rtol=0.02)
    black = picture_measures(np.zeros((1, 4, 4, 3)))
    assert all(values[0] == 0 for values in black.values())


def test_large_pictures_are_measured_at_some_pixels():
    image = np.tile(np.linspace(0, 1, 512)[:, None, None], (1, 300, 3))[None]
    found = picture_measures(image)
    assert abs(found["brightness"][0] - 0.5) < 0.01
    assert abs(found["contrast"][0] - 1 / np.sqrt(12)) < 0.01


def test_lengths_of_prompts_are_without_marks(tokenizer):
    tokens = tokenizer.encode(["", "red", "red " * 40])
    assert prompt_lengths(tokens, tokenizer).tolist() == [0, 1, 14]


def test_psi_is_the_symmetric_divergence_of_the_shares():
    rng = np.random.default_rng(0)
    own = distribution(rng.normal(size=20_000))
    np.testing.assert_allclose(own.shares, 0.1, atol=1e-3)
    other = rng.normal(0.5, size=20_000)
    index = own.psi(other)
    edges = np.concatenate([[-np.inf], own.edges, [np.inf]])
    a, e = np.diff(stats.norm.cdf(edges, 0.5)), np.diff(stats.norm.cdf(edges))
    assert abs(index - (stats.entropy(a, e) + stats.entropy(e, a))) < 0.02
    assert own.psi(rng.normal(size=500)) < 0.1 < 0.2 < index
    assert np.isfinite(own.psi([1e9] * 10)) and own.psi([1e9] * 10) > 1


def test_values_that_are_few_and_whole_make_fewer_bins():
    own = distribution([3.0] * 50 + [4.0] * 50)
    assert own.edges == (3.0, 4.0) and own.shares == (0.5, 0.5, 0.0)
    assert own.psi([3.0, 4.0]) == pytest.approx(0, abs=0.01)
    assert distribution([2.0]).psi([2.0]) == pytest.approx(0, abs=0.01)


def batch(tokenizer, count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": tokenizer.encode([WORDS[i % 3] for i in range(count)]),
        "image": rng.uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32),
    }


def test_first_examples_are_measured_once(tokenizer, tmp_path):
    folder = paths.to_path(tmp_path)
    profiler = DataProfiler(folder, {"tokens": tokenizer})
    for i in range(3):
        profiler.observe(batch(tokenizer, EXAMPLES // 2, i))
    text = (tmp_path / FILE).read_text()
    assert json.loads(text)["examples"] == EXAMPLES
    found = read_profile(folder)
    assert set(found) == set(data_profile.MEASURES)
    assert found["brightness"].mean == pytest.approx(0.5, abs=0.02)
    again = DataProfiler(folder, {"tokens": tokenizer})
    again.observe(batch(tokenizer, EXAMPLES))
    again.close()
    assert (tmp_path / FILE).read_text() == text


def test_latents_and_missing_tokens_are_left_out(tokenizer, tmp_path):
    profiler = DataProfiler(paths.to_path(tmp_path), {"tokens": tokenizer})
    profiler.observe({"image": np.zeros((100, 4, 4, 8), np.float32)})
    profiler.close()
    assert not (tmp_path / FILE).exists()
    profiler = DataProfiler(paths.to_path(tmp_path), {})
    profiler.observe({"image": np.full((100, 4, 4, 3), np.nan, np.float32)})
    profiler.observe({"image": np.zeros((70, 4, 4, 3), np.float32)})
    profiler.close()
    assert set(read_profile(paths.to_path(tmp_path))) == {"brightness", "contrast", "saturation"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"measures": 3}', '{"measures": {"brightness": {"mean": "x"}}}',
     '{"measures": {"brightness": {"mean": 1, "edges": [1, 2], "shares": [1]}}}',
     '{"measures": {"brightness": {"mean": NaN, "edges": [], "shares": [1]}}}',
     "[" * 100_000, '{"measures": {}, "more": "%s"}' % ("x" * (9 << 20))],
    ids=range(9),
)  # fmt: skip
def test_profile_that_is_none_is_no_profile(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert read_profile(paths.to_path(tmp_path)) == {}
