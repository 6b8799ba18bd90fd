"""Single-file checkpoints: the `.safetensors` that AUTOMATIC1111 and ComfyUI read.

All networks of a pipeline under the names of the original code, or one of them alone: the layouts
are the families' (`sdjax.families.single_file`). There is no tokenizer in such a file, no noise
schedule, no config. What sdjax writes has configs and schedule in the file's header. Of other
files, shapes decide the architecture, the rest is that of the release that the layout is named
after, and what even that leaves open is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.data.text.tokenizers import inner_folder, load_tokenizer
from sdjax.diffusion.prediction import check_prediction
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.families.bind import abstract_params
from sdjax.families.family import AUTOENCODER, Model
from sdjax.families.registry import FAMILIES, NETWORKS
from sdjax.families.single_file import Place, Shapes, from_file
from sdjax.formats.folders import ModelError, check_components
from sdjax.formats.scheduler_json import scheduler_from_diffusers
from sdjax.formats.single_file_layout import (
    Found,
    counted,
    find_layout,
    sort_out,
    whole_average,
)
from sdjax.formats.weight_files import untied
from sdjax.models.config import read_config
from sdjax.models.weight_checks import quantised
from sdjax.models.weights import (
    WeightsError,
    from_diffusers,
    load_file,
    read_header,
    tensor_shapes,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, check_depth, damage, explained, plain, why

# The name of our entry in the file's header.
METADATA = "sdjax"
# What it says, besides a schedule with a prediction type.
_SAID = {
    **dict.fromkeys((*NETWORKS, "schedule", "scheduler"), dict),
    "prediction_type": str,
    "settings": dict,
    "family": str,
}


@dataclasses.dataclass(frozen=True)
class Hints:
    """Answers to the questions that a single file may leave open.

    tokenizer: folder of a tokenizer, or of a pipeline with several; "" where `like` or nothing has
        one; None to read none.
    tokenizer_2: the same for text encoders but the first, which may pad otherwise; "" for the same.
    prediction_type: "epsilon" or "v_prediction"; "" for what the file says, or its family.
    scaling_factor, shift_factor: of an autoencoder's latents.
    zero_terminal_snr: its noise schedule ends in pure noise, whatever the file says.
    like: a pipeline (without weights) whose configs, schedule and tokenizers the file's are.
    alone: (scale, shift) of latents of an autoencoder that has a file to itself, which does not say
        them; None to ask for `scaling_factor`.
    lengths: {setting of the family: number of tokens} that encoders without a length of their own
        read, where a file does not say it; {} for the release's.
    """

    tokenizer: str | None = ""
    prediction_type: str = ""
    scaling_factor: float | None = None
    like: Model | None = None
    shift_factor: float | None = None
    zero_terminal_snr: bool = False
    tokenizer_2: str = ""
    alone: tuple[float, float] | None = None
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)


# For a caller that takes parameters alone: what a file leaves open does not change them.
PARAMETERS = Hints(tokenizer=None, prediction_type="epsilon", alone=(1.0, 0.0))


def read_single_file(
    file: paths.PathLike,
    *,
    components: Sequence[str] = NETWORKS,
    weights: str = "ema",
    hints: Hints,
) -> Model:
    """Reads the networks of a single-file checkpoint.

    Args:
        file: a `.safetensors`.
        components: which networks to read, if it has them.
        weights: "ema" takes the average where the file has one beside the parameters; "raw" never
            does.
        hints: what the file does not say.

    Raises:
        ModelError: with everything that is missing, unused, mis-shaped, or not said; or of
            which the average is not whole, values are NaN or Inf, or weights are quantised.
    """
    file = paths.to_path(file)
    check_components(components)
    if weights not in ("ema", "raw"):
        raise ModelError(f"weights is {weights!r}; a single file has ema and raw")
    with explained(file, "a single-file checkpoint", error=ModelError):
        return _read(file, components, weights, hints)


def _read(file: paths.Path, components: Sequence[str], weights: str, hints: Hints) -> Model:
    """See `read_single_file`."""
    shapes, metadata = read_header(file)
    found = find_layout(file, shapes, hints.like.family if hints.like else None)
    family, layout = found.family, found.layout
    _refuse_quantised(file, shapes, found, components)
    contents = sort_out(file, shapes, found)
    ignored, averages = list(contents.ignored), contents.averages
    said = _said(file, metadata)
    denoises = family.denoiser in found.prefixes
    schedule = _schedule(file, shapes, found, said, hints) if denoises else None
    networks: dict[str, Any] = {}
    params: dict[str, np.ndarray] = {}
    for name in [name for name in family.parts if name in found.prefixes and name in components]:
        origin = contents.weights[name]
        own = {key: shapes[full] for key, full in origin.items()}
        prediction = schedule[1] if schedule else ""
        config = _config(file, found, name, own, prediction, said, hints)
        start = found.network(name).averages.get(found.prefixes[name])
        if weights == "ema" and start is not None:
            if taken := whole_average(file, name, start, origin, averages):
                origin, averages = taken, ()
                who = family.parts[name].network.__name__
                what = f"the {who}'s parameters: the file has their average, which was taken"
                ignored.append(what)
        read, unused = _read_network(file, found, name, config, origin, exact=name in said)
        ignored += unused
        networks[name] = config
        params |= {f"{name}.{path}": value for path, value in read.items()}
    default = hints.like.settings if hints.like else layout.settings
    lengths = {k: v for k, v in hints.lengths.items() if k in layout.settings}
    settings = {**default, **lengths, **said.get("settings", {})}
    fields: dict[str, Any] = {"tokenizers": _tokenizers(file, found, networks, settings, hints)}
    ignored += counted("model_ema.*" for _ in averages)
    if family.denoiser in networks:
        assert schedule
        fields["schedule"], fields["prediction_type"] = schedule
        fields |= _scheduler(file, found, said, hints)
    if any(name in family.encoders for name in networks):
        fields["settings"] = settings
    return Model(family, networks, params=params, ignored=tuple(ignored), **fields)


def _refuse_quantised(
    file: paths.Path, names: Iterable[str], found: Found, components: Sequence[str]
) -> None:
    """WeightsError if what is to be read is quantised; other networks of the file may be."""
    others = [(found.network(n), p) for n, p in found.prefixes.items() if n not in components]
    wanted = [name for name in names if not any(o.holds(name, prefix) for o, prefix in others)]
    if problem := quantised(wanted):
        raise WeightsError(f"{file}: {problem}")


def _said(file: paths.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry that sdjax wrote into the header; empty without one."""
    try:
        said = json.loads(metadata.get(METADATA, "{}"))
        check_depth(said)
        for name, kind in _SAID.items():
            if not isinstance(said.get(name, kind()), kind):
                raise ValueError(f"{name} is {brief(said[name])}; expected a {kind.__name__}")
        if "schedule" in said:
            said["schedule"] = read_config(ScheduleConfig, said["schedule"], where="schedule")[0]
            check_prediction(said["prediction_type"])
        _check_settings(said)
    except damage() as error:
        raise ModelError(
            f"{file}: the header has a part of sdjax's that this version cannot read "
            f"({why(error)}); use the version that wrote it, or write it again"
        ) from error
    return said


