"""Named pictures and masks on the way to the loss: as pictures, encoded ahead, in whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.data.config import DataError
from sdjax.data.pipeline import make_iterator
from sdjax.diffusion.losses import example_keys
from sdjax.encoding import encoder
from sdjax.errors import UserError
from sdjax.methods.fields import check_images
from sdjax.methods.method import Draw
from sdjax.train import loop
from tests.data.test_named_images import Copies
from tests.encoding.test_encoded import encoded_once, on
from tests.methods.runs import broken_off
from tests.train.test_loop import assert_same_run

BEFORE = {"name": "before", "key": "copy"}
CONTROL = {"name": "control", "key": "edge", "kind": "condition"}
MASK = {"name": "mask", "key": "matte", "kind": "mask"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Copies(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def config(tiny_config, data_dir):
    """A run on pictures of three shapes, with a mask."""
    tiny_config.data.update(
        name="copies", data_dir=data_dir, batch_size=4, flip=True, images=(MASK,),
        eval_split="train",
    )  # fmt: skip
    return tiny_config


def test_batches_of_an_encoded_dataset_are_those_of_the_pictures(config, tmp_path):
    config.data.buckets.update(step=4, max_aspect=2.0)
    config.data.images = (BEFORE, CONTROL, MASK)
    encoded_once(config, tmp_path / "data", flipped=True)
    found = []
    for one in (config, on(config, tmp_path / "data")):
        own = resolve(one)
        data = make_iterator(own.data, {}, seed=3, split="train")
        found.append([next(data) for _ in range(8)])
        data.close()
    assembled = assemble(resolve(config))
    vae = encoder.make_vae_encoder(assembled.config, assembled.params, 4)
    flips = 0
    for there, here in zip(*found, strict=True):
        assert here.keys() == {"moments", "before_moments", "control", "mask"}
        for name in ("control", "mask"):
            np.testing.assert_array_equal(here[name], there[name])
        assert here["mask"].shape[1] == 2 * here["moments"].shape[1]
        np.testing.assert_allclose(here["before_moments"], vae(there["before"]), atol=1e-5)
        # A copy of the picture has its moments.
        np.testing.assert_array_equal(here["before_moments"], here["moments"])
        flips += len(there["image"])
    assert len({batch["mask"].shape for batch in found[0]}) > 1 and flips == 32
    with pytest.raises(DataError, match=r"asks for edge \(condition\).*was encoded with before"):
        other = on(config, tmp_path / "data", **{"data.images": ({**CONTROL, "name": "edge"},)})
        make_iterator(resolve(other).data, {}, seed=3, split="train")


def test_a_mask_multiplies_the_loss_of_pictures_and_of_moments(config, tmp_path):
    encoded_once(config, tmp_path / "data", flipped=True)
    found = {}
    for kind, one in (("pictures", config), ("moments", on(config, tmp_path / "data"))):
        assembled = assemble(resolve(one))
        method = method_of_run(assembled.config, assembled.tokenizers)
        params = jax.jit(method.init)(jax.random.key(0))
        params |= {path: jnp.asarray(value) for path, value in assembled.params.items()}
        positions = jnp.arange(4)
        draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, 4)

        def mean_loss(batch, trained, method=method, params=params, draw=draw):
            loss, _ = method.phases[0].loss({**params, **trained}, {}, {}, batch, draw)
            return loss.sum(), loss

        gradient = jax.jit(
            jax.grad(mean_loss, argnums=1, has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        data = make_iterator(assembled.config.data, assembled.tokenizers, seed=0, split="train")
        batch = next(data)
        data.close()
        assert {n: v.shape for n, v in batch.items()} == {
            n: (4, *v.shape) for n, v in method.example.items()
        }
        trained = {p: v for p, v in params.items() if p.startswith("unet.conv_out")}
        masks = {
            "own": batch["mask"],
            "ones": np.ones_like(batch["mask"]),
            "zeros": np.zeros_like(batch["mask"]),
            "half": np.concatenate([np.ones_like(batch["mask"])[:2], 0 * batch["mask"][:2]]),
        }
        for name, mask in masks.items():
            grads, loss = gradient(batch | {"mask": mask}, trained)
            norm = float(sum(jnp.abs(g).sum() for g in grads.values()))
            found[kind, name] = np.asarray(loss), norm
    mask = np.concatenate([np.ones_like(batch["mask"])[:2], 0 * batch["mask"][:2]])
    losses = method.validate(params, batch | {"mask": mask}, draw.keys, np.array([500.0]))
    assert losses.shape == (4, 1) and (losses[:2] > 0).all() and (losses[2:] == 0).all()
    ones, own = found["pictures", "ones"][0], found["pictures", "own"][0]
    assert (own < 0.8 * ones).all() and (own > 0.2 * ones).all()  # noise, of mean one half
    assert found["pictures", "zeros"][1] == 0.0 and not found["pictures", "zeros"][0].any()
    assert found["pictures", "own"][1] > 0
    half = found["pictures", "half"][0]
    np.testing.assert_array_equal(half[2:], 0)
    np.testing.assert_allclose(half[:2], ones[:2], rtol=1e-6)
    for name in ("own", "ones"):
        # The VAE is compiled apart from the step; all is float32.
        want = found["pictures", name][0]
        np.testing.assert_allclose(found["moments", name][0], want, rtol=2e-5)


def test_a_run_with_masks_in_buckets_resumes_to_the_bit(config, tmp_path):
    config.data.resolution = 24
    config.data.buckets.update(step=8, max_aspect=2.0)  # 24x24, 32x16 and 16x32
    config.optim.schedule = "constant"
    config.train.update(steps=2, checkpoint_every=1)
    assert loop.run(resolve(config), str(tmp_path / "whole")) == loop.DONE
    broken_off(tmp_path / "whole", tmp_path / "parts", 1)
    assert loop.run(resolve(config), str(tmp_path / "parts")) == loop.DONE
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    config.data.images = ()
    with pytest.raises(UserError, match="data.images"):
        loop.run(resolve(config), str(tmp_path / "parts"))


@pytest.mark.parametrize("images, message", [
    ((CONTROL,), "'control' is not read"),
    (({**MASK, "kind": "condition"},), "'mask' is of the kind 'condition', not 'mask'"),
])  # fmt: skip
def test_a_method_says_which_pictures_it_takes(config, images, message):
    config.data.images = images
    assembled = assemble(resolve(config))
    with pytest.raises(UserError, match=f"does not suit method 'denoise': {message}"):
        method_of_run(assembled.config, assembled.tokenizers)


def test_a_required_picture_that_is_missing_is_named():
    needed = {"control": "condition"}
    check_images({"control": "condition"}, "x", required=needed, optional={})
    with pytest.raises(UserError, match=r"'control' is missing; it takes control \(condition\)"):
        check_images({}, "x", required=needed, optional={"mask": "mask"})
