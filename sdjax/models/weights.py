"""Models as (graphdef, flat parameters), and parameters as diffusers checkpoints.

Everywhere outside models/ the parameters of a network are one flat dict `{path: array}`, the path
being the attribute path joined by dots. Attributes bear the names of diffusers, so one rule
converts every model, with no table of names:

    kernel, scale, embedding  <->  weight       (other leaf names stay)
    kernel of 4 dimensions    HWIO <-> OIHW
    kernel of 2 dimensions    transposed

A parameter of N stacked blocks, [N, ...], is N weights; see `sdjax.models.stacked_paths`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file as _save_safetensors

from sdjax.errors import UserError
from sdjax.models import weight_checks
from sdjax.models.stacked_paths import blocks_apart, joined, shapes_apart
from sdjax.system import paths, progress, text_files
from sdjax.system.untrusted import brief, check_regular, explained

Params = dict[str, Any]

_WEIGHT_LEAVES = ("kernel", "scale", "embedding")
# Attention layers of VAEs saved before diffusers 0.12 (attention_processor.py, AttentionBlock).
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Tensors that some checkpoints carry and that are not parameters.
_BUFFERS = ("position_ids",)
# The small floats of the format, which the library reads for torch alone.
_FLOAT8: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# Of a file: SDXL's has 2,500 tensors and a header of 0.3 MB.
_MOST_HEADER = 16 * 2**20  # bytes, which take some 10 times as much memory
_MOST_FILES = 10_000  # that an index names
_MOST_PROBLEMS = 100  # that an error shows
_READ_BY_LIBRARY = frozenset("F64 F32 F16 BF16 I64 U64 I32 U32 I16 U16 I8 U8 BOOL C64".split())


class WeightsError(UserError):
    """Weights that do not fit the model, or a weights file that cannot be read."""


class Keys:
    """The keys of `nnx.Rngs(key)`, one after the other, counted in Python.

    `nnx.Rngs` counts in an array. Under tracing each look at it walks all that was traced before,
    which for SDXL takes a minute.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def split(model: nnx.Module) -> tuple[Any, Params]:
    """A model as (graphdef, {path: array}). The graphdef is hashable and holds no arrays."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def merge(graphdef: Any, params: Mapping[str, Any]) -> Any:
    """The model of `split`, over the given parameters. Costs no copy; meant for inside jit."""
    tree: dict[Any, Any] = {}
    for name, value in params.items():
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(int(part) if part.isdigit() else part, {})
        node[leaf] = value
    return nnx.merge(graphdef, nnx.State(tree))


def abstract(model_cls: Any, config: Any, **kw: Any) -> tuple[Any, Params]:
    """(graphdef, {path: jax.ShapeDtypeStruct}) of `model_cls(config, **kw)`, without memory."""
    graph, params = _abstract(model_cls, config, tuple(sorted(kw.items())))
    return graph, dict(params)


@functools.lru_cache(maxsize=16)  # a start asks for each network several times
def _abstract(model_cls: Any, config: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    def make() -> Any:
        return model_cls(config, rngs=Keys(jax.random.key(0)), **dict(options))

    return split(nnx.eval_shape(make))


def init(model_cls: Any, config: Any, key: jax.Array, **kw: Any) -> Params:
    """Freshly drawn parameters of `model_cls(config, **kw)`; may run inside jit."""
    return split(model_cls(config, rngs=Keys(key), **kw))[1]


def to_diffusers(params: Mapping[str, Any], *, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters under the names and in the layouts of diffusers/transformers.

    Args:
        params: `{path: array}` of one component.
        prefix: put before each name, e.g. "text_model." for CLIP text encoders.
    """
    tensors = {}
    for path, value in blocks_apart(params):
        array = np.asarray(value)
        array = np.asarray(array.transpose(_to_torch_axes(path, array.ndim)), order="C")
        tensors[prefix + weight_name(path)] = array
    return tensors


