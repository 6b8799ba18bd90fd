"""The program of a configuration: shapes, shardings and the jitted step, before any array exists.

The loop fills it with arrays, `--dry_run` prints it, and `sdjax.plan` compiles it for hardware that
is not there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.config import Config
from sdjax.data.named_images import moment_fields
from sdjax.families.registry import FAMILIES
from sdjax.methods.method import ALWAYS, Method, Phase
from sdjax.models import placement
from sdjax.models.config import ConfigError
from sdjax.models.params import Params
from sdjax.optim.optimizers import OptimConfig, make_optimizer, trainable_paths
from sdjax.parallel.activations import Activations, kernels_of
from sdjax.parallel.batches import batch_sharding, check_batch, positions
from sdjax.parallel.sharding import placed, state_shardings, train_shardings
from sdjax.parallel.xla import as_config_error, compiler_options
from sdjax.train.state import Optimization, State, init_state
from sdjax.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Split:
    """{path: ShapeDtypeStruct} of what is trained and of what is not."""

    trained: dict[str, jax.ShapeDtypeStruct]
    frozen: dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step bound to a mesh.

    state, frozen, batch: its arguments as `jax.ShapeDtypeStruct` with shardings; what is frozen is
        in the dtype that it is used in.
    encoders: the text encoders that are on the devices before the first step alone, to encode the
        captions of pictures, as `frozen` is described; empty where they stay there.
    fresh: trained parameters -> the state at step 0 (jittable).
    step: `(state, frozen, batch) -> (state, metrics)`, jitted; it donates the state.
    """

    mesh: Mesh
    split: Split
    optimizations: tuple[Optimization, ...]
    fresh: Callable[[Params], State]
    state: State
    frozen: dict[str, jax.ShapeDtypeStruct]
    encoders: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Any

    @property
    def state_shardings(self) -> Any:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def build(config: Config, method: Method, mesh: Mesh) -> Program:
    """Everything about the step that is known without an array.

    Raises:
        UserError: the batch does not spread over the mesh, nothing is left to train, or the method
            needs whole batches and gradients would be accumulated.
    """
    check_batch(config.data.batch_size, config.train.accumulation, mesh)
    if method.whole_batch and config.train.accumulation > 1:
        raise ConfigError(
            f"train.accumulation is {config.train.accumulation} with method "
            f"{config.method.name!r}; expected 1: {method.whole_batch}"
        )
    check_shapes(config)
    _check_copies(config, method)
    split = split_trainable(config, method)
    optimizations = _optimizations(config, method, split)

    def fresh(params: Params) -> State:
        return init_state(params, optimizations, config.ema, copied=bool(method.copied_at))

    abstract = jax.eval_shape(fresh, split.trained)
    shardings, update = train_shardings(abstract, split.trained, mesh, config.mesh)
    train_step = make_train_step(
        optimizations,
        positions=positions(mesh, config.data.batch_size),
        seed=config.seed,
        accumulation=config.train.accumulation,
        buckets=config.train.timestep_buckets,
        num_timesteps=config.schedule.num_train_timesteps,
        copied_at=method.copied_at,
        spread=functools.partial(_constrained, update) if update else None,
    )

    kernels = kernels_of(mesh.devices.flat[0])
    activations = Activations(mesh, kernels, config.model.attention)

    def on_mesh(state: State, frozen: Params, batch: dict) -> tuple[State, dict]:
        with placement.placed(activations):
            return train_step(state, frozen, batch)

    step = jax.jit(on_mesh, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    return Program(
        mesh=mesh,
        split=split,
        optimizations=optimizations,
        fresh=fresh,
        state=placed(abstract, shardings),
        frozen=_kept(frozen_in_step(config, method, split), method, mesh),
        encoders=_kept(_encoding_once(config, method, split), method, mesh),
        batch={
            name: jax.ShapeDtypeStruct(
                (config.data.batch_size, *one.shape), one.dtype, sharding=batch_sharding(mesh)
            )
            for name, one in method.example.items()
        },
        step=step,
    )


def _check_copies(config: Config, method: Method) -> None:
    """Check that a run takes all the copies of its method."""
    last = method.copied_at[-1] if method.copied_at else 0
    if method.copied_at and config.train.steps <= last:
        raise ConfigError(
            f"train.steps is {config.train.steps}, but the last stage of method "
            f"{config.method.name!r} begins after {last}; expected more"
        )


def frozen_in_step(config: Config, method: Method, split: Split) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {path: ShapeDtypeStruct} of what the step reads and does not train.

    Where no loss runs the text encoders, that is the empty caption's features in their place.
    """
    away = _encoding_once(config, method, split)
    if not away:
        return split.frozen
    assert method.conditioner is not None
    here = {path: value for path, value in split.frozen.items() if path not in away}
    return here | method.conditioner.stored()


def _encoding_once(config: Config, method: Method, split: Split) -> dict[str, jax.ShapeDtypeStruct]:
    """The text encoders that have all captions encoded before the first step.

    Pictures that are judged (validation.metrics) have too many captions for that.
    """
    if method.conditioner is None or config.validation.metrics:
        return {}
    own = method.conditioner.networks.abstract
    return {path: value for path, value in split.frozen.items() if path in own}


def _kept(
    frozen: Mapping[str, jax.ShapeDtypeStruct], method: Method, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of what is not trained on the devices."""
    kept = {
        path: jax.ShapeDtypeStruct(want.shape, method.dtypes.get(path, want.dtype))
        for path, want in frozen.items()
    }
    return placed(kept, state_shardings(kept, kept, mesh))


def _constrained(shardings: Mapping[str, NamedSharding], params: Params) -> Params:
    """Some parameters, or gradients, where the update of them is computed."""
    own = {path: shardings[path] for path in params}
    return jax.lax.with_sharding_constraint(params, own)


def _optimizations(config: Config, method: Method, split: Split) -> tuple[Optimization, ...]:
    """The phases of a method that have something to train, with their optimizers."""
    found = []
    for phase in method.phases:
        own = {path: value for path, value in split.trained.items() if phase.trains(path)}
        if own:
            optim = trained_groups(phase.optim or config.optim)
            optimizer = make_optimizer(
                optim,
                -(-config.train.steps // phase.every),  # the steps that the phase takes
                own,
                all_paths=split.trained,
                factors={path: phase.rate(path) for path in own},
            )
            spans = _spans(phase, own, config.train.steps)
            if spans and optim.name == "schedule_free":
                raise ConfigError(
                    f"optim.name is 'schedule_free' with method {config.method.name!r}, which "
                    "trains some parameters for a part of the run: their average would go on "
                    "moving; choose another optimizer"
                )
            found.append(Optimization(phase, optimizer, frozenset(own), spans))
    return tuple(found)


def _spans(phase: Phase, trained: Iterable[str], steps: int) -> dict[str, tuple[int, int]]:
    """See `Optimization.spans`."""
    shares = {path: phase.during(path) for path in trained}
    return {
        path: (round(begin * steps), round(end * steps))
        for path, (begin, end) in shares.items()
        if (begin, end) != ALWAYS
    }


def split_trainable(config: Config, method: Method) -> Split:
    """Trained: of what the method trains, all whose group has a learning rate above 0.

    Raises:
        ConfigError: nothing is left to train.
    """
    abstract = method.abstract
    candidates = [path for path in abstract if method.trainable(path)]
    chosen = trainable_paths(config.optim, candidates)
    trained = {p: abstract[p] for p in candidates if p in chosen}
    if not trained:
        raise ConfigError(f"config.optim.groups = {config.optim.groups!r} freezes every parameter")
    frozen = {p: v for p, v in abstract.items() if p not in trained}
    return Split(trained, frozen)


def trained_groups(optim: OptimConfig) -> OptimConfig:
    """Without the groups that freeze: what they match is not in the train state at all."""
    groups = tuple((pattern, rate) for pattern, rate in optim.groups if rate > 0)
    return dataclasses.replace(optim, groups=groups)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiled step, what the compiler says of it, and what it was told (`xla.OPTIONS`)."""

    step: Any
    seconds: float
    flops_per_image: float | None
    temporary_bytes: int | None
    argument_bytes: int | None
    options: Mapping[str, str | bool]


def check_shapes(config: Config) -> None:
    """All pictures can be halved as often as the networks do.

    Raises:
        UserError: naming the field of the side that cannot, and what it has to be a multiple of.
    """
    levels = len(config.model.vae.block_out_channels) - 1
    if config.draws:
        levels += FAMILIES[config.model.family].halvings(config.model.networks)
    sides = {"data.buckets.step": config.data.buckets.step}
    sides |= {
        f"data.mixture[{i}].resolution": p.resolution for i, p in enumerate(config.data.mixture)
    }
    for field, side in sides.items():
        if side % 2**levels:
            raise ConfigError(
                f"{field} is {side}, but the networks halve a picture {levels} times; set it to a "
                f"multiple of {2**levels}"
            )


Batch = Mapping[str, Any]  # of arrays or of jax.ShapeDtypeStruct


class Steps:
    """The step, compiled once for each shape of a batch, when the first such batch comes."""

    def __init__(self, program: Program, config: Config):
        self._program, self._config = program, config
        self._compiled: dict[Any, Compiled] = {}

    def has(self, batch: Batch) -> bool:
        """Whether calling it with such a batch compiles nothing."""
        return _shapes(batch) in self._compiled

    @contextlib.contextmanager
    def compiling(self, batch: Batch) -> Iterator[concurrent.futures.Future[Compiled]]:
        """Compile for batches such as this one in a thread, to whose end the context waits.

        Tracing comes before: it is Python's work, which would only hold up the caller's.
        """
        abstract = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
            for name, value in batch.items()
        }
        program = dataclasses.replace(self._program, batch=abstract)
        program.step.trace(program.state, program.frozen, program.batch)  # JAX keeps the result

        def compiled() -> Compiled:
            found = compile_step(program, self._config)
            self._compiled[_shapes(batch)] = found
            return found

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            yield thread.submit(compiled)

    def compile(self, batch: Batch) -> Compiled:
        """Compile for batches such as this one."""
        with self.compiling(batch) as compiled:
            return compiled.result()

    def __call__(self, state: State, frozen: Params, batch: Batch) -> tuple[State, dict]:
        return self._compiled[_shapes(batch)].step(state, frozen, batch)


def _shapes(batch: Batch) -> tuple:
    return tuple(sorted((name, value.shape) for name, value in batch.items()))


def with_pictures(
    batch: Batch, shape: tuple[int, int], downscale: int, named: Collection[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """An abstract batch with pictures of another (height, width), or the moments of such.

    named: names of pictures besides the main one.
    """
    small = shape[0] // downscale, shape[1] // downscale
    sizes = dict.fromkeys(("image", *named), shape) | dict.fromkeys(moment_fields(named), small)
    return {
        name: _resized(value, *sizes[name]) if name in sizes else value
        for name, value in batch.items()
    }


def _resized(array: jax.ShapeDtypeStruct, height: int, width: int) -> jax.ShapeDtypeStruct:
    shape = (array.shape[0], height, width, array.shape[-1])
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding)


def compile_step(program: Program, config: Config) -> Compiled:
    """Compile ahead of the first batch, for the devices of the program's mesh.

    Raises:
        ConfigError: XLA does not take one of `train.xla_options`.
    """
    begin = time.monotonic()
    lowered = program.step.lower(program.state, program.frozen, program.batch)
    own = config.train.xla_options
    options = compiler_options(program.mesh, own)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise as_config_error(error, own) or error from error
    seconds = time.monotonic() - begin
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = cost.get("flops") if isinstance(cost, dict) else None
    # XLA counts the loop over micro-batches once, and per device.
    scale = config.train.accumulation * program.mesh.size / config.data.batch_size
    return Compiled(
        compiled,
        seconds,
        flops * scale if flops else None,
        getattr(memory, "temp_size_in_bytes", None),
        getattr(memory, "argument_size_in_bytes", None),
        options,
    )
