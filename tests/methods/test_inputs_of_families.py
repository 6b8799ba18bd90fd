"""Methods with other inputs, on the shapes of every family: losses are traced, nothing compiles."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import default, resolve
from sdjax.config_model import blank_method
from sdjax.diffusion.losses import example_keys
from sdjax.methods.method import Draw

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {"sd": "base", "sdxl": "sdxl_tiny", "sd3": "sd3_tiny", "flux": "flux_tiny"}
IMAGES = {
    "dpo": ({"name": "rejected"},),
    "dpo_adapters": ({"name": "rejected"},),
    "edit": ({"name": "before"}, {"name": "mask", "kind": "mask"}),
    "inpaint": ({"name": "mask", "kind": "mask"},),
}


def recipe(family, method, **data):
    """A tiny recipe of a method."""
    spec = importlib.util.spec_from_file_location("recipe", CONFIGS / f"{RECIPES[family]}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = module.get_config()
    c = default(family=family, method=method)
    for group in ("model", "data", "schedule", "tokenizer"):
        c[group] = given[group]
    c.objective.prediction_type = given.objective.prediction_type
    c.data.update(images=IMAGES.get(method, ()), batch_size=4, **data)
    c.model.vae.latent_channels = 4  # as the VAE that these recipes take
    if method in ("edit", "inpaint"):
        latent = c.model.vae.latent_channels
        c.model.unet.in_channels = 2 * latent + (method == "inpaint")
    return c


def made(family, method, **data):
    """The method of a tiny recipe, and its abstract batch."""
    found = blank_method(resolve(recipe(family, method, **data)))
    batch = {n: jax.ShapeDtypeStruct((4, *v.shape), v.dtype) for n, v in found.example.items()}
    return found, batch


def shapes(found, batch):
    """The shapes of loss, of what is logged, and of the losses of validation."""

    def loss(params, batch):
        positions = jnp.arange(4)
        key = jax.random.key(0)
        draw = Draw(key, example_keys(key, positions), positions, 4)
        per_example, aux = found.phases[0].loss(params, {}, {}, batch, draw)
        timesteps = np.array([100.0, 700.0], np.float32)
        return per_example, aux, found.validate(params, batch, draw.keys, timesteps)

    per_example, aux, validated = jax.eval_shape(loss, found.abstract, batch)
    return per_example.shape, {name: value.shape for name, value in aux.items()}, validated.shape


@pytest.mark.parametrize("family", list(RECIPES))
def test_pairs_are_compared_in_every_family(family):
    found, batch = made(family, "dpo")
    per_example, aux, validated = shapes(found, batch)
    assert per_example == (4,) and validated == (4, 2) and "rejected" in batch
    names = {"loss", "timesteps", "win_loss", "lose_loss", "accuracy"}
    assert aux == dict.fromkeys(names, (4,))
    denoiser = {"sd": "unet", "sdxl": "unet"}.get(family, "transformer")
    copies = {p for p in found.abstract if p.startswith("reference.")}
    own = {p.replace(denoiser, "reference", 1) for p in found.abstract if p.startswith(denoiser)}
    assert copies == own and not any(map(found.trainable, copies))
    assert {p.split(".")[0] for p in found.abstract if found.trainable(p)} == {denoiser}


@pytest.mark.parametrize("text", [False, True])
def test_pairs_may_be_encoded_ahead(text):
    found, batch = made("sdxl", "dpo", name="encoded", path="x", text_embeddings=text)
    assert {"moments", "rejected_moments"} <= batch.keys() and ("context" in batch) == text
    assert shapes(found, batch)[0] == (4,)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("method", ["inpaint", "edit"])
def test_unets_are_given_channels(family, method):
    found, batch = made(family, method)
    per_example, _, validated = shapes(found, batch)
    assert per_example == (4,) and validated == (4, 2)
    widths = {"inpaint": 9, "edit": 8}
    assert found.abstract["unet.conv_in.kernel"].shape[2] == widths[method]
