"""The VAE that comes with sdjax: what it keeps of a picture, and how it tells colours apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.references import TINY_VAE
from sdjax.data.builders import shapes
from sdjax.evaluation.metrics.fidelity import verdicts
from sdjax.models import weights
from sdjax.models.params import component
from sdjax.models.vae import VAE


@pytest.fixture(scope="module")
def vae():
    found = read_any(TINY_VAE, components=("vae",))
    graph, _ = weights.abstract(VAE, found.vae)
    params = {p: jnp.asarray(v, jnp.float32) for p, v in component(found.params, "vae").items()}
    return weights.merge(graph, params)


def as_input(images: list[np.ndarray]) -> jax.Array:
    return jnp.asarray(np.stack(images), jnp.float32) / 127.5 - 1


def test_pictures_through_it_are_still_read_right(vae):
    examples = [shapes.make_example(0, "test", index) for index in range(64)]
    back = jax.jit(lambda x: vae.decode(vae.encode(x)[..., :4]))(as_input([e[0] for e in examples]))
    pictures = np.clip(np.round((np.asarray(back) + 1) * 127.5), 0, 255).astype(np.uint8)
    exact = [
        verdicts(text, one)["exact"] for (_, text, _), one in zip(examples, pictures, strict=True)
    ]
    assert np.mean(exact) == 1


def test_a_shape_looks_alike_in_all_colours(vae):
    """A diffusion model that knows a shape in one colour then knows it in all of them."""
    patterns = {}
    encode = jax.jit(lambda x: vae.encode(x)[..., :4])
    for colour, rgb in shapes.PALETTE.items():
        drawn = [
            shapes.draw(
                shapes.Scene(
                    (shapes.Placed(colour, shape, "large", "", 32, 32, 32.0, rgb),),
                    "",
                    (240, 240, 240),
                )
            )
            for shape in shapes.SHAPES
        ]
        latents = np.asarray(encode(as_input(drawn)))
        pattern = (latents - latents.mean(0)).ravel()  # what differs between shapes
        patterns[colour] = pattern / np.linalg.norm(pattern)
    alike = {(a, b): float(patterns[a] @ patterns[b]) for a in patterns for b in patterns}
    # Of a VAE that had seen the eight colours alone, cyan's were at -0.8 to -0.94 with all others.
    assert min(alike.values()) > 0.5, min(alike, key=alike.__getitem__)
