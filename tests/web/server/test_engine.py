"""The queue and the thread of the device, with a drawer that draws nothing."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from sdjax.diffusion.grids import SamplerConfig
from sdjax.web.server.engine import BusyError, Engine, StoppedError
from sdjax.web.server.requests import PictureRequest

REQUEST = PictureRequest("a", "", 0, 8, 8, SamplerConfig(steps=5), 3.0)


class Drawer:
    """Draws pictures that hold the seed, a step at a time, each when it is let."""

    batch_size = 4

    def __init__(self):
        self.batches, self.let, self.asked = [], threading.Semaphore(0), threading.Event()

    def evaluations(self, request):
        return request.sampler.steps

    def draw(self, requests, watch):
        self.batches.append([request.seed for request in requests])
        self.asked.set()
        for i in range(requests[0].sampler.steps):
            assert self.let.acquire(timeout=30)
            if requests[0].prompt == "broken":
                raise FloatingPointError("NaN")
            if watch(i, np.full((len(requests), 1, 1, 4), i, np.float32)).all():
                break
        return np.stack([np.full((1, 1, 3), request.seed, np.uint8) for request in requests])


@pytest.fixture
def drawer():
    return Drawer()


@pytest.fixture
def engine(drawer):
    made = Engine(drawer, queue=10)
    yield made
    drawer.let.release(1000)
    assert made.close(30)


def request(seed, **changes):
    return dataclasses.replace(REQUEST, seed=seed, **changes)


def begun(engine, drawer, seed=0, **changes):
    """A job that is being drawn."""
    (job,) = engine.submit([request(seed, **changes)])
    assert drawer.asked.wait(30)
    drawer.asked.clear()
    return job


def test_those_that_are_alike_are_drawn_together_in_their_order(engine, drawer):
    first = begun(engine, drawer)
    wide = {"width": 16}
    jobs = [engine.submit([request(seed, **({} if seed % 2 else wide))])[0] for seed in range(1, 9)]
    drawer.let.release(1000)
    for seed, job in enumerate([first, *jobs]):
        assert job.done.result(30)[0, 0, 0] == seed
    assert drawer.batches == [[0], [1, 3, 5, 7], [2, 4, 6, 8]]
    assert (engine.tally.drawn, engine.tally.batches) == (9, 3)


def test_a_full_queue_takes_all_or_none(engine, drawer):
    begun(engine, drawer)
    engine.submit([request(seed) for seed in range(8)])
    with pytest.raises(BusyError, match="8 pictures are waiting; try again in") as busy:
        engine.submit([request(seed) for seed in range(3)])
    assert 1 <= busy.value.seconds <= 60
    assert len(engine.submit([request(1), request(2)])) == 2
    assert engine.tally.refused == 3


def test_what_is_being_drawn_stops_within_a_step(engine, drawer):
    job = begun(engine, drawer)
    drawer.let.release()
    while job.step < 1:
        time.sleep(0.001)
    assert engine.stop() == 1 and engine.stop() == 0
    drawer.let.release()
    job.done.result(30)
    assert job.step == 1  # what came after the stop is not shown
    assert job.estimate.max() == 0
    assert engine.tally.stopped == 1


def test_one_of_a_batch_stops_and_the_others_go_on(engine, drawer):
    first = begun(engine, drawer)
    pair = engine.submit([request(1), request(2)])
    drawer.let.release(REQUEST.sampler.steps)
    first.done.result(30)
    assert drawer.asked.wait(30)
    engine.stop([pair[0]])
    drawer.let.release(1000)
    pair[1].done.result(30)
    assert pair[1].step == REQUEST.sampler.steps and pair[0].step == 0


def test_what_waits_is_dropped(engine, drawer):
    begun(engine, drawer)
    waiting = engine.submit([request(1)])
    engine.stop(waiting)
    with pytest.raises(StoppedError):
        waiting[0].done.result(30)
    assert engine.jobs()[1] == []


def test_the_thread_outlives_a_picture_that_fails(engine, drawer):
    drawer.let.release(1000)
    (broken,) = engine.submit([request(1, prompt="broken")])
    with pytest.raises(FloatingPointError):
        broken.done.result(30)
    (fine,) = engine.submit([request(2)])
    assert fine.done.result(30)[0, 0, 0] == 2
    assert engine.tally.failed == 1


def test_closing_ends_what_is_there_and_takes_no_more(drawer):
    engine = Engine(drawer, queue=10)
    job = begun(engine, drawer)
    threading.Timer(0.2, drawer.let.release, [1000]).start()
    assert engine.close(30)
    assert job.done.done()
    with pytest.raises(BusyError):
        engine.submit([request(1)])


def test_closing_does_not_wait_for_ever(drawer):
    engine = Engine(drawer, queue=10)
    job = begun(engine, drawer)
    assert not engine.close(0.1)
    assert job.stopped
    drawer.let.release(1000)


def test_a_preview_learns_the_colours_of_a_linear_decoder():
    from sdjax.web.server.preview import Preview

    rng = np.random.default_rng(0)
    mix, shift = rng.normal(size=(4, 3)) * 20, np.array([100.0, 120, 140])
    latents = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    colours = np.clip(latents @ mix + shift, 0, 255)
    pictures = np.repeat(np.repeat(colours, 2, 1), 2, 2).round().astype(np.uint8)
    preview = Preview()
    assert preview.picture(latents[0], (8, 8)) is None
    preview.learn(latents, pictures)
    shown = preview.picture(latents[0], (8, 8))
    assert np.abs(shown.astype(float) - colours[0]).mean() < 3
    broken = np.full((8, 8, 4), np.nan, np.float32)
    assert preview.picture(broken, (16, 16)).shape == (16, 16, 3)
    preview.learn(broken[None], pictures[:1])
    np.testing.assert_array_equal(preview.picture(latents[0], (8, 8)), shown)
