"""Which examples stand out by their loss: scores, the table, the page, and captions of others."""

import dataclasses
import json
import re
import types
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy import stats

from sdjax.config import Config
from sdjax.data.config import DataConfig
from sdjax.evaluation import loading, losses
from sdjax.evaluation.losses import Example, ExampleLosses
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train.validation import Validator
from sdjax.validation_config import ValidationConfig
from sdjax.web.examples import render

COLOURS = {
    "red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "white": (240, 240, 240),
    "black": (20, 20, 20), "yellow": (230, 220, 40),
}  # fmt: skip
NASTY = '<script>alert(1)</script> & \u202e "quotes"\n'


def test_scores_are_scipys_and_do_not_depend_on_what_is_usual_at_a_timestep():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=(40, 5)).astype(np.float32)
    want = stats.zscore(values.astype(np.float64), axis=0).mean(axis=1)
    np.testing.assert_allclose(losses.scores(values), want, rtol=1e-12, atol=1e-12)
    usual = values * np.array([1, 100, 0.01, 3, 7], np.float32) + np.arange(5, dtype=np.float32)
    np.testing.assert_allclose(losses.scores(usual), want, atol=2e-5)  # float32 of the sums
    equal = np.concatenate([values, np.full((40, 1), 0.25, np.float32)], axis=1)
    np.testing.assert_allclose(losses.scores(equal), want * 5 / 6, atol=1e-12)
    np.testing.assert_array_equal(losses.scores(np.ones((1, 3), np.float32)), [0])


def made(count=6, *, captions=True, pictures=True, caption=NASTY):
    rng = np.random.default_rng(1)
    own = np.sort(rng.random((count, 2)).astype(np.float32), axis=0)[::-1]
    plain = own * rng.random((count, 1)).astype(np.float32) * 2
    gains = losses.scores(own - plain)
    examples = tuple(
        Example(
            f"{i}.png", 0, i, (8, 8), caption, float(own[i].mean()), float(score),
            float(plain[i].mean()) if captions else None, float(gains[i]) if captions else None,
        )
        for i, score in enumerate(losses.scores(own))
    )  # fmt: skip

    def read(example):
        return np.full((8, 8, 3), example.number, np.uint8)

    return ExampleLosses(
        examples, own, plain if captions else None, np.array([100.0, 900.0]), "test",
        read if pictures else None,
    )  # fmt: skip


def test_caption_gain_is_the_share_of_the_loss_that_captions_take_away():
    found = made()
    own, plain = found.losses, found.uncaptioned
    told = losses.estimates(found, resamples=200, seed=0)
    gain = told["caption_gain"]
    assert gain.value == pytest.approx(1 - own.mean() / plain.mean(), rel=1e-6)
    assert gain.low <= gain.value <= gain.high
    assert told["example_loss"].value == pytest.approx(own.mean(), rel=1e-6)
    assert losses.estimates(made(captions=False), resamples=0, seed=0).keys() == {"example_loss"}


def test_the_page_is_whole_and_shows_captions_as_text():
    page = render(made(), "a model <b>")
    assert "<script" not in page and "&lt;script&gt;" in page and "a model &lt;b&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "default-src &#39;none&#39;" in page
    assert page.count("<img ") == 9  # three of each section, of six examples
    bare = render(made(captions=False, pictures=False), "a model")
    assert "<img " not in bare and "Captions that help least" not in bare
    assert "(no caption)" in render(made(caption=""), "a model")


def folder_of(folder, captions):
    """Pictures in the colours of the keys, and other captions for them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i, (colour, caption) in enumerate(captions):
        noise = rng.integers(-12, 13, (16, 16, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"a {caption} wall"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


class Words:
    """A tokenizer of whole words; 0 is none."""

    known = ("a", "wall", *COLOURS)

    def encode(self, texts):
        rows = [[1 + self.known.index(word) for word in text.split()] for text in texts]
        return np.array([row + [0] * (4 - len(row)) for row in rows], np.int32)


class Guess:
    """A denoiser of mean colours: a guess by the caption's words, and the noisy colour, mixed."""

    numbers: ClassVar = {}
    maxima = None

    def timesteps(self, count):
        return np.float32(1000 * (np.arange(count) + 0.5) / count)

    def init(self, count):
        return {"table": jnp.zeros((1 + len(Words.known), 3)), "mix": jnp.zeros(count)}

    def validate(self, params, batch, keys, timesteps):
        x0 = batch["image"].mean((1, 2))  # [b, 3]
        guess = params["table"][batch["tokens"]].sum(1)

        def at(number):
            sigma = timesteps[number] / 1000
            eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), (3,)))
            xt = (1 - sigma) * x0 + sigma * eps(keys)
            mix = jax.nn.sigmoid(params["mix"][number])
            return jnp.mean((mix * guess + (1 - mix) * xt - x0) ** 2, axis=1)

        return jnp.stack([at(i) for i in range(len(timesteps))], axis=1)


