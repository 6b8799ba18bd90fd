"""Intermediate arrays of a network, for a caller that asks for them.

The networks offer what is inside them (`output`, `offer`), each array under the path of its module,
which is that of diffusers. Outside `capturing` an offer means nothing and makes nothing: the traced
program is the same to the last operation.

    with capturing(unet, probabilities=lambda path: path.endswith("attn2")) as found:
        out = unet(xt, t, context)
    probabilities = found.take()  # {path: [B, heads, L, M]}

What is captured belongs to the trace that it is captured in, like every traced array. Within the
body of a `lax.scan` it has to be taken, and made part of what the body returns, in the body.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models import weights

Array = jax.Array
PROBABILITIES, LOGITS, OUTPUT = "probabilities", "logits", "output"


@dataclasses.dataclass(eq=False)
class Record:
    """What has been captured, by path.

    paths: the path of each module of the network, by its identity.
    wants: whether an array of a kind is wanted of the module at a path.
    """

    paths: Mapping[int, str]
    wants: Callable[[str, str], bool]
    arrays: dict[str, Array] = dataclasses.field(default_factory=dict)

    def take(self) -> dict[str, Array]:
        """{path: array} of what has come since the last call."""
        taken, self.arrays = self.arrays, {}
        return taken


_record: ContextVar[Record | None] = ContextVar("capture", default=None)


def paths(network: nnx.Module) -> dict[int, str]:
    """The path of each module within the network, by `id(module)`."""
    return {
        id(module): ".".join(str(part) for part in path)
        for path, module in nnx.iter_modules(network)
    }


@contextlib.contextmanager
def capturing(
    network: nnx.Module,
    *,
    probabilities: Callable[[str], bool] | None = None,
    maxima: bool = False,
) -> Iterator[Record]:
    """Calls of the network in here leave arrays in the record that is given.

    Args:
        network: whose modules are captured; others that run in here are not.
        probabilities: which attention layers to take the probabilities of, by path:
            [B, heads, L, M] float32, the softmax over M.
        maxima: under the path of an attention layer its largest logit (the softmax's argument),
            under that of every residual and transformer block and every change of resolution the
            largest absolute value it gives; float32 scalars.

    Raises:
        ValueError: at the first block that is rematerialised: arrays cannot leave it.
    """

    def wants(path: str, kind: str) -> bool:
        if kind == PROBABILITIES:
            return probabilities is not None and probabilities(path)
        return maxima

    token = _record.set(Record(paths(network), wants))
    try:
        yield _record.get()  # type: ignore[misc]
    finally:
        _record.reset(token)


def offer(module: nnx.Module, kind: str, make: Callable[[], Array]) -> None:
    """Leave `make()` under the module's path, if somebody wants arrays of this kind of it."""
    record = _record.get()
    if record is None:
        return
    path = record.paths.get(id(module))
    if path is not None and record.wants(path, kind):
        record.arrays[path] = make()


def output(module: nnx.Module, x: Array) -> Array:
    """x, what a block gives, as it is; its largest absolute value is offered."""
    offer(module, OUTPUT, lambda: jnp.abs(x).max().astype(jnp.float32))
    return x


def refuse_remat(remat: str) -> None:
    """Raises a ValueError within `capturing`: what is recomputed keeps its arrays to itself."""
    if _record.get() is not None:
        raise ValueError(
            f"remat = {remat!r}: nothing can be captured of a network that is rematerialised; "
            "build it with remat = 'none', its parameters are the same"
        )


def maxima(
    graph: Any,
    params: Mapping[str, Array],
    xt: Array,
    timesteps: Array,
    context: Any,
) -> dict[str, Array]:
    """Largest activations and attention logits of a UNet. Jittable.

    Logits grow before training diverges (Dehghani et al. 2023, "Scaling Vision Transformers to 22
    Billion Parameters", section 3.1); activations past 3.4e38 overflow bfloat16, 6.5e4 float16.

    Args:
        graph: of `weights.abstract(UNet, config, dtype=...)`, without remat.
        params: {path: array} of the UNet alone.
        xt, timesteps, context: see `UNet.__call__`.

    Returns:
        {path: float32 scalar}, see `capturing`.
    """
    network = weights.merge(graph, params)
    with capturing(network, maxima=True) as found:
        network(xt, timesteps, context)
    return found.take()
