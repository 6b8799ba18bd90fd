"""From a configuration to arrays on devices: the workdir, what is trained, where it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdjax.checkpoints.assemble import Assembled, assemble, check_complete
from sdjax.checkpoints.checkpoint import latest_step
from sdjax.checkpoints.reading import locate
from sdjax.checkpoints.references import read_references
from sdjax.checkpoints.workdir import (
    CONFIG_FILE,
    read_scheduler,
    read_tokenizers,
    write_scheduler,
)
from sdjax.config import Config, resolve, to_dict
from sdjax.config_changes import compare_configs
from sdjax.config_model import model_of_run
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.data.text.tokenizer_files import TokenizerError
from sdjax.errors import UserError
from sdjax.families.conditioning import EMPTY
from sdjax.families.registry import TOKENIZERS, adopted, model_of
from sdjax.methods.method import Method
from sdjax.models import int8
from sdjax.models.config import ConfigError
from sdjax.models.params import Params, prefixed
from sdjax.parallel.sharding import param_spec
from sdjax.system import locks, paths, text_files, untrusted
from sdjax.train import frozen
from sdjax.train.captions import Encode, caption_encoder
from sdjax.train.program import Program, Split


def enable_compilation_cache(folder: str) -> None:
    """XLA's persistent cache: the second start of a run compiles nothing.

    What lies there is run. So the folder is a recipe's or this machine's, never a model's.

    Args:
        folder: "" takes $JAX_COMPILATION_CACHE_DIR, or ~/.cache/sdjax/xla.
    """
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/sdjax/xla"
    path = paths.to_path(folder or own)
    if paths.is_remote(path):
        paths.make_folder(path)  # JAX makes local ones
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Programs of a tenth of a second too: a start has several.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def locked_workdir(folder: paths.Path) -> Iterator[None]:
    """Keep other runs out of the workdir; process 0 does so for all.

    Raises:
        LockedError: another run writes there.
        ConfigError: the folder cannot be made.
    """
    if jax.process_index() != 0:
        yield
        return
    _make_workdir(folder)
    with locks.held(folder, "--workdir", "sdjax.main"):
        yield


def _make_workdir(folder: paths.Path) -> None:
    try:
        paths.make_folder(folder)
    except UserError as error:
        raise ConfigError(f"--workdir={error}") from error


def open_workdir(folder: paths.Path, config: Config) -> Config | None:
    """Make the folder, or read what ran in it before.

    Returns:
        The resolved configuration of the run to resume, None for a fresh workdir.

    Raises:
        ConfigError: the folder cannot be made, or has checkpoints and no readable config.json.
    """
    file = folder / CONFIG_FILE
    if not paths.exists(folder) or latest_step(folder) is None:
        _make_workdir(folder)  # nothing to resume, whatever else an early end has left
        return None
    try:
        return resolve(text_files.read_json(file))
    except paths.storage_errors(ValueError) as error:
        raise ConfigError(
            f"{folder} has checkpoints, but {file} cannot be read ({error}): choose another "
            "--workdir, or mend the file"
        ) from error


def load(config: Config, folder: paths.Path, saved: Config | None) -> Assembled:
    """Weights, tokenizer and the configuration that results; to resume, those of the workdir.

    Raises:
        ConfigError: the configuration differs from the workdir's in a field that breaks the run.
    """
    if saved is None:
        return assemble(config)
    config = _decided_then(config, saved)
    differences = compare_configs(to_dict(saved), to_dict(config))
    # The digest says whether what lies at another place is the same.
    movable = {reference.field for reference in read_references(folder).values()}
    breaking = [
        d for d in differences if d.breaks and not (d.field in movable and d.saved and d.current)
    ]
    if breaking:
        lines = untrusted.listed(breaking)
        raise ConfigError(
            f"{folder} holds a run with another configuration, which this one cannot continue:\n"
            f"  {lines}\nuse the same values, or another --workdir"
        )
    notes = [f"changed since the last start: {d}" for d in differences]
    model = model_of_run(config, {})
    try:
        tokenizers = read_tokenizers(folder, model)
    except (TokenizerError, OSError) as error:
        own = [model.family.parts[name].tokenizer for name in model.text_encoders]
        raise ConfigError(
            f"{folder} holds a run whose tokenizer cannot be read: {error}\nRestore "
            f"{' and '.join(str(folder / name) for name in own)} from a copy, or start in another "
            "--workdir"
        ) from error
    return Assembled(config, {}, tokenizers, tuple(notes), read_scheduler(folder))


def begin(assembled: Assembled, method: Method, saved: Config | None) -> Assembled:
    """Add to what was loaded what follows from it; a run that goes on has it all."""
    if saved is not None:
        return assembled
    brought = {name: locate(field, place) for name, (field, place) in method.brought.items()}
    return dataclasses.replace(
        assembled,
        derived=method.start(assembled.params),
        sources={**assembled.sources, **brought},
    )


def _decided_then(config: Config, saved: Config) -> Config:
    """Return the configuration with what folders, tokenizers and a VAE's end decided at first."""
    replace = dataclasses.replace
    before = model_of(saved.model)
    if saved.init_from:
        objective = replace(config.objective, prediction_type=saved.objective.prediction_type)
        config = replace(config, schedule=saved.schedule, objective=objective)
        model = adopted(config.model, before, before.networks, whole=True)
    else:
        encoders = tuple(before.text_encoders) if saved.text_encoder_from else ()
        taken = (*encoders, *(("vae",) if saved.vae_from else ()))
        model = adopted(config.model, before, taken, whole=False)
    if not (saved.init_from or saved.vae_from or saved.draws):
        vae = replace(model.vae, scaling_factor=saved.model.vae.scaling_factor)
        model = replace(model, vae=vae)
    for name, encoder in before.text_encoders.items():
        given = model.networks.get(name)
        if saved.init_from or saved.text_encoder_from or given is None:
            continue
        vocabulary = {
            field: getattr(encoder, field)
            for field in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
            if hasattr(encoder, field)
        }
        model = replace(model, **{name: replace(given, **vocabulary)})
    return replace(config, model=model)


