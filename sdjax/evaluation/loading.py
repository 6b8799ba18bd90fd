"""The subject of an evaluation: the model with its run's configuration, and the dataset."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.checkpoint import latest_step
from sdjax.checkpoints.controls import read_control
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import CONFIG_FILE
from sdjax.config import Config, resolve
from sdjax.config_model import method_of_run
from sdjax.data.config import RAW_NAMES, WITH_PATH, DataConfig, DataError
from sdjax.data.fixed import FixedExamples
from sdjax.data.pictures import fitted, has_pictures
from sdjax.data.pipeline import CaptionTokenizer
from sdjax.data.raw import formats
from sdjax.errors import UserError
from sdjax.evaluation import losses
from sdjax.evaluation.losses import Example, ExampleLosses, FindExampleLosses
from sdjax.families.beside.controlnet import CONTROLNET
from sdjax.families.beside.ip_adapter import IMAGE_ENCODER, check_encoder
from sdjax.families.family import Model
from sdjax.formats.folders import folder_kind, read_json
from sdjax.formats.image_encoder import ImageEncoder, read_image_encoder
from sdjax.machine_settings import asks_for, data_of_model, of_model
from sdjax.methods.denoise import DenoiseConfig
from sdjax.methods.ip_adapter import IPAdapterMethodConfig
from sdjax.methods.registry import METHODS
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.params import Params, prefixed
from sdjax.sampling.control import Control, name_of
from sdjax.sampling.control_options import Steering, read_controls
from sdjax.sampling.ip_options import Sight, read_ip_adapters, sights_of
from sdjax.system import paths
from sdjax.system.untrusted import is_number
from sdjax.train.validation import Validator


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The options of a command line about networks that steer a model."""

    controlnet: tuple[str, ...] = ()
    ip_adapter: tuple[str, ...] = ()
    image_encoder: str = ""
    guess_mode: bool = False


