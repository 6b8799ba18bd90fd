"""Batches at random access give the examples and the randomness that Grain's own layers gave."""

import grain.python as grain
import numpy as np
import pytest

from sdjax.data.batches import Batches, ShuffledEpochs, as_floats, grain_seed


class Numbers:
    """A source of ten examples, by itself and as Grain reads it."""

    def __len__(self):
        return 10

    def example(self, index):
        return {"number": index}

    __getitem__ = example


class Endless:
    """A stream of its own order, as mixtures and buckets have one."""

    def __len__(self):
        return 2**63 - 1

    def __getitem__(self, place):
        return {"number": 3 * place}


def drawn(example, rng):
    return {
        "number": np.int32(example["number"]),
        "noise": np.append(rng.random(3), rng.integers(1000)).astype(np.float32),
    }


SEED = 5
SEEDED = grain.MapDataset.source(Numbers()).seed(SEED)
STREAMS = {
    "shuffled": (ShuffledEpochs(Numbers(), grain_seed(SEED, 1)), 3, SEEDED.shuffle().repeat()),
    "as stored": (ShuffledEpochs(Numbers(), None), 2, SEEDED.repeat()),
    "a mixture": (Endless(), 1, grain.MapDataset.source(Endless()).seed(SEED)),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_the_order_and_the_randomness_are_those_of_grain(kind):
    stream, depth, reference = STREAMS[kind]
    reference = reference.random_map(drawn).batch(4, drop_remainder=True)
    batches = Batches(stream, drawn, 4, seed=grain_seed(SEED, depth), floats=False)
    assert len(batches) == 2**63 // 4 - (1 if 2**63 % 4 == 0 else 0)
    for index in (0, 1, 2, 3, 7, 100_000):  # within an epoch, across, and far away
        expected, found = reference[index], batches[index]
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_floats_are_made_here_or_after_the_way_between_processes():
    def pictures(example, rng):
        return {
            "image": np.full((2, 2, 3), 25 * example["number"], np.uint8),
            "tokens": np.arange(3, dtype=np.int32),
        }

    stream = ShuffledEpochs(Numbers(), None)
    sent = Batches(stream, pictures, 2, seed=0, floats=False)[1]
    assert sent["image"].dtype == np.uint8
    ready = Batches(stream, pictures, 2, seed=0, floats=True)[1]
    assert ready["image"].dtype == np.float32 and ready["tokens"].dtype == np.int32
    np.testing.assert_array_equal(ready["image"], as_floats(sent)["image"])
    np.testing.assert_allclose(ready["image"][:, 0, 0, 0], [50 / 127.5 - 1, 75 / 127.5 - 1], 1e-6)
