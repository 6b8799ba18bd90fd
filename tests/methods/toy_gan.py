"""A method of two phases: a critic at every step, and a generator at every second one.

`toy_gan_run.py` adds it to METHODS as a new method would be, by one line.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.losses import fold_keys, normal_like
from sdjax.methods.method import Kind, Method, MethodConfig, Phase
from sdjax.optim.optimizers import OptimConfig
from sdjax.sampling.generate import to_uint8

NOISE = 6


@dataclasses.dataclass(frozen=True)
class ToyGANConfig(MethodConfig):
    name: str = "toy_gan"
    pull: float = 0.1  # of the generator towards its average


def make(setup) -> Method:
    side = setup.data.resolution
    pixels = side * side * 3
    shapes = {
        "generator.kernel": (NOISE, pixels), "generator.bias": (pixels,),
        "critic.kernel": (pixels, 4), "critic.bias": (4,),
    }  # fmt: skip

    def init(key):
        return {
            path: 0.05 * jax.random.normal(jax.random.fold_in(key, i), shape)
            for i, (path, shape) in enumerate(shapes.items())
        }

    def generate(params, keys):
        noise = normal_like(keys, jnp.zeros((len(keys), NOISE)))
        return jnp.tanh(noise @ params["generator.kernel"] + params["generator.bias"])

    def judge(params, images):
        x = images.reshape(len(images), -1) @ params["critic.kernel"] + params["critic.bias"]
        return jnp.sum(jax.nn.gelu(x), axis=1)

    def critic_loss(trained, frozen, averages, batch, draw):
        made = jax.lax.stop_gradient(generate(trained, fold_keys(draw.keys, 7)))
        loss = jax.nn.relu(1 - judge(trained, batch["image"])) + jax.nn.relu(
            1 + judge(trained, made)
        )
        return loss, {"loss": loss}

    def generator_loss(trained, frozen, averages, batch, draw):
        loss = -judge(trained, generate(trained, fold_keys(draw.keys, 8)))
        (average,) = averages.values()
        apart = jnp.mean((trained["generator.bias"] - average["generator.bias"]) ** 2)
        return loss + setup.config.pull * apart, {"loss": loss}

    def pictures(params, examples, seed, guided=False):
        keys = jax.random.split(jax.random.key(seed), len(examples.images))
        images = np.asarray(generate(params, keys)).reshape(-1, side, side, 3)
        return to_uint8(images / 2 + 0.5)

    return Method(
        abstract={p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()},
        init=init,
        phases=(
            Phase("critic", critic_loss, lambda path: path.startswith("critic.")),
            Phase(
                "generator", generator_loss, lambda path: path.startswith("generator."),
                optim=OptimConfig(name="sgd", learning_rate=0.05), every=2,
            ),
        ),
        example={"image": jax.ShapeDtypeStruct((side, side, 3), jnp.float32)},
        validate=lambda every, batch, keys, timesteps: judge(every, batch["image"])[:, None],
        maxima=None,
        timesteps=lambda count: np.zeros(0, np.float32),
        pictures=pictures,
    )  # fmt: skip


TOY_GAN = Kind(config=ToyGANConfig, make=make, networks=lambda there: (), draws=False, used_by="")
