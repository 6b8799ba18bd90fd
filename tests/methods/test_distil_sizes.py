"""Recipes of real sizes that distil: their networks and their losses, by shapes alone."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sdjax.config import resolve
from sdjax.config_model import blank_method
from sdjax.methods.method import COPY, Draw
from sdjax.train.program import split_trainable

CONFIGS = Path(__file__).parents[2] / "configs"
SD, SDXL = 859_520_964, 2_567_463_684  # parameters of the UNets
WIDTH = 1280  # of their middles


def of_recipe(name):
    spec = importlib.util.spec_from_file_location("recipe", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.data.path = "/pictures"
    config = resolve(c)
    return config, blank_method(config)


def counts(paths):
    found = {}
    for path, value in paths.items():
        name = path.split(".")[0]
        found[name] = found.get(name, 0) + math.prod(value.shape)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trained", "frozen"),
    [
        # 81,920 numbers read the guidance scale: 256 times 320.
        ("sd15_progressive", {"unet": SD + 81_920}, set()),
        (
            "sdxl_dmd2",
            {
                "unet": SDXL,
                "fake": SDXL,
                "head": 4 * (16 * WIDTH**2 + 3 * WIDTH) + WIDTH + 1,
            },
            {"teacher"},
        ),
    ],
)
def test_networks_and_losses_of_real_sizes(name, trained, frozen):
    config, method = of_recipe(name)
    split = split_trainable(config, method)
    assert counts(split.trained) == trained
    assert frozen <= counts(split.frozen).keys()
    batch = {
        field: jax.ShapeDtypeStruct((2, *one.shape), one.dtype)
        for field, one in method.example.items()
    }

    def losses(trained, frozen, batch):
        keys = jax.random.split(jax.random.key(0), 2)
        draw = Draw(jax.random.key(0), keys, jnp.arange(2), 2, copies=jnp.int32(1))
        return [
            phase.loss(trained, frozen, {COPY: trained}, batch, draw)[0] for phase in method.phases
        ]

    found = jax.eval_shape(losses, split.trained, split.frozen, batch)
    assert [one.shape for one in found] == [(2,)] * len(method.phases)
