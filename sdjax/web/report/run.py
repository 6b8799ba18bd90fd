"""The facts of a run, from the files of its workdir alone."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sdjax.system import paths, text_files, untrusted
from sdjax.system.untrusted import MOST_JSON, is_number
from sdjax.web.report.metrics import Metrics

Config = Mapping[str, Any]
PACKAGES = ("sdjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of values in the newest checkpoint, frozen.safetensors and frozen.json.

    trained, frozen: {network: parameters}. state: {part of the train state: values}.
    """

    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    state: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir, and what its files say of the run.

    config: {} if config.json is not there. checkpoints: their steps, rising. rollbacks: the spikes
    after which the run went back, as rollbacks.json lists them.
    """

    workdir: paths.Path
    config: Config
    sizes: Sizes
    checkpoints: tuple[int, ...]
    rollbacks: tuple[Mapping[str, Any], ...] = ()

    def field(self, name: str, default: Any = None) -> Any:
        """Return a field of the configuration, such as data.batch_size, which may be missing."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def best(self) -> tuple[str, str]:
        """Name of the metric that the best checkpoint is kept by, and "min" or "max"."""
        profiles = self.field("ema.profiles") or ["raw"]
        name = self.field("validation.metric") or f"validation/{profiles[0]}/loss"
        return name, self.field("validation.mode", "min")


def read_run(workdir: paths.PathLike) -> Run:
    """Read config.json, and what the files say of their sizes.

    Raises:
        OSError, ValueError: a file that is there cannot be read.
    """
    folder = paths.to_path(workdir)
    config: Any = {}
    if (folder / "config.json").exists():
        config = text_files.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is no JSON object")
    checkpoints = _checkpoints(folder)
    file = folder / "rollbacks.json"
    rollbacks = text_files.read_json(file) if file.exists() else []
    return Run(folder, config, _sizes(folder, checkpoints), checkpoints, tuple(rollbacks))


def _checkpoints(folder: paths.Path) -> tuple[int, ...]:
    within = folder / "checkpoints"
    if not within.exists():
        return ()
    steps = (int(path.name) for path in within.iterdir() if is_number(path.name))
    return tuple(sorted(step for step in steps if _metadata(folder, step).exists()))


def _metadata(folder: paths.Path, step: int) -> paths.Path:
    return folder / "checkpoints" / str(step) / "state" / "_METADATA"


def _sizes(folder: paths.Path, checkpoints: tuple[int, ...]) -> Sizes:
    """Read the sizes from the table of contents of the newest checkpoint, which Orbax writes as
    JSON, the header of the safetensors file, and references: nothing is restored."""
    trained: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    state: Counter[str] = Counter()
    if checkpoints:
        tree = json.loads(text_files.read_text(_metadata(folder, checkpoints[-1])))["tree_metadata"]
        for leaf in tree.values():
            keys = [str(part["key"]) for part in leaf["key_metadata"]]
            shape = leaf["value_metadata"].get("write_shape")
            if shape is None:
                continue  # numpy arrays, of sdjax.convert, are listed without
            size = math.prod(shape)
            part = f"EMA {keys[1]}" if keys[0] == "ema" else keys[0]
            state[part] += size
            if keys[0] == "params":
                trained[keys[1].split(".")[0]] += size
    file = folder / "frozen.safetensors"
    if file.exists():
        for path, shape in _safetensors_shapes(file).items():
            frozen[path.split(".")[0]] += math.prod(shape)
    if (elsewhere := folder / "frozen.json").exists():
        for name, reference in text_files.read_json(elsewhere).items():
            frozen[name] += int(reference["parameters"])
    return Sizes(trained, frozen, state)


def _safetensors_shapes(file: paths.Path) -> dict[str, list[int]]:
    """Return {path: shape}: the file begins with the length of its header, which is JSON."""
    untrusted.check_regular(file)
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > MOST_JSON:
            raise ValueError(f"{file.name} has a header of {length:,} bytes")
        header = json.loads(opened.read(length))
    return {path: entry["shape"] for path, entry in header.items() if path != "__metadata__"}