def from_diffusers(
    tensors: Mapping[str, Any],
    abstract_params: Mapping[str, Any],
    *,
    spell: Callable[[str], str] = lambda name: name,
) -> Params:
    """The inverse of `to_diffusers`, checked against the model.

    Reads CLIP names with and without `text_model.` and the attention names of old VAEs.

    Args:
        tensors: `{name: array}` of a checkpoint.
        abstract_params: `{path: shape and dtype}` of the model, from `abstract`.
        spell: gives the name that a weight has in the user's file, for messages.

    Returns:
        `{path: np.ndarray}` in the dtypes of `abstract_params`, in its order.

    Raises:
        WeightsError: listing all weights that are missing, unused, mis-shaped or no floats; or
            those that are NaN or Inf.
    """
    expected = shapes_apart(abstract_params)
    names = {weight_name(path): path for path in expected}
    shapes = tensor_shapes(expected)
    found: Params = {}
    problems = []
    for name, tensor in tensors.items():
        path = names.get(name) or names.get(_modern_name(name))
        if path is None:
            if name.rsplit(".", 1)[-1] not in _BUFFERS:
                problems.append(f"unused: {spell(name)} {tuple(np.shape(tensor))}")
            continue
        if path in found:
            problems.append(f"twice: {spell(name)}, present under another spelling as well")
            continue
        array = np.asarray(tensor)
        if array.shape != (wanted := shapes[weight_name(path)]):
            problems.append(f"mis-shaped: {spell(name)} is {array.shape}, the model has {wanted}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"no floats: {spell(name)} is {array.dtype}; {weight_checks.PLAIN}")
        found[path] = array
    problems += [f"missing: {spell(name)}" for name, path in names.items() if path not in found]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = sorted(problems)[:_MOST_PROBLEMS] + ([f"and {more:,} more"] if more > 0 else [])
        raise WeightsError(
            "the weights do not fit the model (does its config belong to them?):\n  "
            + "\n  ".join(shown)
        )
    parts = {path: _to_jax(path, found.pop(path), want) for path, want in expected.items()}
    check_finite(parts, spell=lambda path: spell(weight_name(path)))
    return {path: joined(parts, path) for path in abstract_params}


def tensor_shapes(abstract_params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the weights that `to_diffusers` makes of a network's parameters."""
    shapes = {}
    for path, want in shapes_apart(abstract_params).items():
        axes = _to_torch_axes(path, len(want.shape))
        shapes[weight_name(path)] = tuple(want.shape[axis] for axis in axes)
    return shapes


def check_finite(
    params: Mapping[str, np.ndarray], *, spell: Callable[[str], str] = lambda path: path
) -> None:
    """Checks that no value is NaN or Inf.

    Args:
        params: `{path: array}`.
        spell: gives the name that an array has in the user's file.

    Raises:
        WeightsError: naming the arrays that have some, and how many.
    """
    lines = [
        weight_checks.describe(spell(path), value)
        for path, value in params.items()
        if not weight_checks.is_finite(value)
    ]
    if lines:
        raise WeightsError(weight_checks.not_finite(lines, len(params)))


def save_file(
    tensors: Mapping[str, Any],
    path: paths.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file, complete or not at all.

    Args:
        metadata: into its header; by default the "format" that transformers insists on. One entry:
            safetensors writes several in any order.

    Raises:
        WriteError: it cannot be written; nothing is left behind under `path`.
    """
    arrays = {name: np.asarray(t, order="C") for name, t in tensors.items()}
    size = sum(array.nbytes for array in arrays.values())
    shown = progress.work(f"writing {_short(path)}", size, poll=progress.bytes_written())
    with paths.writing(path) as local, shown:
        _save_safetensors(arrays, local, metadata=dict(metadata or {"format": "pt"}))


def load_file(
    path: paths.PathLike, *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """Reads a safetensors file, or all the shards that a `*.safetensors.index.json` names.

    Args:
        path: the file.
        wanted: which tensors to read, by name; all by default.

    Returns:
        `{name: array}`; bfloat16 and float8 as those of ml_dtypes.

    Raises:
        WeightsError: naming the files that are absent, cannot be read or hold quantised weights,
            and what to do.
    """
    path = paths.to_path(path)
    # Also "X.safetensors.index.fp16.json".
    files = index_files(path) if path.suffix == ".json" else [path]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise WeightsError(
            f"no such weights file: {', '.join(absent)}: download it, or fix the path"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        with _opened(file) as (local, opened):
            names = [key for key in opened.keys() if wanted(key)]
            if problem := weight_checks.quantised(names):
                raise WeightsError(f"{file}: {problem}")
            tensors |= _read_tensors(file, local, opened, names)
    return tensors


def index_files(index: paths.Path) -> list[paths.Path]:
    """Return the files of weights that a `*.safetensors.index.json` names, which are beside it.

    Raises:
        WeightsError: it is no such index, or names anything but plain files.
    """
    with explained(index, "a safetensors index", error=WeightsError):
        content = text_files.read_json(index)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict):
            raise WeightsError(f"{index}: weight_map is {brief(names)}; expected {{weight: file}}")
        for weight, name in names.items():
            # Nothing outside the folder, and nothing below it either.
            plain = isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)
            if not plain:
                raise WeightsError(
                    f"{index}: weight_map[{brief(weight)}] is {brief(name)}; expected the name of "
                    "a .safetensors file beside it"
                )
        files = sorted(set(names.values()))
        if len(files) > _MOST_FILES:
            raise WeightsError(f"{index}: {len(files):,} files; expected at most {_MOST_FILES:,}")
    return [index.parent / name for name in files]


@contextmanager
def _opened(file: paths.Path) -> Iterator[tuple[Any, Any]]:
    """(local path, open safetensors file). Its damage is a WeightsError, there and within."""
    again = "download or export it again"
    with explained(file, "a whole safetensors file", error=WeightsError, remedy=again):
        if note := text_files.pointer_note(file):
            raise WeightsError(f"{file}: {note}")
        with paths.reading(file) as local:
            with open(local, "rb") as start:
                length = int.from_bytes(start.read(8), "little")
            if length > _MOST_HEADER and length < check_regular(local):
                raise WeightsError(
                    f"{file}: its header has {length:,} bytes; expected at most {_MOST_HEADER:,}"
                )
            with safe_open(local, framework="numpy") as opened:
                yield local, opened


def _read_tensors(
    file: Any, local: Any, opened: Any, names: Iterable[str]
) -> dict[str, np.ndarray]:
    """{name: array} of some tensors of an open file."""
    slices = {name: opened.get_slice(name) for name in names}
    kinds = {name: part.get_dtype() for name, part in slices.items()}
    sizes = {name: math.prod(part.get_shape()) for name, part in slices.items()}
    for name, kind in kinds.items():
        if kind not in _FLOAT8 and kind not in _READ_BY_LIBRARY:
            raise WeightsError(f"{file}: {name} is stored as {kind}; {weight_checks.PLAIN}")
    small = _read_float8(local, {n: _FLOAT8[kind] for n, kind in kinds.items() if kind in _FLOAT8})
    found: dict[str, np.ndarray] = {}
    with progress.work(f"reading {_short(file)}", sum(sizes.values())) as work:
        for name, size in sizes.items():
            found[name] = small[name] if name in small else opened.get_tensor(name)
            work.advance(size)
    return found


def _read_float8(local: Any, dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name: array} of tensors of one byte a number, of a file that the library found whole.

    The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the length n of the
    header, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors.
    """
    if not dtypes:
        return {}
    found = {}
    with open(local, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, dtype in dtypes.items():
            shape, (begin, _) = header[name]["shape"], header[name]["data_offsets"]
            file.seek(8 + length + begin)
            found[name] = np.fromfile(file, np.uint8, math.prod(shape)).view(dtype).reshape(shape)
    return found


def read_header(path: paths.PathLike) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """({name: shape}, metadata) of one safetensors file, without reading its tensors.

    Raises:
        WeightsError: the file is absent or cannot be read.
    """
    path = paths.to_path(path)
    if not path.is_file():
        raise WeightsError(f"no such weights file: {path}: download it, or fix the path")
    with _opened(path) as (_, opened):
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        return shapes, opened.metadata() or {}


def _short(path: paths.PathLike) -> str:
    """The last two parts of a path, as "unet/model.safetensors"."""
    return "/".join(paths.to_path(path).parts[-2:])


def weight_name(path: str) -> str:
    """The diffusers name of a parameter path, e.g. `conv_in.kernel` -> `conv_in.weight`."""
    stem, _, leaf = path.rpartition(".")
    leaf = "weight" if leaf in _WEIGHT_LEAVES else leaf
    return f"{stem}.{leaf}" if stem else leaf


def _modern_name(name: str) -> str:
    """The present spelling of a name from an older or a transformers 4 checkpoint."""
    parts = name.removeprefix("text_model.").split(".")
    if len(parts) > 2 and "attentions" in parts:
        parts[-2] = _LEGACY_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)


def _to_torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """How to transpose a parameter of ours into torch's layout."""
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim] if path.endswith(".kernel") else tuple(range(ndim))


def _to_jax(path: str, array: np.ndarray, want: Any) -> np.ndarray:
    array = array.transpose(np.argsort(_to_torch_axes(path, array.ndim)))
    if array.dtype.itemsize == 1:  # float8: looking its 256 values up is four times as fast
        table = np.arange(256, dtype=np.uint8).view(array.dtype).astype(want.dtype)
        return np.asarray(np.take(table, np.asarray(array.view(np.uint8), order="C")))
    with np.errstate(over="ignore"):  # float64 beyond float32 is Inf, which `check_finite` tells
        return np.asarray(array, dtype=want.dtype, order="C")