def _check_settings(said: Mapping[str, Any]) -> None:
    """Raise a ValueError if the settings are not those of a family."""
    family = FAMILIES.get(said.get("family", ""))
    defaults = family.presets["base"].settings if family else {}
    for name, value in said.get("settings", {}).items():
        if name not in defaults or type(value) is not type(defaults[name]):
            raise ValueError(f"settings.{plain(name)} is {brief(value)}")


def _config(
    file: paths.Path,
    found: Found,
    name: str,
    shapes: Mapping[str, Sequence[int]],
    prediction_type: str,
    said: Mapping[str, Any],
    hints: Hints,
) -> Any:
    """The config of a network: the one pointed to, the header's, or what the shapes say."""
    if hints.like is not None and name in hints.like.networks:
        return hints.like.networks[name]
    if name in said:
        part = found.family.parts[name]
        return part.config.from_json(said[name], where=f"{file}, header, {name}")[0]
    if name != AUTOENCODER:
        return found.network(name).configure(shapes, prediction_type)
    layout, factor, shift = found.layout, hints.scaling_factor, hints.shift_factor
    if not found.sure and factor is None and hints.alone is not None:
        factor, shift = hints.alone
    chosen = {"scaling_factor": factor, "shift_factor": shift}
    every = [release for family in FAMILIES.values() for release in family.single_files]
    if not found.sure and factor is None:
        known = {f.title: r.scaling_factor for f in FAMILIES.values() for r in f.single_files}
        raise ModelError(
            f"{file}: an autoencoder alone does not say how its latents are scaled; give "
            f"--scaling_factor, {', '.join(f'{n} for {title}' for title, n in known.items())}"
        )
    if not found.sure and factor != layout.scaling_factor:
        same = [r for r in every if r.scaling_factor == factor and name in r.networks]
        layout = same[0] if same else layout
    config = layout.networks[name].configure(shapes, prediction_type)
    return dataclasses.replace(config, **{k: v for k, v in chosen.items() if v is not None})


