"""FLOPs of a traced function: 2 x the multiply-adds of its matrix products and convolutions.

These are the FLOPs of the mathematics, the numerator of MFU. A compiler's own count has what it
computes twice in it (rematerialisation) and leaves out what it cannot see (loops, kernels). Those
of a gradient follow from the function itself, for its traced gradient may compute things twice as
well: a product costs once more for each of its two sides that a gradient flows through.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from sdjax.config import Config
from sdjax.config_model import blank_method, model_of_run
from sdjax.families.bind import bind
from sdjax.families.conditioning import blank_tokenizers, make_conditioner
from sdjax.families.registry import model_of
from sdjax.methods.method import Draw
from sdjax.parallel.chips import peak_flops
from sdjax.train.program import frozen_in_step, split_trainable


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of `function(*args)`; arguments may be `jax.ShapeDtypeStruct`.

    A loop whose length is decided at run time counts as one pass, a `lax.cond` as its dearest
    branch, a Pallas kernel as its `pl.CostEstimate` says.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _walk(jaxpr, [False] * len(jaxpr.invars))[0]


def gradient_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of `function(*args)` and of its gradient with respect to the first argument.

    The gradient of a Pallas kernel counts twice the kernel. Of what ends in a `stop_gradient` after
    products with parameters, the gradient is counted although it is not computed.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    trained = len(jax.tree.leaves(args[0]))
    return _walk(jaxpr, [i < trained for i in range(len(jaxpr.invars))])[0]


def mfu_flops(config: Config) -> float | None:
    """`train_flops` where this device's peak is known, else None without tracing anything."""
    return train_flops(config) if peak_flops(jax.devices()[0].device_kind) else None


def train_flops(config: Config) -> float:
    """FLOPs to train on one image: frozen networks forward, gradients, nothing computed twice."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    method = blank_method(config)
    split = split_trainable(config, method)
    batch = {
        name: jax.ShapeDtypeStruct((1, *one.shape), one.dtype)
        for name, one in method.example.items()
    }

    def loss(params: Any, frozen: Any, batch: Any, positions: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
        draw = Draw(key, keys, positions, 1)
        each = [phase.loss(params, frozen, {}, batch, draw)[0] / phase.every for phase in phases]
        return jnp.mean(sum(each))

    positions, phases = jax.ShapeDtypeStruct((1,), jnp.int32), method.phases
    frozen = frozen_in_step(config, method, split)
    return gradient_flops(loss, split.trained, frozen, batch, positions)


def denoiser_flops(config: Config, latent: tuple[int, int, int]) -> float:
    """FLOPs of the denoiser forward on one latent (h, w, C); MLPerf takes 3 x for a step."""
    model = model_of_run(config, blank_tokenizers(model_of(config.model)))
    name, dtype = model.family.denoiser, config.model.dtype
    conditioner = make_conditioner(model, model.tokenizers, dtype=dtype)
    networks = bind(model, (name,), dtype=dtype)
    factor = model.vae.downscale
    tokens = {
        f: jax.ShapeDtypeStruct((1, *t.shape), jnp.int32) for f, t in conditioner.null.items()
    }
    context = jax.eval_shape(
        functools.partial(conditioner, target=(latent[0] * factor, latent[1] * factor)),
        conditioner.networks.abstract,
        tokens,
    )
    return count_flops(
        lambda params, xt, t, context: networks.module(name, params)(xt, t, context),
        networks.abstract,
        jax.ShapeDtypeStruct((1, *latent), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        context,
    )


def _walk(jaxpr: Any, trained: Sequence[bool]) -> tuple[float, list[bool]]:
    """FLOPs with the gradient's, and which outputs a gradient flows through.

    Args:
        trained: for each input, whether the gradient is wanted with respect to it or flows on to
            what is. With none, these are the FLOPs of the function alone.
    """
    flows = {var for var, one in zip(jaxpr.invars, trained, strict=True) if one}
    total = 0.0
    for equation in jaxpr.eqns:
        inputs = [not isinstance(var, core.Literal) and var in flows for var in equation.invars]
        flops, outputs = _equation(equation, inputs)
        total += flops
        flows |= {
            var
            for var, one in zip(equation.outvars, outputs, strict=True)
            if one and jnp.issubdtype(var.aval.dtype, jnp.inexact)
        }
    outputs = [not isinstance(var, core.Literal) and var in flows for var in jaxpr.outvars]
    return total, outputs


def _equation(equation: Any, trained: list[bool]) -> tuple[float, list[bool]]:
    name, params = equation.primitive.name, equation.params
    every = [any(trained) and name != "stop_gradient"] * len(equation.outvars)
    if name == "dot_general":
        return _dot(equation) * (1 + sum(trained)), every
    if name == "conv_general_dilated":
        return _convolution(equation) * (1 + sum(trained)), every
    if name == "pallas_call":
        flops = float(params["cost_estimate"].flops) if params.get("cost_estimate") else 0.0
        return flops * (3 if any(trained) else 1), every
    if name == "scan":
        return _scan(params, trained)
    inner = _inner(params)
    if not inner:
        return 0.0, every
    # A `cond` has its index before what the branches take.
    given = trained[1:] if name == "cond" else trained
    if any(len(jaxpr.invars) != len(given) for jaxpr in inner):  # a loop without a known length
        return sum(_walk(jaxpr, [False] * len(jaxpr.invars))[0] for jaxpr in inner), every
    each, outputs = zip(*(_walk(jaxpr, given) for jaxpr in inner), strict=True)
    found = [any(column) for column in zip(*outputs, strict=True)]
    return (max(each) if name == "cond" else sum(each)), found


def _scan(params: dict[str, Any], trained: list[bool]) -> tuple[float, list[bool]]:
    """A carry that a gradient reaches in one pass has it in the next ones."""
    jaxpr, (consts, carried) = params["jaxpr"].jaxpr, loop_arguments(params)
    carry = trained[consts : consts + carried]
    while True:
        given = [*trained[:consts], *carry, *trained[consts + carried :]]
        flops, outputs = _walk(jaxpr, given)
        reached = [a or b for a, b in zip(carry, outputs[:carried], strict=True)]
        if reached == carry:
            return flops * params["length"], [*reached, *outputs[carried:]]
        carry = reached


def loop_arguments(params: dict[str, Any]) -> tuple[int, int]:
    """How many arguments of a `scan` are the same in every pass, and how many it carries."""
    if "ft_in" in params:  # since jax 0.12
        same, carried, _ = params["ft_in"].unpack()
        return len(same), len(carried)
    return params["num_consts"], params["num_carry"]


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
