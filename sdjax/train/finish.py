"""The end of a run: what came out, where it is, and what to run next."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.assemble import Assembled
from sdjax.checkpoints.workdir import frozen_params
from sdjax.config import Config
from sdjax.config_model import model_of_run
from sdjax.data.builders.shape_reader import score
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.formats.folders import ModelError
from sdjax.methods.method import Method
from sdjax.methods.registry import METHODS
from sdjax.models.params import Params
from sdjax.parallel.sharding import to_host
from sdjax.system import paths
from sdjax.train.gallery import read_examples
from sdjax.train.hooks import REPORT_FILE
from sdjax.train.monitoring.telemetry import Telemetry
from sdjax.train.observers import Observers
from sdjax.train.selection import Selection
from sdjax.train.startup import write_config
from sdjax.train.state import State
from sdjax.train.weight_sets import evaluated_params


def finish(
    config: Config,
    method: Method,
    assembled: Assembled,
    state: State,
    frozen: Params,
    observers: Observers,
    telemetry: Telemetry,
    folder: paths.Path,
) -> bool:
    """Last pictures, score, diffusers folder, and the last screen; whether pictures are finite."""
    step = int(state["step"])
    picture = observers.draw(step, state, frozen, telemetry)
    trained = evaluated_params(state, config.ema.profiles)
    params = {**frozen, **trained}
    score_line, finite = "", picture is not None
    try:
        if finite:
            score_line = _fidelity(config, method, assembled, params, telemetry, step)
    except FloatingPointError as error:
        telemetry.message(f"pictures of held-out prompts cannot be read back: {error}")
        finite = False
    exported: Mapping[str, paths.Path | str] = {}
    # What follows from the weights, as the scale of latents, would be NaN too.
    if config.train.export and (finite or method.adjust is None):
        if method.export is None:
            exported = export(config, method, assembled, params, folder, telemetry)
        else:
            own = _on_first(trained)
            if jax.process_index() == 0:
                exported = method.export(model_of_run(config, assembled.tokenizers), own, folder)
    observers.report(telemetry)
    telemetry.close()
    if jax.process_index() == 0:
        print(last_screen(config, folder, picture, exported, score_line, step, observers.selection))
    return finite


def _fidelity(
    config: Config,
    method: Method,
    assembled: Assembled,
    params: Params,
    telemetry: Telemetry,
    step: int,
) -> str:
    """Held-out prompts of captioned_shapes, read back from the pictures."""
    if not config.sample.fidelity:
        return ""
    examples = read_examples(config, assembled.tokenizers, config.sample.fidelity)
    images = method.pictures(params, examples, config.seed + 1)
    shares = score(examples.captions, images)
    shares.pop("samples")
    telemetry.scalars(step, {"fidelity": shares})
    parts = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares.items())
    return f"{len(images)} pictures of held-out prompts read back: {parts}"


def export(
    config: Config,
    method: Method,
    assembled: Assembled,
    params: Params,
    folder: paths.Path,
    telemetry: Telemetry,
) -> dict[str, paths.Path | str]:
    """Write DIR/diffusers, a pipeline or the one folder of a network; {"diffusers": it}, or {}.

    Where the frozen networks are gone, that is only told: the run has its checkpoints.
    """
    path = folder / "diffusers"
    own = model_of_run(config, {}).networks  # without copies, and networks of the method's own
    here = [path for path in method.abstract if path.split(".")[0] in own]
    away = [path for path in here if path not in params]  # text encoders that no step runs
    params = {path: params[path] for path in here if path in params}
    host = _on_first({p: v for p, v in params.items() if v.dtype == np.float32})
    if method.adjust is not None:

        def images(count: int) -> np.ndarray:
            return read_examples(config, {}, count).images

        config = dataclasses.replace(config, model=method.adjust(config.model, params, images))
        write_config(folder, config)  # who starts from this workdir needs what was set too
    if jax.process_index() != 0:
        return {}
    try:
        host |= _from_workdir(config, params, away, folder)
    except ModelError as error:
        telemetry.message(f"no diffusers folder is written: {error}")
        return {}
    model = model_of_run(config, assembled.tokenizers, host, assembled.scheduler)
    if not model.networks:
        return {}
    write_diffusers(path, model, overwrite=True)
    return {"diffusers": path}


def _from_workdir(
    config: Config, params: Params, away: Sequence[str], folder: paths.Path
) -> dict[str, np.ndarray]:
    """The float32 values of frozen parameters that the devices have in another dtype, or lack.

    Args:
        away: paths of those that they lack.
    """
    wanted = [*away, *(path for path, value in params.items() if value.dtype != np.float32)]
    if not wanted:
        return {}
    whole = frozen_params(folder, model_of_run(config, {}))
    return {path: whole[path] for path in wanted}


def _on_first(params: Params) -> dict[str, np.ndarray]:
    """Whole parameters on process 0, which writes them; the others keep nothing."""
    kept = {}
    for path, value in params.items():
        whole = to_host(value)
        if jax.process_index() == 0:
            kept[path] = whole
    return kept


def last_screen(
    config: Config,
    folder: paths.Path,
    picture: paths.Path | None,
    exported: Mapping[str, paths.Path | str],
    score_line: str,
    step: int,
    selection: Selection,
) -> str:
    """Where everything is and what to run next."""
    here = Path(sys.executable)
    inside = here.is_relative_to(Path.cwd())  # a virtual environment that need not be activated
    python = str(here.relative_to(Path.cwd())) if inside else "python"
    rows: list[tuple[str, Any]] = [
        ("pictures", picture or "none: they have NaN pixels, see above"),
        *([("report", folder / REPORT_FILE)] if config.train.report else []),
        ("metrics", folder / "metrics.jsonl"),
        ("TensorBoard", shlex.join([python, "-m", "tensorboard.main", f"--logdir={folder}"])),
        ("checkpoints", folder / "checkpoints"),
    ]
    if selection.step is not None:
        best = folder / "checkpoints" / str(selection.step)
        rows.append(("best", f"{best}  ({selection.metric} {selection.value:.4f})"))
    rows += exported.items()
    if config.draws:
        prompt = "a large red circle above a small blue square"
        if config.data.name != "captioned_shapes":
            prompt = "..."
        steers = METHODS[config.method.name].steers
        model = config.init_from if steers else folder
        options = [f"{option}={value or folder}" for option, value in steers.items()]
        draw = [python, "-m", "sdjax.sample", f"--model={model}", *options, "--output=out"]
        needed = METHODS[config.method.name].sample
        rows.append(("draw", f'{shlex.join(draw)} --prompts="{prompt}" {needed}'.rstrip()))
        if not steers:
            convert = [
                python, "-m", "sdjax.convert", f"--input={folder}", "--output=diffusers_folder",
            ]  # fmt: skip
            rows.append(("convert", shlex.join(convert)))
    elif field := METHODS[config.method.name].used_by:
        rows.append(("use it", shlex.quote(f"--config.{field}={folder}")))
    lines = [f"  {name:12} {value}" for name, value in rows]
    head = [f"\n{score_line}"] if score_line else []
    return "\n".join([*head, f"\ntrained to step {step}", *lines])
