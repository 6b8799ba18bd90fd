"""Prompts and noise that are a little different, and what is measured of pictures drawn again."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax.data.config import DataConfig
from sdjax.data.pictures import Folder, open_split
from sdjax.evaluation import robustness
from sdjax.evaluation.reference import PixelTower
from sdjax.evaluation.robustness import PERTURBATIONS, misspelt, shuffled
from sdjax.sampling.drawing import Artist, Prompts
from sdjax.sampling.generate import initial_latents

PROMPTS = ("a large red circle on the left", "a blue square", "two green stars, above", "cat", "")


def test_misspelt_words_have_their_letters_and_their_ends():
    for text in PROMPTS[:3]:
        words, typos = text.split(), misspelt(text).split()
        changed = [(a, b) for a, b in zip(words, typos, strict=True) if a != b]
        assert changed and len(changed) <= (sum(len(word) > 3 for word in words) + 1) // 2
        for a, b in changed:
            assert sorted(a) == sorted(b) and a[0] == b[0] and a[-1] == b[-1]
            assert sum(x != y for x, y in zip(a, b, strict=True)) == 2
        assert misspelt(text) == misspelt(text)
    assert [misspelt(text) for text in ("cat", "", "a  b", "oooo")] == ["cat", "", "a  b", "oooo"]


def test_shuffled_words_are_the_same_in_another_order():
    for text in PROMPTS[:3]:
        assert sorted(shuffled(text).split()) == sorted(text.split()) and shuffled(text) != text
        assert shuffled(text) == shuffled(text)
    assert [shuffled(text) for text in ("cat", "", "cat cat")] == ["cat", "", "cat cat"]


def test_changed_prompts_keep_their_numbers():
    prompts = Prompts(PROMPTS, per_prompt=2)
    loud = PERTURBATIONS["upper_case"].prompts(prompts)
    assert [loud.text(i) for i in range(12)] == [prompts.text(i).upper() for i in range(12)]
    assert set(PERTURBATIONS["empty"].prompts(prompts).texts) == {""}
    assert PERTURBATIONS["noise_0.1"].prompts(prompts) == prompts


@pytest.mark.parametrize("turn", [0.1, 0.3, np.pi / 2])
def test_turned_noise_is_normal_and_as_far_as_said(turn):
    artist = types.SimpleNamespace(turn=turn, shape=(16, 16, 4))
    numbers = np.arange(20, dtype=np.int32)
    own = np.asarray(initial_latents(5, jnp.asarray(numbers), artist.shape))
    found = Artist._turned(artist, numbers, 5)
    assert found.shape == own.shape and found.dtype == np.float32
    rows, turned = own.reshape(20, -1), found.reshape(20, -1)
    cosine = (rows * turned).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(turned, axis=1)
    # A cosine of two independent normals of 1,024 numbers has a deviation of 1 / 32.
    np.testing.assert_allclose(cosine, np.cos(turn), atol=4 / 32)
    assert abs(cosine.mean() - np.cos(turn)) < 4 / 32 / np.sqrt(20)
    assert abs(found.mean()) < 0.03 and abs(found.std() - 1) < 0.03
    np.testing.assert_array_equal(Artist._turned(artist, numbers[7:9], 5), found[7:9])


@pytest.fixture(scope="module")
def folders(shapes_dir, tmp_path_factory):
    """The test pictures of captioned_shapes as they are, darker, and one place further."""
    data = DataConfig(data_dir=str(shapes_dir), resolution=64, shapes_train=40, shapes_test=8)
    split = open_split(data, "test", size=(64, 64))
    images = split.read(0, 8)
    made = {}
    for name, pictures in (
        ("same", images), ("darker", (images * 0.8).round().astype(np.uint8)),
        ("moved", np.roll(images, 1, axis=0)),
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        files = [folder / f"{i}.png" for i in range(8)]
        for file, image in zip(files, pictures, strict=True):
            Image.fromarray(image).save(file)
        made[name] = Folder(name, tuple(files), (), (64, 64)), pictures
    return split.captions, made


def test_what_is_measured_of_pictures_drawn_again(folders):
    captions, made = folders
    tower = PixelTower()

    def draw(name, perturbation):
        kind = {"empty": "moved", "misspelt": "darker"}.get(name, "same")
        return made[kind][0]

    found = robustness.find(
        made["same"][0], captions, draw, tower=tower, clip=None, resamples=50, seed=0
    )
    assert found.keys() == PERTURBATIONS.keys()
    for what in ("mse", "features", "fidelity"):
        assert found["shuffled"][what].value == pytest.approx(0, abs=1e-12)
    images, moved = made["same"][1] / 255, made["moved"][1] / 255
    assert found["empty"]["mse"].value == pytest.approx(np.mean((images - moved) ** 2))
    features = [tower(made[kind][1]) for kind in ("same", "moved")]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features]
    want = 1 - np.mean((unit[0] * unit[1]).sum(1))
    assert found["empty"]["features"].value == pytest.approx(want, rel=1e-5)
    assert found["empty"]["fidelity"].value == -1  # no picture shows its neighbour's caption
    assert found["misspelt"]["mse"].value > 0
    for measures in found.values():
        for one in measures.values():
            assert one.low <= one.value <= one.high and one.count == 8
    told = robustness.to_json(found, tower)["changes"]
    assert told["empty"]["fidelity"]["value"] == -1
    assert robustness.metrics(found)["robustness_empty"] == found["empty"]["features"]
    assert robustness.table(found).row_count == len(PERTURBATIONS)
