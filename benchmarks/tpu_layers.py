"""Single layers of Stable Diffusion compiled for a TPU chip, forward and backward, in bfloat16.

    python benchmarks/tpu_layers.py                               # v5p, all layers, half an hour
    python benchmarks/tpu_layers.py --chip=v6e --layers=attention # those with the word in the name
    python benchmarks/tpu_layers.py --layers=64x64 --batch=32 --json=layers.json

The peer of each variant is the other variants of the same layer. No TPU is needed: libtpu compiles
ahead of time, and the time is the planner's estimate (docs/planning.md): matrix products by the
compiler's cycles, all else by its traffic, kernels of Pallas by their declared cost, which was
taken from the instructions they compile to. The same program always gives the same numbers. A layer
takes its arguments from HBM and leaves its results there, which in a network often fuse with what
is beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measure import table, write_json

from sdjax.models import placement
from sdjax.models.attention import Attention, BasicTransformerBlock
from sdjax.models.layers import GroupNorm, conv, linear, rematerialised, silu
from sdjax.planning import estimate, hlo, topologies
from sdjax.train.compilation import compile_lowered
from sdjax.train.monitoring.model_flops import count_flops

# The smallest slice of each chip; the layer runs on one of its chips.
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Positions and widths of the levels at 512 px, and the heads of SD1 and SD2 there.
LEVELS = ((64, 320), (32, 640), (16, 1280), (8, 1280))
HEADS = {"sd1": (8, 8, 8, 8), "sd2": (5, 10, 20, 20)}
CONTEXT = {"sd1": 768, "sd2": 1024}
TOKENS = 77
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Layer:
    """One computation in several ways.

    arrays: its inputs, without the batch; parameters: abstract arrays, of every variant the same.
    variants: {name: function of (parameters, *arrays)}.
    """

    name: str
    arrays: tuple[tuple[int, ...], ...]
    parameters: Any
    variants: dict[str, Callable]


@dataclasses.dataclass(frozen=True)
class Forced:
    """A placement on one device that has one kernel where the shape allows."""

    attention: str
    kernels: str = "tpu"

    def activation(self, x: jax.Array) -> jax.Array:
        return x

    def per_device(self, kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        return kernel(*arrays)


def module(make: Callable[..., nnx.Module]) -> tuple[Any, Any]:
    """(definition, abstract parameters) of a module that computes in bfloat16."""
    return nnx.split(nnx.eval_shape(lambda: make(dtype=DTYPE, rngs=nnx.Rngs(0))))


def attentions() -> Iterator[Layer]:
    """Attention with its four projections, to itself and to text."""
    for model, heads in HEADS.items():
        for (side, width), count in zip(LEVELS, heads, strict=True):
            for kind, context in (("self", None), ("text", CONTEXT[model])):
                graph, parameters = module(
                    partial(Attention, width, count, context_channels=context)
                )

                def run(params, *arrays, wanted, graph=graph):
                    with placement.placed(Forced(wanted)):
                        return nnx.merge(graph, params)(*arrays)

                text = ((TOKENS, context),) if context else ()
                yield Layer(
                    f"attention {kind} {model} {side}x{side}",
                    ((side * side, width), *text),
                    parameters,
                    {wanted: partial(run, wanted=wanted) for wanted in ("dense", "flash")},
                )


def projections() -> Iterator[Layer]:
    """q, k and v, or k and v of text, as products of their own or as one."""
    for side, width in LEVELS[:3]:
        for name, rows, wide, count in (
            ("qkv", side * side, width, 3),
            ("kv of text", TOKENS, CONTEXT["sd2"], 2),
        ):
            graph, parameters = module(
                lambda wide=wide, width=width, count=count, **kw: nnx.List(
                    linear(wide, width, bias=False, **kw) for _ in range(count)
                )
            )

            def separate(params, x, graph=graph):
                return jnp.stack([one(x) for one in nnx.merge(graph, params)])

            def fused(params, x, graph=graph, count=count):
                products = nnx.merge(graph, params)
                first = products[0]
                kernel = jnp.concatenate([one.kernel[...] for one in products], axis=1)
                first.kernel = nnx.Param(kernel)
                return jnp.stack(jnp.split(first(x), count, axis=-1))

            yield Layer(
                f"projections {name} {side}x{side}",
                ((rows, wide),),
                parameters,
                {"separate": separate, "fused": fused},
            )


def norms() -> Iterator[Layer]:
    """GroupNorm, SiLU and the convolution after them, as at the start of a residual block."""

    def make(width, **kw):
        return nnx.List([GroupNorm(width, 32, eps=1e-5, **kw), conv(width, width, **kw)])

    for side, width in LEVELS[:3]:
        graph, parameters = module(partial(make, width))

        def stored(params, x, graph=graph):
            norm, convolution = nnx.merge(graph, params)
            return convolution(silu(norm(x)))

        def recomputed(params, x, graph=graph):
            norm, convolution = nnx.merge(graph, params)
            return convolution(jax.checkpoint(lambda x: silu(norm(x)))(x))

        yield Layer(
            f"norm {side}x{side} {width}",
            ((side, side, width),),
            parameters,
            {"stored": stored, "recomputed": recomputed},
        )


def skips() -> Iterator[Layer]:
    """The first convolution of a block on the way up, over the input beside what was kept."""
    for (side, width), skip in zip(LEVELS[:3], (320, 640, 1280), strict=True):
        graph, parameters = module(partial(conv, width + skip, width, bias=False))

        def concatenated(params, x, skip, graph=graph):
            return nnx.merge(graph, params)(jnp.concatenate([x, skip], axis=-1))

        def summed(params, x, skip, graph=graph):
            kernel = nnx.merge(graph, params).kernel[...]
            parts = []
            for array, part in (
                (x, kernel[:, :, : x.shape[-1]]),
                (skip, kernel[:, :, x.shape[-1] :]),
            ):
                one = nnx.merge(graph, params)
                one.kernel = nnx.Param(part)
                parts.append(one(array))
            return sum(parts)

        yield Layer(
            f"skip {side}x{side} {width}+{skip}",
            ((side, side, width), (side, side, skip)),
            parameters,
            {"concatenated": concatenated, "summed": summed},
        )


def remats() -> Iterator[Layer]:
    """Two transformer blocks of SD2's finest level under each policy of `model.remat`."""
    side, width = LEVELS[0]

    def make(**kw):
        block = partial(BasicTransformerBlock, width, HEADS["sd2"][0], CONTEXT["sd2"])
        return nnx.List([block(**kw), block(**kw)])

    graph, parameters = module(make)

    def run(params, x, context, policy):
        with placement.placed(Forced("auto")):
            for block in nnx.merge(graph, params):
                x = rematerialised(block, policy, level="block")(x, context)
        return x

    policies = ("none", "block", "attention", "dots_saveable", "dots_with_no_batch_dims_saveable")
    yield Layer(
        f"remat {side}x{side}",
        ((side * side, width), (TOKENS, CONTEXT["sd2"])),
        parameters,
        {policy: partial(run, policy=policy) for policy in policies},
    )


