"""The networks that judge pictures, read from the files that their authors publish.

Nothing here downloads by itself: `download_inception` and `download_clip` are for callers whose
user asked for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.data.clip_pixels import ClipPreprocess
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.evaluation.inception import InceptionConfig, InceptionV3
from sdjax.formats.torch_file import read_tensors
from sdjax.models import weights
from sdjax.models.clip import CLIPText
from sdjax.models.clip_vision import CLIPVision, read_clip_config
from sdjax.models.weight_checks import quantised_config
from sdjax.models.weights import WeightsError
from sdjax.system import paths, text_files
from sdjax.system.untrusted import explained, plain

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
# Tensors of pytorch-fid's file that features do not use: the classifier, and the numbers of batches
# that each norm saw in training.
INCEPTION_UNUSED = re.compile(r"fc\.(weight|bias)|.*\.num_batches_tracked")
CLIP_EXAMPLE = "openai/clip-vit-large-patch14"
_CLIP_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_CLIP_FILES = ("*.json", "merges.txt", "vocab.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network with its weights: `weights.merge(graph, params)` is the module."""

    config: Any
    graph: Any
    params: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """The contents of a folder of a CLIPModel.

    logit_scale: exp of the parameter, the factor of cosines.
    """

    name: str
    text: Network
    vision: Network
    logit_scale: float
    tokenizer: Tokenizer
    preprocess: ClipPreprocess


def read_inception(path: paths.PathLike, *, dims: int = 2048) -> Network:
    """Read pytorch-fid's InceptionV3, from its .pth or the same tensors as .safetensors.

    `fc.weight`, `fc.bias` and every `num_batches_tracked` are ignored.

    Raises:
        WeightsError: the file is missing, or tensors are missing, unused or of other shapes; the
            message lists them.
        UserError: `dims` is not one of the network.
    """
    try:
        config = InceptionConfig(dims)
    except ValueError as error:
        raise UserError(str(error)) from error
    path = paths.to_path(path)
    if not path.is_file():
        raise WeightsError(
            f"the Inception weights {path} are not there: fetch {INCEPTION_URL} (95 MB) and name "
            "the file in --inception, or let it be fetched with --download"
        )
    tensors = {
        name: value
        for name, value in read_tensors(path).items()
        if not INCEPTION_UNUSED.fullmatch(name)
    }
    return _network(InceptionV3, config, tensors, str(path))


def read_clip(folder: paths.PathLike) -> Clip:
    """Read a `CLIPModel` of transformers, from a folder as save_pretrained writes it.

    The weights are in model.safetensors (or several such files) or pytorch_model.bin.

    Raises:
        UserError: the folder is missing, lacks a file, or has a field or weight that does not fit;
            the message names it.
    """
    folder = paths.to_path(folder)
    with explained(folder, "a CLIP of transformers"):
        return _read_clip(folder)