def trained(validator, method):
    """Parameters after some steps on all examples of a validator, with captions and without."""
    with ThreadPoolExecutor(1) as executor:
        batches = [validator.examples.read(group, executor) for group in validator.examples.groups]
    batch = {name: np.concatenate([one[name] for one in batches]) for name in batches[0]}
    empty = batch | {"tokens": np.zeros_like(batch["tokens"])}
    keys = jax.random.split(jax.random.key(7), len(batch["image"]))
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, state):
        def loss(params):
            both = [method.validate(params, b, keys, method.timesteps(4)) for b in (batch, empty)]
            return 0.9 * both[0].mean() + 0.1 * both[1].mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = method.init(4)
    state = optimizer.init(params)
    for _ in range(200):
        params, state = step(params, state)
    return params


def test_swapped_captions_stand_out_for_a_model_that_learnt_the_right_ones(tmp_path, monkeypatch):
    method, mesh = Guess(), make_mesh(MeshConfig())
    found = types.SimpleNamespace(tokenizers={"tokens": Words()})
    colours = [*COLOURS] * 6
    swapped = {1: 3, 3: 1, 8: 4, 4: 8, 17: 12, 12: 17}
    captions = [colours[swapped.get(i, i)] for i in range(len(colours))]
    assert all(colours[i] != captions[i] for i in swapped)

    def config_of(name, texts):
        folder = folder_of(tmp_path / name, zip(colours, texts, strict=True))
        data = DataConfig(
            name="image_text_folder", path=str(folder), data_dir=str(tmp_path / "tfds"),
            resolution=16, threads=1,
        )  # fmt: skip
        validation = ValidationConfig(strata=4, rows=8)
        return dataclasses.replace(Config(), data=data, validation=validation)

    def make_validator(config, found, mesh, *, split, count, tokenizers=None):
        words = tokenizers or found.tokenizers
        return Validator(config, method, words, mesh, split=split, count=count)

    monkeypatch.setattr(loading, "make_validator", make_validator)
    right = make_validator(config_of("right", colours), found, mesh, split="train", count=100)
    params = trained(right, method)
    find = loading.make_example_losses(
        config_of("swapped", captions), found, mesh, split="train", count=100
    )
    told = find(params)
    keys = {one.key for one in told.examples}
    assert len(keys) == len(told.examples) >= len(colours) - 2  # a few are the split "test"
    wrong = {f"{i:03d}.png" for i in swapped} & keys
    assert len(wrong) >= 5
    assert {one.key for one in told.examples[: len(wrong)]} == wrong
    assert {one.key for one in told.by_caption[: len(wrong)]} == wrong
    for row, one in enumerate(told.examples):  # each fact is of its own example
        number = int(one.key[:3])
        assert one.caption == f"a {captions[number]} wall" and one.shape == (16, 16)
        assert one.loss == pytest.approx(told.losses[row].mean())
        distance = np.abs(told.read(one).mean((0, 1)) - COLOURS[colours[number]])
        assert distance.max() < 12
    again = find(params)
    assert again.examples == told.examples
    np.testing.assert_array_equal(again.losses, told.losses)
    embedded = config_of("more", captions)
    plain = dataclasses.replace(embedded.objective, caption_dropout=1.0)
    alone = loading.make_example_losses(
        dataclasses.replace(embedded, objective=plain), found, mesh, split="train", count=10
    )(params)
    assert len(alone.examples) == 10 and alone.uncaptioned is None and alone.by_caption == ()