def count(number: int) -> str:
    """Return a number in short, as `865.91 M` or `1.2 k`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def summary(run: Run, metrics: Metrics) -> list[tuple[str, str]]:
    """Return what was trained and on what, as (name, text), as far as it is known."""
    rows = [
        ("Method", str(run.field("method.name", ""))),
        ("Networks", _networks(run)),
        ("Started from", _origin(run)),
        ("Data", _data(run, metrics)),
        ("Resolution", _resolution(run)),
        ("Batch", _batch(run)),
        ("Progress", _progress(run, metrics)),
        ("Objective", _objective(run)),
        ("Optimizer", _optimizer(run)),
        ("Learning rate", _schedule(run)),
        ("EMA", ", ".join(run.field("ema.profiles") or []) or "none"),
        ("Precision", _precision(run)),
        ("Seed", str(run.field("seed", ""))),
        ("Checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints)),
    ]
    if not run.config:
        rows = [row for row in rows if row[0] in ("Networks", "Progress", "Checkpoints")]
    return [(name, text) for name, text in rows if text]


def _networks(run: Run) -> str:
    found = []
    for name in dict.fromkeys([*run.sizes.trained, *run.sizes.frozen]):
        trained, frozen = run.sizes.trained.get(name, 0), run.sizes.frozen.get(name, 0)
        parts = [f"{count(trained)} trained"] if trained else []
        parts += [f"{count(frozen)} frozen"] if frozen else []
        found.append(f"{name} ({', '.join(parts)})")
    if found or not run.config:
        return ", ".join(found)
    groups = {name for name, value in run.field("model", {}).items() if isinstance(value, Mapping)}
    names = ["vae"] if _is_autoencoder(run) else sorted(groups)
    return ", ".join(name for name in names if name in groups)


def _is_autoencoder(run: Run) -> bool:
    return run.field("method.name") == "autoencoder"


def _origin(run: Run) -> str:
    fields = {"init_from": "all networks", "vae_from": "VAE", "text_encoder_from": "text encoder"}
    found = [f"{what}: {run.field(name)}" for name, what in fields.items() if run.field(name)]
    return ", ".join(found) or "nothing: random weights"


def _data(run: Run, metrics: Metrics) -> str:
    parts = run.field("data.mixture") or [run.field("data", {})]
    names = []
    for part in parts:
        path = part.get("path") if isinstance(part, Mapping) else ""
        names.append(f"{part.get('name', '')}{f' in {path}' if path else ''}")
    text = " + ".join(names) + f", split {run.field('data.split')}"
    epoch, seen = metrics.get("train/epoch"), metrics.get("train/images_seen")
    if epoch and seen and epoch.last and seen.last:
        text += f", {seen.last / epoch.last:,.0f} examples"
    return text


def _resolution(run: Run) -> str:
    side = run.field("data.resolution")
    if run.field("data.buckets.step"):
        return f"about {side} x {side}, in buckets of several aspect ratios"
    flip = ", mirrored at random" if run.field("data.flip") else ""
    return f"{side} x {side}, {run.field('data.crop')} crop{flip}"


def _batch(run: Run) -> str:
    parts = run.field("train.accumulation", 1)
    split = f", in {parts} parts" if parts > 1 else ""
    return f"{run.field('data.batch_size')} images over all devices{split}"


def _progress(run: Run, metrics: Metrics) -> str:
    done, total = metrics.last_step, run.field("train.steps")
    text = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    seen, epoch = metrics.get("train/images_seen"), metrics.get("train/epoch")
    if seen and seen.last:
        text += f", {seen.last:,.0f} images"
    return text + (f", {epoch.last:.3g} epochs" if epoch and epoch.last else "")


def _objective(run: Run) -> str:
    if _is_autoencoder(run):
        return f"{run.field('method.loss')} + {run.field('method.kl_weight')} KL"
    zero = ", zero terminal SNR" if run.field("schedule.zero_terminal_snr") else ""
    return (
        f"{run.field('objective.prediction_type')}, weighting {run.field('objective.weighting')}, "
        f"{run.field('schedule.kind')} noise schedule of "
        f"{run.field('schedule.num_train_timesteps')} steps{zero}"
    )


def _optimizer(run: Run) -> str:
    optim = run.field("optim", {})
    text = f"{optim.get('name')}, b1 {optim.get('b1')}, b2 {optim.get('b2')}"
    text += f", weight decay {optim.get('weight_decay')}"
    clip = optim.get("clip_norm")
    return text + (f", gradients clipped at norm {clip}" if clip else "")


def _schedule(run: Run) -> str:
    warmup = run.field("optim.warmup_steps")
    after = f" after {warmup:,} steps of warm-up" if warmup else ""
    return f"{run.field('optim.learning_rate')}, {run.field('optim.schedule')}{after}"


def _precision(run: Run) -> str:
    dtype = run.field("model.dtype", "float32")
    return dtype if dtype == "float32" else f"computes in {dtype}, keeps everything in float32"


def recipe(run: Run) -> str:
    """Return a recipe that `sdjax.main` runs: the fields of config.json that are not defaults."""
    from sdjax import recipes

    return recipes.recipe(run.config, "Made by sdjax.report from the configuration of a run.")


def versions() -> dict[str, str]:
    """Return the versions of the packages that train, where the report is written."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
