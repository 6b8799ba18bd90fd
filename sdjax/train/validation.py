"""The loss on a fixed choice of examples, at fixed timesteps and with fixed noise.

The same to the bit on every mesh: each device computes whole groups of `rows` examples with whole
copies of the parameters, by a program in which no other device has a part, and the means are taken
on the host in float64, in the order of the examples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.config import Config
from sdjax.data.fixed import FixedExamples, Group
from sdjax.data.pipeline import CaptionTokenizer
from sdjax.methods.method import Method
from sdjax.models.config import ConfigError
from sdjax.models.params import Params
from sdjax.parallel.mesh import AXES
from sdjax.parallel.sharding import to_host
from sdjax.system import progress


class Validator:
    """Losses of fixed examples of a split.

    Args:
        tokenizers: by the field of the batch that each fills.
        mesh: whose devices share the work; on several hosts all must make and call it alike.
        split, count: which examples, see `FixedExamples`.

    Raises:
        UserError: the dataset has no such split, or it is empty.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        tokenizers: Mapping[str, CaptionTokenizer],
        mesh: Mesh,
        *,
        split: str,
        count: int,
    ):
        self.timesteps = method.timesteps(config.validation.strata)
        self.examples = FixedExamples(
            config.data,
            tokenizers,
            split=split,
            count=count,
            rows=config.validation.rows,
            number_shapes=method.numbers,
        )
        if not len(self.examples):
            raise ConfigError(
                f"data split {split!r} has no examples to validate on; set data.eval_split, "
                "data.validation_share or config.validation.examples = 0"
            )
        self._mesh, self._threads = mesh, max(1, config.data.threads)
        self._program = _make_program(method, mesh, self.timesteps)

        @jax.jit
        def largest(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            assert method.maxima is not None, "the configuration refuses maxima for this method"
            return method.maxima(params, _fields(batch), _keys(batch["name"]), self.timesteps)

        self._maxima = largest

    def losses(self, params: Params) -> np.ndarray:
        """Float32 [N, n]: each example's loss at each of the n `timesteps`, on every host.

        An autoencoder has no timesteps and one column. Examples are in the order of
        `examples.groups`.

        Args:
            params: {path: array} of every network, placed in any way.
        """
        whole = replicate(params, self._mesh)
        found: list[np.ndarray] = []
        pending: list[tuple[list[Group], jax.Array]] = []

        def take() -> None:
            groups, out = pending.pop(0)
            rows = to_host(out).reshape(self._mesh.size, self.examples.rows, -1)
            found.extend(rows[slot, : len(group.numbers)] for slot, group in enumerate(groups))

        shown = progress.work("validating", len(self.examples), unit="examples")
        with shown as work, ThreadPoolExecutor(self._threads) as executor:
            for groups in _in_rounds(self.examples.groups, self._mesh.size):
                # Read while the devices are at the round before.
                pending.append((groups, self._program(whole, self._round(groups, executor))))
                work.advance(sum(len(group.numbers) for group in groups))
                if len(pending) > 1:
                    take()
            while pending:
                take()
        return np.concatenate(found)

    def maxima(self, params: Params) -> dict[str, float]:
        """{path: value} of the first group of examples, see `Method.maxima`. All hosts call it."""
        with ThreadPoolExecutor(self._threads) as executor:
            batch = self.examples.read(self.examples.groups[0], executor)
        whole = NamedSharding(self._mesh, P())
        found = self._maxima(replicate(params, self._mesh), jax.device_put(batch, whole))
        return {path: float(value) for path, value in found.items()}

    def _round(self, groups: list[Group], executor: ThreadPoolExecutor) -> dict[str, jax.Array]:
        """A group for each device; this host reads those of its own."""
        sharding, rows = NamedSharding(self._mesh, P(AXES)), self.examples.rows
        read = functools.lru_cache(maxsize=None)(
            lambda slot: self.examples.read(groups[min(slot, len(groups) - 1)], executor)
        )
        here = jax.process_index()
        first = next(i for i, d in enumerate(self._mesh.devices.flat) if d.process_index == here)

        def whole(field: str) -> jax.Array:
            shape = (self._mesh.size * rows, *read(first)[field].shape[1:])

            def fetch(at: Any) -> np.ndarray:
                return read((at[0].start or 0) // rows)[field]

            return jax.make_array_from_callback(shape, sharding, fetch)

        return {field: whole(field) for field in read(first)}


def _in_rounds(groups: list[Group], size: int) -> Iterator[list[Group]]:
    """Up to `size` groups of one shape at a time."""
    for _, alike in itertools.groupby(groups, key=lambda group: group.shape):
        same = list(alike)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _make_program(
    method: Method, mesh: Mesh, timesteps: np.ndarray
) -> Callable[[Params, dict[str, jax.Array]], jax.Array]:
    """(whole parameters, batch over all axes) -> losses over all axes; jitted."""

    def on_device(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        return method.validate(params, _fields(batch), _keys(batch["name"]), timesteps)

    return jax.jit(
        jax.shard_map(
            on_device, mesh=mesh, in_specs=(P(), P(AXES)), out_specs=P(AXES), check_vma=False
        )
    )


def _fields(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the fields that the networks take."""
    return {field: value for field, value in batch.items() if field != "name"}


def _keys(names: jax.Array) -> jax.Array:
    """Keys [b] of examples (part, number) int32 [b, 2]: of nothing but which example it is."""
    root = jax.random.key(0)
    return jax.vmap(lambda name: jax.random.fold_in(jax.random.fold_in(root, name[0]), name[1]))(
        names
    )


def replicate(params: Params, mesh: Mesh) -> dict[str, jax.Array]:
    """Every device's own whole copy, gathered before the program that uses it starts."""
    whole = NamedSharding(mesh, P())
    split = {
        p: v
        for p, v in params.items()
        if isinstance(v, jax.Array) and not v.sharding.is_equivalent_to(whole, v.ndim)
    }
    return {**jax.device_put({p: v for p, v in params.items() if p not in split}, whole),
            **_gather(whole)(split)}  # fmt: skip


@functools.lru_cache(maxsize=4)
def _gather(whole: NamedSharding) -> Callable[[Params], dict[str, jax.Array]]:
    return jax.jit(lambda params: params, out_shardings=whole)


def summary(losses: np.ndarray, timesteps: np.ndarray) -> dict[str, Any]:
    """{"loss": mean, "loss_at": {"tTTTT": mean, ...}} of losses [N, n], in float64."""
    columns = losses.astype(np.float64).mean(axis=0)
    at = {f"t{int(t):04d}": float(c) for t, c in zip(timesteps, columns, strict=False)}
    return {"loss": float(columns.mean()), **({"loss_at": at} if at else {})}