OWN = "own"  # as a dataset: what the model was trained on, wherever it lies


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model, from whatever folder the user has.

    workdir, config, step: of the run; None for a diffusers folder or a file. The configuration has
        nothing of the machine that it was made on.
    data: that the run was trained on, with folders and names as they were there.
    controls: networks that steer it, whose parameters are among those of `found`.
    sights: {name of an IP-Adapter among these: what it sees}.
    others, bounds: models that draw with it, see `SamplingRequest`; their parameters are among
        those of `found`.
    """

    found: Model
    workdir: paths.Path | None = None
    config: Config | None = None
    step: int | None = None
    data: DataConfig | None = None
    controls: tuple[Control, ...] = ()
    sights: Mapping[str, Sight] = dataclasses.field(default_factory=dict)
    others: tuple[Model, ...] = ()
    bounds: tuple[float, ...] | None = None


def load(
    model: paths.PathLike,
    *,
    weights: str = "ema",
    step: int | None = None,
    loras: Sequence[str] = (),
    networks: NetworkOptions = NetworkOptions(),
) -> Loaded:
    """A workdir, one of its checkpoints, a diffusers folder or a single file.

    A run that trains a network which steers is loaded with that network.

    Args:
        loras: adapters for it, as --lora names them.
        networks: that steer it.

    Raises:
        UserError: the run draws nothing, or an option does not suit the model.
        ModelError, CheckpointError: it cannot be read, or has no such weights or step.
    """
    folder = paths.to_path(model)
    if folder_kind(folder) != "workdir":
        if step is not None:
            raise UserError(f"--step={step}: {model} is no workdir, and has no checkpoints")
        found = with_loras(read_any(folder, weights=weights), loras)
        return _steered(Loaded(found), networks, weights)
    if folder.parent.name == "checkpoints" and is_number(folder.name):
        folder, step = folder.parents[1], int(folder.name)
    step = latest_step(folder) if step is None else step
    config = resolve(read_json(folder / CONFIG_FILE))
    if not (config.draws or METHODS[config.method.name].used_by == "vae_from"):
        raise UserError(
            f"{model} is a run of config.method.name = {config.method.name!r}, which draws nothing "
            "from prompts"
        )
    found = with_loras(read_any(folder, weights=weights, step=step), loras)
    loaded = Loaded(found, folder, of_model(config), step, data_of_model(config))
    if METHODS[config.method.name].steers:
        loaded = _with_own(loaded, networks, weights)
    return _steered(loaded, networks, weights)


def _steered(loaded: Loaded, networks: NetworkOptions, weights: str) -> Loaded:
    """With the networks that the options name."""
    read = functools.partial(read_control, weights=weights)
    of_controls = read_controls(loaded.found, networks.controlnet, networks.guess_mode, read)
    loaded = _joined(loaded, of_controls, {})
    if networks.guess_mode and not any(control.guess for control in loaded.controls):
        raise UserError("--guess_mode is for ControlNets, and there is none; leave it out")
    if not networks.ip_adapter:
        if networks.image_encoder and not loaded.sights:
            raise UserError(
                "--image_encoder is for --ip_adapter=FILE; give that too, or leave it out"
            )
        return loaded
    tower = _tower(networks, "--ip_adapter")
    adapters = read_ip_adapters(loaded.found, networks.ip_adapter, tower, read)
    return _joined(loaded, adapters, sights_of(adapters.controls, tower))


def _with_own(loaded: Loaded, networks: NetworkOptions, weights: str) -> Loaded:
    """With the network that the run trains, under the name that it has there."""
    assert loaded.workdir is not None and loaded.config is not None
    place = loaded.workdir / "checkpoints" / str(loaded.step)
    config, own = read_control(place, weights=weights)
    name = name_of(config)
    control = Control(name, config, guess=networks.guess_mode and name == CONTROLNET)
    steering = Steering((control,), prefixed(own, name))
    if not isinstance(config, IPAdapterConfig):
        return _joined(loaded, steering, {})
    tower = _tower(networks, f"{loaded.workdir}, which is a run of 'ip_adapter',")
    check_encoder(config, tower.config, f"--model={loaded.workdir}")
    # The loss sees pictures by the tower too.
    assert isinstance(method := loaded.config.method, IPAdapterMethodConfig)
    method = dataclasses.replace(method, image_encoder_from=networks.image_encoder)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, method=method))
    steering.params.update(prefixed(tower.params, IMAGE_ENCODER))
    return _joined(loaded, steering, sights_of((control,), tower))


def _tower(networks: NetworkOptions, name: str) -> ImageEncoder:
    if not networks.image_encoder:
        raise UserError(f"{name} takes the image tower that it was trained with: give "
                        "--image_encoder=DIR")  # fmt: skip
    return read_image_encoder(paths.to_path(networks.image_encoder))


def _joined(loaded: Loaded, steering: Steering, sights: Mapping[str, Sight]) -> Loaded:
    if not steering.controls:
        return loaded
    params = {**loaded.found.params, **steering.params}
    return dataclasses.replace(
        loaded,
        found=dataclasses.replace(loaded.found, params=params),
        controls=(*loaded.controls, *steering.controls),
        sights={**loaded.sights, **sights},
    )


def choose_data(
    own: DataConfig | None, dataset: str, *, data_dir: str = "", resolution: int = 0
) -> DataConfig | None:
    """The dataset that --dataset says, or the run's own; None if there is neither.

    Args:
        own: what the run was trained on.
        dataset: "captioned_shapes", a TFDS name, or a path: of a dataset that sdjax.prepare wrote,
            of an image folder, tar shards or parquet files; "own" for the run's own wherever it
            lies, "" for it if that takes nothing of this machine.

    Raises:
        DataError: a path is none of these, or the run's own data lie in a folder that only its
            config.json names.
    """
    changes: dict[str, Any] = {"resolution": resolution} if resolution else {}
    if data_dir:
        changes["data_dir"] = data_dir
    if dataset in ("", OWN):
        if own is None:
            return None
        data = dataclasses.replace(own, **changes)
        theirs = dataclasses.replace(own, data_dir="") if data_dir else own
        if not dataset and (taken := asks_for(theirs)):
            raise DataError(
                f"the model's config.json says {taken}, which is not opened unasked: --dataset=own "
                "opens it, if the model is yours or you trust who made it, --dataset=PATH another"
            )
        return data
    base = dataclasses.replace(own, data_dir="") if own else DataConfig()
    is_path = "/" in dataset and (
        dataset.startswith(("/", ".", "~", "gs://")) or paths.exists(paths.to_path(dataset))
    )
    if is_path or paths.exists(paths.to_path(dataset)):
        changes |= {"name": _kind(dataset), "path": dataset}
    else:
        changes |= {"name": dataset, "path": ""}
    if changes["name"] in RAW_NAMES and base.name not in RAW_NAMES:
        changes |= {"split_key": "", "score_key": "", "min_score": None}
    if changes["name"] in WITH_PATH:
        changes |= {"image_key": "image", "text_key": "text"}
    # Another dataset need not have the masks or the controls of the run's own.
    return dataclasses.replace(base, mixture=(), text_embeddings=False, images=(), **changes)


def _kind(path: str) -> str:
    folder = paths.to_path(path)
    if (folder / "dataset_info.json").exists():
        return "prepared"
    return formats.detect(path)


def make_validator(
    config: Config,
    found: Model,
    mesh: Mesh,
    *,
    split: str,
    count: int,
    tokenizers: Mapping[str, CaptionTokenizer] | None = None,
) -> Validator:
    """Return the losses of `count` examples of a split, as training has them.

    Args:
        tokenizers: in place of the model's own.
    """
    kind, family = METHODS[config.method.name], found.family
    # What a run has changed is read as part of the networks, which have a plain loss then.
    changed = kind.changes(config.method, family)
    own = dataclasses.replace(config, method=DenoiseConfig()) if changed else config
    method = method_of_run(own, found.tokenizers, found)
    return Validator(config, method, tokenizers or found.tokenizers, mesh, split=split, count=count)


def make_validate(
    config: Config, found: Model, mesh: Mesh, *, split: str, count: int
) -> Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]:
    """Parameters -> losses [N, n] of `count` examples of a split at n timesteps, and these [n].

    The numbers are those that training writes as `validation/SET/loss`, of as many examples.
    """

    @functools.cache
    def validator() -> Validator:
        return make_validator(config, found, mesh, split=split, count=count)

    def validate(params: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return validator().losses(params), validator().timesteps

    return validate


@dataclasses.dataclass(frozen=True)
class _Uncaptioned:
    """A tokenizer that reads every caption as the empty one."""

    tokenizer: CaptionTokenizer

    def encode(self, texts: list[str]) -> np.ndarray:
        """The tokens of n empty texts, int32 [n, L]."""
        return self.tokenizer.encode([""] * len(texts))


def make_example_losses(
    config: Config, found: Model, mesh: Mesh, *, split: str, count: int
) -> FindExampleLosses:
    """Return what computes the loss of each of `count` examples of a split, fixed as `validate`'s.

    Where captions reach the loss as tokens it is computed with empty ones too, from the same noise:
    not of a dataset with stored embeddings, nor of a model that is trained without captions.
    """
    empty = {field: _Uncaptioned(tokenizer) for field, tokenizer in found.tokenizers.items()}
    if config.data.text_embeddings or config.objective.caption_dropout == 1.0:
        empty = {}

    @functools.cache
    def validators() -> tuple[Validator, Validator | None]:
        make = functools.partial(make_validator, config, found, mesh, split=split, count=count)
        return make(), make(tokenizers=empty) if empty else None

    def find(params: Params) -> ExampleLosses:
        own, without = validators()
        made, plain = own.losses(params), without.losses(params) if without else None
        rows = zip(own.examples.facts(), made, losses.scores(made), strict=True)
        every = [
            Example(**fact, loss=float(values.mean(dtype=np.float64)), score=float(score))
            for fact, values, score in rows
        ]
        if plain is not None:
            means, gains = plain.mean(axis=1, dtype=np.float64), losses.scores(made - plain)
            every = [
                dataclasses.replace(one, uncaptioned=float(mean), caption_score=float(gain))
                for one, mean, gain in zip(every, means, gains, strict=True)
            ]
        order = sorted(range(len(every)), key=lambda i: -every[i].score)
        return ExampleLosses(
            tuple(every[i] for i in order),
            made[order],
            None if plain is None else plain[order],
            own.timesteps,
            split,
            functools.partial(_picture, own.examples) if has_pictures(config.data) else None,
        )

    return find


def _picture(examples: FixedExamples, example: Example) -> np.ndarray:
    """See `ReadPicture`."""
    return fitted(examples.picture(example.part, example.number), example.shape)