def _read_network(
    file: paths.Path,
    found: Found,
    name: str,
    config: Any,
    origin: Mapping[str, str],
    *,
    exact: bool,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(float32 parameters of one network without its name; lines about what it does not use).

    Args:
        origin: {key without prefix: name in the file} of its weights, or of their averages.
        exact: read weights that other programs leave out, as sdjax wrote them.
    """
    record, prefix = found.network(name), found.prefixes[name]
    part = found.family.parts[name]
    expected = abstract_params(part, config)
    shapes, places = tensor_shapes(expected), record.places(config)

    def in_file(name: str) -> Place:
        place = places(name)
        return dataclasses.replace(place, name=record.spelling(place.name))

    assumed = {in_file(key).name for key in shapes if not exact and in_file(key).default}
    labels = {key: record.surplus(config, key) or key * (key in assumed) for key in origin}
    chosen = {key: full for key, full in origin.items() if not labels[key]}
    read = load_file(file, wanted=set(chosen.values()).__contains__)
    tensors = {key: read[full] for key, full in chosen.items()}

    def spell(key: str) -> str:
        key = in_file(key).name if key in shapes else key
        return origin.get(key, prefix + key)

    try:
        own = untied(from_file(tensors, shapes, in_file), part.tied, prefix)
        params = from_diffusers(own, expected, spell=spell)
    except WeightsError as error:
        raise WeightsError(f"{file}: {name}: {error}") from error
    return params, counted(prefix + label for label in labels.values() if label)


def _schedule(
    file: paths.Path,
    shapes: Shapes,
    found: Found,
    said: Mapping[str, Any],
    hints: Hints,
) -> tuple[ScheduleConfig, str]:
    """(noise schedule, prediction type), checked against the file's own table if it has one."""
    if hints.like is not None and hints.like.schedule is not None:
        schedule, prediction = hints.like.schedule, hints.like.prediction_type
        marked, kind = found.layout.objective(shapes)
        if kind == "v_prediction":  # which only a mark in the file says
            prediction = kind
        if marked.zero_terminal_snr:
            schedule = dataclasses.replace(schedule, zero_terminal_snr=True)
    elif "schedule" in said:
        schedule, prediction = said["schedule"], said["prediction_type"]
    else:
        schedule, prediction = found.layout.objective(shapes)
        if not prediction and not hints.prediction_type:
            raise ModelError(f"{file}: {found.layout.question}")
    prediction = hints.prediction_type or prediction
    if hints.zero_terminal_snr:
        schedule = dataclasses.replace(schedule, zero_terminal_snr=True)
    if "alphas_cumprod" in shapes:
        table = load_file(file, wanted=lambda name: name == "alphas_cumprod")["alphas_cumprod"]
        # The precision of float8, or of bfloat16.
        small = jnp.issubdtype(table.dtype, jnp.floating) and table.dtype.itemsize == 1
        relative = float(jnp.finfo(table.dtype).eps) / 2 if small else 4e-3
        table = table.astype(np.float64)
        for zero in (False, True):
            candidate = dataclasses.replace(schedule, zero_terminal_snr=zero)
            expected = make_schedule(candidate).alphas_cumprod
            # Ends of SD's table: 0.0047, or 0 for a zero terminal SNR.
            if table.shape == expected.shape and np.allclose(table, expected, relative, 1e-3):
                return (candidate if zero else schedule), prediction
        raise ModelError(
            f"{file}: its alphas_cumprod (from {table.flat[0]:.4g} to {table.flat[-1]:.4g}) is not "
            f"the noise schedule of {found.family.title}; point --config_from at a diffusers "
            "folder or workdir that has the right one"
        )
    return schedule, prediction


def _scheduler(
    file: paths.Path, found: Found, said: Mapping[str, Any], hints: Hints
) -> dict[str, Any]:
    """How to sample, from where the user says, the header or the layout; otherwise nothing."""
    like = hints.like
    if like is not None and like.schedule is not None:
        names = ("sampler", "unsupported_sampler", "scheduler")
        return {name: getattr(like, name) for name in names}
    config = said.get("scheduler") or (None if "schedule" in said else found.layout.scheduler)
    if config is None:
        return {}
    changes = found.family.scheduler_changes(found.family.pipelines[0])
    read = scheduler_from_diffusers(config, where=f"{file}, header", changes=changes)
    return {
        "sampler": read.sampler,
        "unsupported_sampler": read.unsupported,
        "scheduler": dict(config),
    }


def _tokenizers(
    file: paths.Path,
    found: Found,
    networks: Mapping[str, Any],
    settings: Mapping[str, Any],
    hints: Hints,
) -> dict[str, TextTokenizer]:
    """{field: tokenizer} of the text encoders, from where the user says."""
    tokenizers: dict[str, TextTokenizer] = {}
    for encoder, part in found.family.encoders.items():
        if encoder not in networks or hints.tokenizer is None:
            continue
        config = networks[encoder]
        own = hints.like.tokenizers.get(part.tokens) if hints.like is not None else None
        if own is None and not hints.tokenizer:
            raise ModelError(
                f"{file}: single files have no tokenizer; name a folder with CLIP's vocab.json and "
                "merges.txt (as the tokenizer/ of any Stable Diffusion) or with such folders, in "
                "sdjax.convert by --tokenizer, in a run by config.tokenizer.path; or a whole "
                "pipeline, by --config_from or config.text_encoder_from"
            )
        if own is None:
            second = part is not next(iter(found.family.encoders.values()))
            folder = (hints.tokenizer_2 if second else "") or hints.tokenizer
            own = load_tokenizer(
                part.tokenizer_kind,
                inner_folder(folder, part.tokenizer),
                found.family.text_length(encoder, config, settings),
                found.network(encoder).pad_token,
            )
        own.check_vocabulary(config.vocab_size, f"{file}: {encoder}")
        tokenizers[part.tokens] = own
    return tokenizers
