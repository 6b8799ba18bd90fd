"""Intermediate arrays of a network, for a caller that asks for them.

The networks offer arrays inside them (`output`, `offer`), each under the path of its module, which
is that of diffusers. Outside `capturing` an offer does nothing: the traced program is the same to
the last operation.

    with capturing(unet, probabilities=lambda path: path.endswith("attn2")) as found:
        out = unet(xt, t, context)
    probabilities = found.take()  # {path: [B, heads, L, M]}

A captured array belongs to its trace, like every traced array. The body of a `lax.scan` must call
`take` itself, and return the arrays.
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
class Capture:
    """The arrays captured so far, by path.

    paths: the path of each module of the network, by its identity.
    wants: whether to capture an array of the kind, (path, kind) -> bool.
    """

    paths: Mapping[int, str]
    wants: Callable[[str, str], bool]
    arrays: dict[str, Array] = dataclasses.field(default_factory=dict)

    def take(self) -> dict[str, Array]:
        """Return {path: array} of the arrays since the last call."""
        taken, self.arrays = self.arrays, {}
        return taken


_capture: ContextVar[Capture | None] = ContextVar("capture", default=None)


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
) -> Iterator[Capture]:
    """A context in which calls of the network leave arrays in the Capture that it yields.

    Args:
        network: the network to capture; other networks that run inside are not captured.
        probabilities: whether to capture the probabilities of the attention layer at a path:
            [B, heads, L, M] float32, the softmax over M.
        maxima: whether to capture maxima, float32 scalars. An attention layer's is its largest
            logit (the softmax's argument). A residual or transformer block's, and a change of
            resolution's, is the largest absolute value of its output.

    Raises:
        ValueError: at the first block that is rematerialised: arrays cannot leave it.
    """

    def wants(path: str, kind: str) -> bool:
        if kind == PROBABILITIES:
            return probabilities is not None and probabilities(path)
        return maxima

    token = _capture.set(Capture(paths(network), wants))
    try:
        yield _capture.get()  # type: ignore[misc]
    finally:
        _capture.reset(token)


def offer(module: nnx.Module, kind: str, make: Callable[[], Array]) -> None:
    """Keep `make()` under the module's path, if a `capturing` wants arrays of this kind from it."""
    capture = _capture.get()
    if capture is None:
        return
    path = capture.paths.get(id(module))
    if path is not None and capture.wants(path, kind):
        capture.arrays[path] = make()


def output(module: nnx.Module, x: Array) -> Array:
    """Return x, the output of a block, and offer its largest absolute value."""
    offer(module, OUTPUT, lambda: jnp.abs(x).max().astype(jnp.float32))
    return x


def refuse_remat(remat: str) -> None:
    """Raise a ValueError within `capturing`: arrays cannot leave a block that is recomputed."""
    if _capture.get() is not None:
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
    *more: Array,
) -> dict[str, Array]:
    """The largest activations and attention logits of a UNet. Jittable.

    Logits grow before training diverges (Dehghani et al. 2023, "Scaling Vision Transformers to 22
    Billion Parameters", section 3.1); activations past 3.4e38 overflow bfloat16, 6.5e4 float16.

    Args:
        graph: the graph of `weights.abstract(UNet, config, dtype=...)`, without remat.
        params: {path: array} of the UNet alone.
        xt, timesteps, context: see `UNet.__call__`.
        more: what the network takes after them.

    Returns:
        {path: float32 scalar}, see `capturing`.
    """
    network = weights.merge(graph, params)
    with capturing(network, maxima=True) as found:
        network(xt, timesteps, context, *more)
    return found.take()
