"""Inputs of denoisers from datasets that were encoded ahead: losses of the pictures, and runs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.data import encoded
from sdjax.data.config import DataError
from sdjax.data.pictures import open_split
from sdjax.data.pipeline import make_iterator
from sdjax.data.sources import open_source
from sdjax.encoding.encoder import make_vae_encoder
from sdjax.errors import UserError
from sdjax.train import loop
from tests.data.test_named_images import Copies
from tests.encoding.test_encoded import encoded_once, on
from tests.methods.runs import begun, begun_from

IMAGES = {
    "edit": ({"name": "before", "key": "copy"}, {"name": "mask", "key": "matte", "kind": "mask"}),
    "inpaint": ({"name": "mask", "key": "matte", "kind": "mask"},),
    "control": ({"name": "control", "key": "edge", "kind": "condition"},),
}
FIELDS = {
    "edit": {"moments", "before_moments", "mask", "tokens"},
    "inpaint": {"moments", "masked_moments", "mask", "tokens"},
    "control": {"moments", "control", "tokens"},
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Copies(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def recipe(tiny_config, tiny_model, copies):
    def made(method):
        c = begun_from(tiny_config, tiny_model, method)
        c.data.update(
            name="copies", data_dir=copies, images=IMAGES[method], eval_split="train", flip=True
        )
        if method == "control":
            c.method.widths, c.optim.groups = (4, 8), ()
        if method == "inpaint":
            c.method.whole = 0.4
        return c

    return made


def loss_and_fields(config, layer="unet.conv_in"):
    """(the losses of a batch in training and in validation, the fields of the batch)."""
    method, params, batch, draw = begun(config)
    # What begins at zero would hide what is read.
    kernel = params[f"{layer}.kernel"]
    params[f"{layer}.kernel"] = jax.random.normal(jax.random.key(2), kernel.shape) / 4
    assert {n: v.shape for n, v in batch.items()} == {
        n: (4, *v.shape) for n, v in method.example.items()
    }
    loss = functools.partial(method.phases[0].loss, params, {}, {})
    trained = jax.jit(lambda batch: loss(batch, draw)[0])(batch)
    held = jax.jit(lambda batch: method.validate(params, batch, draw.keys, np.array([500.0])))
    return np.asarray(trained), np.asarray(held(batch)), set(batch)


@pytest.mark.parametrize("method", IMAGES)
def test_losses_are_those_of_the_pictures(method, recipe, tmp_path):
    config = recipe(method)
    encoded_once(config, tmp_path / "data", flipped=True)
    trained, held, fields = loss_and_fields(config)
    theirs = loss_and_fields(on(config, tmp_path / "data"))
    assert theirs[2] == FIELDS[method] and "image" in fields
    # The VAE is compiled apart from the step; all is float32.
    np.testing.assert_allclose(theirs[0], trained, rtol=2e-5)
    np.testing.assert_allclose(theirs[1], held, rtol=2e-5)
    assert np.ptp(trained) > 0


def test_masked_moments_are_of_the_picture_that_is_grey_under_the_mask(recipe, tmp_path):
    config = recipe("inpaint")
    encoded_once(config, tmp_path / "data")
    assert encoded.read(tmp_path / "data").images == {"mask": "mask", "masked": "picture"}
    own = resolve(on(config, tmp_path / "data", **{"data.flip": False}))
    assert [image.name for image in own.data.images] == ["mask", "masked"]
    assert resolve(dataclasses.asdict(own)) == own  # said once, also when a run is resumed
    one = open_source(own.data, "train")[0]
    side = own.data.resolution
    there = open_split(resolve(config).data, "train", size=(side, side)).named([0])
    assembled = assemble(resolve(config))
    encode = make_vae_encoder(assembled.config, assembled.params, 1)
    image = (there["image"].astype(np.float32) / 127.5 - 1) * (there["mask"] < 128)
    np.testing.assert_allclose(one["others"]["masked_moments"], encode(image)[0], atol=1e-5)


@pytest.mark.parametrize("method", ["edit", "inpaint"])
def test_a_run_on_what_was_encoded_shows_what_it_reads(method, recipe, tmp_path):
    config = recipe(method)
    encoded_once(config, tmp_path / "data", flipped=True)
    config.train.sample_every = 2
    config.sample.update(count=2, prompts=("a red circle", "a blue square", "a star"))
    run = on(config, tmp_path / "data")
    assert loop.run(resolve(run), str(tmp_path / "run")) == loop.DONE
    shown = np.asarray(Image.open(tmp_path / "run" / "samples" / "00000002.png").convert("RGB"))
    assert shown[4:20, 4:20].std() > 1  # the picture on the left is none of one colour


def test_what_cannot_be_known_ahead_is_refused(recipe, tmp_path):
    config = recipe("inpaint")
    config.data.images = ()
    with pytest.raises(UserError, match="draws masks anew at every step.*Give masks"):
        encoded_once(config, tmp_path / "none")
    plain = recipe("inpaint")
    other = begun_like(plain, "denoise")
    encoded_once(other, tmp_path / "plain", flipped=True)
    with pytest.raises(DataError, match=r"masked \(picture\), but .* was encoded with mask"):
        own = resolve(on(plain, tmp_path / "plain"))
        make_iterator(own.data, {}, seed=0, split="train")


def begun_like(config, method):
    """The data of a recipe, for another method."""
    from sdjax.config import default

    c = default(method=method)
    c.update(init_from=config.init_from, data=config.data)
    return c