def _read_clip(folder: paths.Path) -> Clip:
    """Read a folder as `read_clip` does, without its explanation of errors."""
    if not folder.is_dir():
        raise UserError(
            f"the CLIP folder {folder} is not there: fetch one of huggingface.co, as "
            f"{CLIP_EXAMPLE} (`hf download {CLIP_EXAMPLE} --local-dir {folder}`) and name it in "
            "--clip, or let it be fetched with --download"
        )
    where = str(folder / "config.json")
    content = _read_json(folder / "config.json")
    if problem := quantised_config(content):
        raise UserError(f"{where}: {problem}")
    text_config, vision_config = read_clip_config(content, where)
    preprocess = _read_preprocess(folder)
    preprocess.check(vision_config.image_size, str(folder))
    files = [folder / name for name in _CLIP_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise WeightsError(f"{folder}: no weights; expected {' or '.join(_CLIP_WEIGHTS)}")
    file = files[0]
    tensors = weights.load_file(file) if file.suffix != ".bin" else read_tensors(file)
    parts: dict[str, dict[str, np.ndarray]] = {"text": {}, "vision": {}, "": {}}
    for name, value in tensors.items():
        part = name.partition("_")[0].replace("visual", "vision")
        parts[part if part in parts else ""][re.sub("^(text|vision)_model[.]", "", name)] = value
    scale = parts[""].pop("logit_scale", None)
    if scale is None or parts[""]:
        unknown = f"; unused: {', '.join(map(plain, sorted(parts[''])[:8]))}" if parts[""] else ""
        raise WeightsError(
            f"{file}: expected text_model.*, vision_model.*, text_projection, visual_projection "
            f"and logit_scale{'' if scale is not None else ', which is missing'}{unknown}"
        )
    if np.size(scale) != 1:
        raise WeightsError(f"{file}: logit_scale has the shape {np.shape(scale)}; expected []")
    scale = np.exp(np.float32(scale)).reshape(())
    if not np.isfinite(scale):
        raise WeightsError(f"{file}: logit_scale is NaN or Inf; get the file again, or another")
    tokenizer = Tokenizer.load(folder, context_length=text_config.max_position_embeddings)
    tokenizer.check_vocabulary(text_config.vocab_size, folder)
    return Clip(
        name=folder.name,
        text=_network(CLIPText, text_config, parts["text"], f"{file} (text)"),
        vision=_network(CLIPVision, vision_config, parts["vision"], f"{file} (vision)"),
        logit_scale=float(scale),
        tokenizer=tokenizer,
        preprocess=preprocess,
    )


def download_inception(path: paths.PathLike, *, url: str = INCEPTION_URL) -> paths.Path:
    """Fetch pytorch-fid's weights into `path`, if they are missing. Only when the user asks.

    Raises:
        UserError: it cannot be fetched, or its digest is not the one in its name.
    """
    path = paths.to_path(path)
    if paths.exists(path):
        return path
    by_hand = f"fetch {url} by hand and name the file in --inception"
    try:
        with urllib.request.urlopen(url) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url} cannot be fetched ({error}); {by_hand}") from error
    wanted = re.search(r"-([0-9a-f]{8})\.pth$", url)  # as torch.hub checks it
    found = hashlib.sha256(content).hexdigest()
    if wanted and not found.startswith(wanted[1]):
        raise UserError(
            f"{url}: the digest of what came is {found[:8]}, not {wanted[1]}; {by_hand}"
        )
    paths.make_folder(path.parent)
    with paths.writing(path) as local:
        local.write_bytes(content)
    return path


def download_clip(name: str, folder: paths.PathLike) -> paths.Path:
    """Fetch a CLIP of huggingface.co into `folder`, if it is missing. Only when the user asks.

    Args:
        name: the name of the repository, such as "openai/clip-vit-large-patch14".

    Raises:
        UserError: huggingface_hub is not installed, or the repository cannot be fetched.
    """
    folder = paths.to_path(folder)
    if _is_whole(folder):
        return folder
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "--download of a CLIP takes another package: pip install 'sdjax[hub]'"
        ) from error
    try:
        has = huggingface_hub.list_repo_files(name)
        # One set of weights: many repositories have sets for several frameworks.
        one = next((file for file in _CLIP_WEIGHTS if file in has), _CLIP_WEIGHTS[0])
        chosen = ["*.safetensors"] if one.endswith(".json") else [one]
        huggingface_hub.snapshot_download(
            name, local_dir=str(folder), allow_patterns=[*_CLIP_FILES, *chosen]
        )
    except Exception as error:  # errors of the network, of the hub and of its HTTP library
        raise UserError(
            f"{name} cannot be fetched from huggingface.co into {folder}: {error}"
        ) from error
    return folder


def _is_whole(folder: paths.Path) -> bool:
    """Whether a download into the folder was once finished."""
    files = [folder / name for name in _CLIP_WEIGHTS if (folder / name).is_file()]
    if not files or not (folder / "config.json").is_file():
        return False
    if files[0].suffix != ".json":
        return True
    return all(file.is_file() for file in weights.index_files(files[0]))


def _network(model: Any, config: Any, tensors: Mapping[str, np.ndarray], where: str) -> Network:
    """The network of a class and a config, with the weights `tensors`."""
    graph, shapes = weights.abstract(model, config)
    try:
        return Network(config, graph, weights.from_diffusers(tensors, shapes))
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error


def _read_preprocess(folder: paths.Path) -> ClipPreprocess:
    """The preprocessing from preprocessor_config.json, or from processor_config.json.

    transformers 5 writes the second.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return ClipPreprocess.from_json(_read_json(file), str(file))
    whole = folder / "processor_config.json"
    found = _read_json(whole).get("image_processor") if whole.is_file() else None
    if not isinstance(found, Mapping):
        raise UserError(
            f"{file} is not there; it says how pictures are resized and normalised. Copy it from "
            "where the weights are from"
        )
    return ClipPreprocess.from_json(found, str(whole))


def _read_json(file: paths.Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = text_files.read_json(file)
    except text_files.TextError as error:
        raise UserError(f"{error}; is the folder whole?") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
