"""Intermediate arrays of a network, for a caller that asks for them.

The networks offer arrays inside them (`output`, `offer`), each under the path of its module, which
is that of diffusers. Outside `capturing` an offer does nothing: the traced program is the same to
the last operation.

    with capturing(unet, probabilities=lambda path: path.endswith("attn2")) as found:
        out = unet(xt, t, context)
    probabilities = found.take()  # {path: [B, heads, L, M]}

A captured array belongs to its trace, like every traced array. The body of a `lax.scan` must call
`take` itself, and return the arrays: `stacking.Blocks` does so by `within` and `keep`, and each of
its blocks shows its own arrays, `transformer_blocks.3.attn`. What runs in a branch shows nothing.
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
from sdjax.models.stacked_paths import block_paths

Array = jax.Array
PROBABILITIES, LOGITS, OUTPUT = KINDS = "probabilities", "logits", "output"


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
            resolution's, is the largest absolute value of its outputs.

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


def joined(path: str, inner: str) -> str:
    """Return the path of a module within the module at `path`; "" is that module itself."""
    return ".".join(filter(None, (path, inner)))


def offer(module: nnx.Module, kind: str, make: Callable[[], Array]) -> None:
    """Keep `make()` under the module's path, if a `capturing` wants arrays of this kind from it."""
    capture = _capture.get()
    if capture is None:
        return
    path = capture.paths.get(id(module))
    if path is not None and capture.wants(path, kind):
        capture.arrays[path] = make()


def output(module: nnx.Module, x: Array, *others: Array) -> Array:
    """Return x, the output of a block, and offer the largest absolute value of all its outputs."""
    every = (x, *others)
    largest = lambda: jnp.stack([jnp.abs(y).max() for y in every]).max()  # noqa: E731
    offer(module, OUTPUT, lambda: largest().astype(jnp.float32))
    return x


@contextlib.contextmanager
def within(stack: nnx.Module, block: nnx.Module) -> Iterator[Capture | None]:
    """A context in which a block of stacked ones is captured; yields None where the stack is not.

    Args:
        stack: the module whose parameters have a first axis for the blocks.
        block: one of them, in the body of the scan.
    """
    capture = _capture.get()
    path = None if capture is None else capture.paths.get(id(stack))
    if capture is None or path is None:
        yield None
        return

    def wants(inner: str, kind: str) -> bool:
        return any(capture.wants(name, kind) for name in block_paths(joined(path, inner)))

    token = _capture.set(Capture(paths(block), wants))
    try:
        yield _capture.get()
    finally:
        _capture.reset(token)


def keep(stack: nnx.Module, arrays: Mapping[str, Array]) -> None:
    """Keep what the blocks of a stack have shown, {path in a block: [N, ...]}, block by block."""
    capture = _capture.get()
    if capture is not None and arrays:
        for inner, stacked in arrays.items():
            names = block_paths(joined(capture.paths[id(stack)], inner))
            for name, array in zip(names, stacked, strict=True):
                if any(capture.wants(name, kind) for kind in KINDS):
                    capture.arrays[name] = array


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """A context in which nothing is captured."""
    token = _capture.set(None)
    try:
        yield
    finally:
        _capture.reset(token)


def refuse_remat(remat: str) -> None:
    """Raise a ValueError within `capturing`: arrays cannot leave a block that is recomputed."""
    if _capture.get() is not None:
        raise ValueError(
            f"remat = {remat!r}: nothing can be captured of a network that is rematerialised; "
            "build it with remat = 'none', its parameters are the same"
        )


def maxima(graph: Any, params: Mapping[str, Array], *given: Any) -> dict[str, Array]:
    """The largest activations and attention logits of a network. Jittable.

    Logits grow before training diverges (Dehghani et al. 2023, "Scaling Vision Transformers to 22
    Billion Parameters", section 3.1); activations past 3.4e38 overflow bfloat16, 6.5e4 float16.

    Args:
        graph: the graph of `weights.abstract(UNet, config, dtype=...)`, without remat.
        params: {path: array} of the network alone.
        given: what it is called with; a denoiser with xt, timesteps and context.

    Returns:
        {path: float32 scalar}, see `capturing`.
    """
    network = weights.merge(graph, params)
    with capturing(network, maxima=True) as found:
        network(*given)
    return found.take()