def layers() -> list[Layer]:
    """All of them."""
    return [x for make in (attentions, projections, norms, skips, remats) for x in make()]


def measure(layer: Layer, variant: str, *, chip: str, batch: int) -> dict[str, Any]:
    """Compile a variant, forward and backward, and estimate it.

    Returns:
        seconds; kernels: the part of them in Pallas; hbm: bytes moved; temporaries: bytes held;
        flops: of the mathematics; refused: the compiler's words instead of all these.
    """
    topology = topologies.parse(SLICES[chip])
    place = jax.sharding.SingleDeviceSharding(topologies.devices(topology)[0])
    run = layer.variants[variant]

    def both(params, arrays, dout):
        out, pullback = jax.vjp(run, params, *arrays)
        return out, pullback(dout)

    def there(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    arrays = [there((batch, *shape), DTYPE) for shape in layer.arrays]
    params = jax.tree.map(lambda leaf: there(leaf.shape, leaf.dtype), layer.parameters)
    out = jax.eval_shape(run, params, *arrays)
    arguments = (params, arrays, there(out.shape, out.dtype))
    outcome = compile_lowered(jax.jit(both).lower(*arguments), {})
    if outcome.error:
        return {"refused": outcome.error.splitlines()[0]}
    schedule = hlo.read(outcome.text, 1)
    flops = outcome.cost.get("flops", 0.0)
    took = estimate.step_time(schedule, topology, flops)
    dense = next(iter(layer.variants.values()))

    def mathematics(params, arrays, dout):
        return jax.vjp(dense, params, *arrays)[1](dout)

    return {
        "seconds": took.step,
        "kernels": took.kernels,
        "hbm": estimate.hbm_bytes(schedule),
        "temporaries": outcome.memory["temp"],
        "flops": count_flops(mathematics, *arguments),
    }


def row(name: str, variant: str, found: dict[str, Any]) -> list[str]:
    """Of the table."""
    if "refused" in found:
        return [name, variant, f"refused: {found['refused'][:60]}", "", "", "", ""]
    return [
        name,
        variant,
        f"{found['seconds'] * 1e3:.3f}",
        f"{found['kernels'] * 1e3:.3f}",
        f"{found['hbm'] / 1e9:.3f}",
        f"{found['temporaries'] / 2**20:.0f}",
        f"{found['flops'] / 1e9:.1f}",
    ]


HEADER = ("layer", "variant", "ms", "of them in kernels", "GB to HBM", "MiB held", "GFLOP")


def main(arguments: list[str] | None = None) -> int:
    """Prints each row as it comes, and the table at the end."""
    parser = argparse.ArgumentParser(
        description="Estimate single layers on a TPU chip, without one. Needs libtpu."
    )
    parser.add_argument("--chip", choices=SLICES, default="v5p")
    parser.add_argument("--batch", type=int, default=8, help="images on the chip")
    parser.add_argument("--layers", default="", help="words, all of which are in a layer's name")
    parser.add_argument("--json", help="file for the numbers")
    chosen = parser.parse_args(arguments)
    words = chosen.layers.split()
    wanted = [one for one in layers() if all(word in one.name for word in words)]
    if not wanted:
        parser.error(f"--layers={chosen.layers}: no layer is called so")
    rows, results = [], {}
    for layer in wanted:
        for variant in layer.variants:
            found = measure(layer, variant, chip=chosen.chip, batch=chosen.batch)
            rows.append(row(layer.name, variant, found))
            results[f"{layer.name}: {variant}"] = found
            print(*rows[-1], sep="  ", flush=True)
            write_json(chosen.json, {"chip": chosen.chip, "batch": chosen.batch, "rows": results})
    print(f"\n{chosen.chip}, batch {chosen.batch}, bfloat16:\n\n{table(HEADER, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
