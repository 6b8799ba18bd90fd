"""FLOPs of a traced function: 2 x the multiply-adds of its matrix products and convolutions.

These are the FLOPs of the mathematics, the numerator of MFU. A compiler's own count has what it
computes twice in it (rematerialisation) and leaves out what it cannot see (loops, kernels).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from sdjax.config import Config
from sdjax.models import weights
from sdjax.models.unet import UNet
from sdjax.parallel.chips import peak_flops
from sdjax.train.conditioning import blank_tokenizers, check_text
from sdjax.train.program import split_trainable
from sdjax.train.task import make_task, trainable_networks


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of `function(*args)`; arguments may be `jax.ShapeDtypeStruct`.

    A loop whose length is decided at run time counts as one pass, a `lax.cond` as its dearest
    branch, a Pallas kernel as its `pl.CostEstimate` says.
    """
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def mfu_flops(config: Config) -> float | None:
    """`train_flops` where this device's peak is known, else None without tracing anything."""
    return train_flops(config) if peak_flops(jax.devices()[0].device_kind) else None


def train_flops(config: Config) -> float:
    """FLOPs to train on one image: frozen networks forward, gradients, nothing computed twice."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    task = make_task(config, blank_tokenizers(config.model))
    split = split_trainable(config, task.abstract, trainable_networks(config))
    batch = {
        name: jax.ShapeDtypeStruct((1, *one.shape), one.dtype) for name, one in task.example.items()
    }

    def loss(params: Any, frozen: Any, batch: Any, positions: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
        return jnp.mean(
            task.loss(params, frozen, batch, key=key, keys=keys, positions=positions, batch_size=1)[
                0
            ]
        )

    positions = jax.ShapeDtypeStruct((1,), jnp.int32)
    return count_flops(jax.grad(loss), split.trained, split.frozen, batch, positions)


def unet_flops(config: Config, latent: tuple[int, int, int]) -> float:
    """FLOPs of the UNet forward on one latent (h, w, C), as MLPerf counts them (it takes 3 x)."""
    model = config.model
    graph, params = weights.abstract(UNet, model.unet, dtype=jnp.dtype(model.dtype))
    tokens = max(encoder.max_position_embeddings for encoder in model.text_encoders.values())
    context: Any = jax.ShapeDtypeStruct((1, tokens, model.unet.cross_attention_dim), jnp.float32)
    time_ids = check_text(model)
    if time_ids:
        assert model.text_encoder_2 is not None
        context = {
            "context": context,
            "pooled": jax.ShapeDtypeStruct((1, model.text_encoder_2.projection_dim), jnp.float32),
            "time_ids": jax.ShapeDtypeStruct((1, time_ids), jnp.float32),
        }
    return count_flops(
        lambda params, xt, t, context: weights.merge(graph, params)(xt, t, context),
        params,
        jax.ShapeDtypeStruct((1, *latent), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        context,
    )


def _jaxpr(jaxpr: Any) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "pallas_call":
        return float(params["cost_estimate"].flops) if params.get("cost_estimate") else 0.0
    inner = [_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * params["length"] if name == "scan" else sum(inner)


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters: of a call, a loop, the branches of a `cond`."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _dot(equation: Any) -> float:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    size = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * size * math.prod(left[dim] for dim in contracted)


def _convolution(equation: Any) -> float:
    params, kernel = equation.params, equation.invars[1].aval.shape
    spec = params["dimension_numbers"].rhs_spec  # (out, in, *spatial)
    taps = math.prod(kernel[dim] for dim in spec[2:])
    # A dilated input is mostly zeros between its values, and those count for nothing.
    taps /= math.prod(params["lhs_dilation"])
    size = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * size * kernel[spec[1]] * taps