def write_workdir(
    folder: paths.Path,
    config: Config,
    tokenizers: Mapping[str, TextTokenizer],
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Write what a workdir needs to be read, besides checkpoints and what `frozen.keep` writes.

    The config comes last.
    """
    if jax.process_index() != 0:
        return
    for field, tokenizer in tokenizers.items():
        tokenizer.save(folder / TOKENIZERS[field])
    if scheduler is not None:
        write_scheduler(folder, scheduler)
    write_config(folder, config)


def write_config(folder: paths.Path, config: Config) -> None:
    """DIR/config.json, whole or not at all."""
    if jax.process_index() != 0:
        return
    paths.write_text(folder / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")


def place_frozen(
    config: Config,
    folder: paths.Path,
    assembled: Assembled,
    method: Method,
    program: Program,
    encode_captions: Callable[[Encode], None],
    *,
    saved: Config | None,
) -> Params:
    """Everything that the step reads and does not train, on the devices.

    Text encoders that no step runs are there first, and gone when the rest comes. At a fresh start
    the workdir is written.

    Args:
        encode_captions: is given what encodes captions, where steps do not.
        saved: the configuration of the run that is resumed.
    """
    stored = method.conditioner.stored() if program.encoders and method.conditioner else {}
    own = {path: want for path, want in program.frozen.items() if path not in stored}
    if saved is None:
        wanted = own | program.encoders
        check_complete(config, assembled.every, wanted)
        loaded = int8.in_files(wanted)
        buffers = _buffers(method, [path for path in loaded if path not in assembled.every])
        assembled = dataclasses.replace(assembled, params=assembled.params | buffers)
        frozen.keep(config, folder, assembled, wanted, method.copies)
        write_workdir(folder, config, assembled.tokenizers, assembled.scheduler)

    def read(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
        if saved is not None:
            return frozen.resumed(config, folder, wanted, saved)
        return frozen.placed(assembled.every, wanted)

    if not stored:
        return read(own)
    assert method.conditioner is not None
    encode = caption_encoder(method.conditioner, read(program.encoders), program.mesh)
    encode_captions(encode)
    empty = encode({field: row[None] for field, row in method.conditioner.null.items()})
    del encode
    made = prefixed({name: rows[0] for name, rows in empty.items()}, EMPTY)
    return read(own) | frozen.placed(made, {path: program.frozen[path] for path in stored})


def _buffers(method: Method, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The buffers of networks that no folder has brought, {path: array}."""
    if not names:
        return {}
    draw = jax.jit(lambda key: {path: method.init(key)[path] for path in names})
    return {path: np.asarray(value) for path, value in draw(jax.random.key(0)).items()}


def initial_params(
    config: Config, method: Method, assembled: Assembled, split: Split, mesh: Mesh
) -> Params:
    """Trained parameters before the first step: loaded, or drawn from the seed where not."""
    loaded = {p: v for p, v in assembled.every.items() if p in split.trained}
    missing = [p for p in split.trained if p not in loaded]
    drawn: Params = {}
    if missing:
        # Under jit, so that each device draws only its shards and unused networks cost nothing.
        shardings = {p: _sharding(p, split.trained[p].shape, mesh) for p in missing}

        def draw(key: jax.Array) -> Params:
            every = method.init(key)
            return {p: every[p] for p in missing}

        # It runs once: LLVM's optimisations take longer than they save.
        once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        drawn = jax.jit(draw, out_shardings=shardings, compiler_options=once)(
            jax.random.key(config.seed)
        )
    return {
        p: drawn[p] if p in drawn else _put(p, np.asarray(loaded[p]), mesh) for p in split.trained
    }


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, param_spec(path, shape, mesh))


def _put(path: str, value: np.ndarray, mesh: Mesh) -> jax.Array:
    value = np.asarray(value, np.float32)
    return jax.make_array_from_callback(
        value.shape, _sharding(path, value.shape, mesh), lambda index: value[index]
    )
