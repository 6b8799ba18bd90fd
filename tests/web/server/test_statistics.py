"""Times of pictures, and drift of what is asked and drawn against the training data."""

import numpy as np
import pytest

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.diffusion.grids import SamplerConfig
from sdjax.train.monitoring.data_profile import PROMPT_TOKENS, distribution
from sdjax.web.server import statistics
from sdjax.web.server.engine import Engine, Job
from sdjax.web.server.requests import PictureRequest
from sdjax.web.server.statistics import FEWEST, Histogram, Statistics

SHORT, LONG = "a red circle", "a green star and a small red circle and a blue square"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([SHORT, LONG] * 4, 560, context_length=24)


def job(prompt):
    request = PictureRequest(prompt, "", 0, 8, 8, SamplerConfig(steps=2), 3.0)
    return Job(request, 2)


def picture(level):
    return np.clip(RNG.normal(level, 10, (8, 8, 3)), 0, 255).astype(np.uint8)


def made(tokenizer):
    levels = RNG.uniform(60, 200, 2000)
    profile = {
        PROMPT_TOKENS: distribution([3.0, 4.0] * 200),
        "brightness": distribution(levels / 255),
    }
    return Statistics(tokenizer, profile)


def test_histogram_is_as_numpy_counts():
    own, values = Histogram((1.0, 2.0, 5.0)), [0.5, 1.0, 1.5, 2.0, 7.0]
    for value in values:
        own.add(value)
    below = [sum(value <= bound for value in values) for bound in (1, 2, 5, np.inf)]
    assert own.buckets() == list(zip(("1", "2", "5", "+Inf"), below, strict=True))
    assert own.total == sum(values)


def test_pictures_like_the_training_data_do_not_drift_and_others_do(tokenizer):
    alike, other = made(tokenizer), made(tokenizer)
    for i in range(500):
        prompt = "red red red" if i % 2 else "red red red red"
        alike.observe(job(prompt), picture(RNG.uniform(60, 200)))
        other.observe(job(LONG), picture(240))
    drift = dict(alike.drift())
    assert set(drift) == {PROMPT_TOKENS, "brightness"} and max(drift.values()) < 0.1
    assert min(dict(other.drift()).values()) > 1


def test_drift_needs_pictures_and_a_profile(tokenizer):
    few = made(tokenizer)
    for _ in range(FEWEST - 1):
        few.observe(job(SHORT), picture(100))
    assert dict(few.drift()) == {}
    few.observe(job(SHORT), picture(100))
    assert set(dict(few.drift())) == {PROMPT_TOKENS, "brightness"}
    none = Statistics(tokenizer)
    for _ in range(FEWEST):
        none.observe(job(SHORT), picture(100))
    assert dict(none.drift()) == {}


def test_prompts_that_are_cut_are_not_counted_twice(tokenizer):
    own, before = Statistics(tokenizer), tokenizer.truncated
    own.observe(job("red " * 100), picture(100))
    assert tokenizer.truncated == before


def test_engine_hands_over_what_it_drew_and_survives_a_mistake():
    class Drawer:
        batch_size = 2

        def evaluations(self, request):
            return 1

        def draw(self, requests, watch):
            return np.zeros((len(requests), 4, 4, 3), np.uint8)

    own, seen = Statistics(), []

    def observe(job, picture):
        own.observe(job, picture)
        seen.append(picture.shape)
        raise ZeroDivisionError

    engine = Engine(Drawer(), queue=9, observe=observe)
    for drawn in engine.submit([job(SHORT).request] * 5):
        assert drawn.done.result(30).shape == (4, 4, 3)
    assert engine.close(30) and seen == [(4, 4, 3)] * 5
    assert own.latency.buckets()[-1] == ("+Inf", 5) == own.queued.buckets()[-1]
    assert own.latency.total >= own.queued.total
    assert own.measures["brightness"].buckets()[0][1] == 5
    assert statistics.MEASURES[0] == PROMPT_TOKENS and own.measures[PROMPT_TOKENS].total == 0
