"""From the options of an evaluation to its datasets and networks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from sdjax.data.config import WITH_PATH, DataConfig
from sdjax.data.pictures import has_pictures, open_split
from sdjax.errors import UserError
from sdjax.evaluation import reference, towers
from sdjax.evaluation.choice import AUTOENCODER_METRICS, BY_DEFAULT, METRICS, check_names
from sdjax.evaluation.features import ClipTower, clip_tower, inception_tower
from sdjax.evaluation.loading import OWN, Loaded, NetworkOptions
from sdjax.evaluation.metrics.bootstrap import RESAMPLES
from sdjax.evaluation.reference import PixelTower, Reference, Tower
from sdjax.sampling.drawing import Prompts
from sdjax.system import paths

SAMPLES = 1000  # pictures, unless the user says how many


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of `sdjax.evaluate`, which explains them."""

    model: str = ""
    others: tuple[str, ...] = ()  # models whose predictions are averaged with its own
    experts: tuple[str, ...] = ()  # as --expert names them
    against: tuple[str, ...] = ()  # models, or folders of evaluations, to compare with
    images: str = ""
    dataset: str = ""
    split: str = ""
    data_dir: str = ""
    metrics: tuple[str, ...] = ()  # () for all that can be had, or for the audit alone
    audit: str = ""
    num_samples: int | None = None
    per_prompt: int = 1
    seed: int = 0
    weights: str = "ema"
    step: int | None = None
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # changes of the own one
    guidance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `drawing_of`
    negative_prompt: str | None = None
    embeddings: tuple[str, ...] = ()  # as --embedding names them; the model has them already
    size: tuple[int, int] | None = None
    batch_size: int = 16
    dtype: str = "float32"
    inception: str = ""
    clip: str = ""
    download: bool = False
    features: str = ""
    lpips: str = ""  # a file of VGG16, for autoencoders
    reference: str = ""
    reference_samples: int | None = None
    train_samples: int | None = 10_000
    validation_examples: int | None = None
    resamples: int = RESAMPLES
    lora: tuple[str, ...] = ()
    networks: NetworkOptions = NetworkOptions()  # that steer; the model has them already
    named_image: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.metrics, (*METRICS, *AUTOENCODER_METRICS))
        for name, least in (("per_prompt", 1), ("seed", 0), ("batch_size", 1), ("resamples", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}; expected {least} or more")
        for name, least in (("num_samples", 0), ("reference_samples", 2), ("train_samples", 0),
                            ("validation_examples", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name}={value}; expected {least} or more")
        if not self.model and not self.images:
            raise UserError("nothing to evaluate: give --model=DIR, or --images=DIR")
        if self.lora and not self.model:
            raise UserError(f"--lora={self.lora[0]} is for a model; give --model=DIR")
        if not self.model and (said := [name for name, value in self.steering().items() if value]):
            raise UserError(f"--{said[0]} is for a model; give --model=DIR")
        if self.against and not self.model:
            raise UserError(f"--against={self.against[0]} is for a model; give --model=DIR")
        if self.audit and not self.model:
            raise UserError(f"--audit={self.audit} draws its own pictures; give --model=DIR")

    def steering(self) -> dict[str, Any]:
        """The options about what the model reads besides prompts, those that are given."""
        given = {**dataclasses.asdict(self.networks), "named_image": self.named_image}
        return {name: value for name, value in given.items() if value}

    @property
    def asked(self) -> tuple[str, ...] | None:
        """Metrics that were asked for; None for all that can be had."""
        return self.metrics if self.metrics or self.audit else None

    @property
    def wanted(self) -> tuple[str, ...]:
        """Metrics to compute if they can be."""
        return BY_DEFAULT if self.asked is None else self.asked


def picture_size(request: Request, loaded: Loaded, data: DataConfig | None) -> tuple[int, int]:
    """(height, width) of what is drawn: as asked, as trained, or as the UNet was made for."""
    if request.size is not None:
        return request.size
    if loaded.config is not None and data is not None:
        return data.resolution, data.resolution
    return loaded.found.native_size


def needs_pictures(request: Request) -> bool:
    """Whether anything is to be drawn."""
    return request.num_samples != 0 and any("pictures" in METRICS[n] for n in request.wanted)


def choose_prompts(
    request: Request, data: DataConfig | None, split: str
) -> tuple[Prompts | None, int]:
    """The captions of a split, and how many pictures to draw of them.

    Raises:
        UserError: there is no dataset to take captions of.
    """
    if not needs_pictures(request):
        return None, 0
    if data is None:
        raise UserError(
            f"--model={request.model} is no workdir and does not say what it was trained on; give "
            "--dataset=NAME or --dataset=PATH for prompts and pictures to compare with"
        )
    texts = open_split(data, split, size=(1, 1)).captions
    own = min(SAMPLES, len(texts)) * request.per_prompt
    return Prompts(texts, request.per_prompt), (
        own if request.num_samples is None else request.num_samples
    )


def compared_with(
    request: Request, data: DataConfig | None, split: str, size: tuple[int, int] | None
) -> dict[str, Any]:
    """The fields reference and train of `Inputs`, where the dataset has pictures."""
    if data is None or size is None or not has_pictures(data):
        return {}
    found: dict[str, Any] = {
        "reference": open_split(data, split, size=size, count=request.reference_samples)
    }
    if "memorised" in request.wanted and request.train_samples and split != data.split:
        found["train"] = open_split(data, data.split, size=size, count=request.train_samples)
    return found


def open_towers(request: Request, mesh: Mesh, *, clip_too: bool = False) -> dict[str, Any]:
    """The fields inception and clip of `Inputs`, of those that a metric needs and the user has.

    Args:
        clip_too: a CLIP is needed, whatever the metrics.

    Raises:
        UserError: a file is not there, is damaged, or cannot be downloaded.
    """
    wanted = {need for name in request.wanted for need in METRICS[name]}
    neighbours = "features" in wanted or bool({"memorised", "robustness"} & {*request.wanted})
    first = request.features or ("" if request.inception or request.download else "clip")
    needs = {
        "inception": "inception" in wanted or (neighbours and first in ("", "inception")),
        "clip": clip_too or "clip" in wanted or (neighbours and first in ("", "clip")),
    }
    home = paths.to_path("~/.cache/sdjax/towers")
    inception, clip = request.inception, request.clip
    if request.download and needs["inception"]:
        inception = inception or str(home / towers.INCEPTION_FILE)
        towers.download_inception(inception)
    if request.download and needs["clip"]:
        clip = clip or str(home / towers.CLIP_EXAMPLE.replace("/", "--"))
        towers.download_clip(towers.CLIP_EXAMPLE, clip)
    found: dict[str, Any] = {}
    size = request.batch_size
    if inception and needs["inception"]:
        found["inception"] = inception_tower(inception, batch_size=size, mesh=mesh)
    if clip and needs["clip"]:
        found["clip"] = clip_tower(clip, batch_size=size, mesh=mesh)
    return found


def given_statistics(
    request: Request, found: Mapping[str, Any], size: tuple[int, int] | None
) -> Reference | None:
    """Those of --reference=FILE.npz.

    Raises:
        UserError: it cannot be read, or was made by none of the networks that are here.
    """
    file = request.reference
    if not file.endswith(".npz"):
        return None
    clip: ClipTower | None = found.get("clip")
    here: list[Tower] = [
        tower
        for tower in (found.get("inception"), clip.images if clip is not None else None)
        if tower is not None
    ]
    if request.features == "pixels":
        here.append(PixelTower())
    made_by = reference.read(file).meta.get("tower", reference.PYTORCH_FID_TOWER)
    fitting = [tower for tower in here if tower.name == made_by]
    if not fitting:
        names = ", ".join(tower.name for tower in here) or "none"
        raise UserError(
            f"--reference={file} holds statistics of {made_by}; the networks that are here "
            f"(--inception, --clip): {names}"
        )
    return reference.read(file, fitting[0], size=size)


def cache_folder(request: Request, loaded: Loaded | None, output: paths.PathLike) -> paths.Path:
    """Where features of datasets are kept: --reference=DIR, or beside a run's evaluations."""
    if request.reference and not request.reference.endswith(".npz"):
        return paths.to_path(request.reference)
    if loaded is not None and loaded.workdir is not None:
        return loaded.workdir / "evaluations" / "references"
    return paths.to_path(output) / "references"


def dataset_name(data: DataConfig | None) -> str:
    """Return the name of a dataset in files."""
    if data is None:
        return ""
    if data.mixture:
        return "mixture"
    return data.path.rstrip("/").rpartition("/")[2] if data.name in WITH_PATH else data.name


def default_output(request: Request, loaded: Loaded | None) -> paths.Path:
    """WORKDIR/evaluations/NAME, the name made of step, weights and dataset.

    Raises:
        UserError: the model is no workdir.
    """
    if loaded is None or loaded.workdir is None:
        raise UserError(
            "--output is missing: pictures and metrics.json of a model that is no workdir need a "
            "folder, as --output=evaluation"
        )
    given = "" if request.dataset == OWN else request.dataset
    dataset = given.rstrip("/").rpartition("/")[2] or dataset_name(loaded.data)
    if request.audit:
        dataset = paths.to_path(request.audit).stem
    beside = (
        *request.others,
        *request.experts,
        *request.lora,
        *request.networks.controlnet,
        *request.networks.ip_adapter,
    )
    names = [paths.to_path(option).name for option in beside]
    parts = (f"{loaded.step or 0:08d}", request.weights, *names, dataset)
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)
    return loaded.workdir / "evaluations" / name
