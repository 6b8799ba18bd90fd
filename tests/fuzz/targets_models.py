"""Hostile models: diffusers folders, workdirs, single files, tokenizers, safetensors, arrays."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.config import Config
from sdjax.data.clip_pixels import ClipPreprocess
from sdjax.data.text.t5_tokenizer import T5Tokenizer
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.errors import UserError
from sdjax.evaluation import reference
from sdjax.evaluation.audit import read_audit
from sdjax.families.bind import abstract_params
from sdjax.families.family import Model
from sdjax.families.sd import SD
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.formats.single_file import Hints
from sdjax.formats.single_file_writer import write_single_file
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.clip_vision import read_clip_config
from sdjax.models.unet import UNetConfig
from sdjax.models.vae import VAEConfig
from sdjax.models.weights import load_file, read_header, save_file
from sdjax.sampling.inputs import read_latents
from sdjax.sweeps.space import read_space
from sdjax.system import paths
from sdjax.system.text_files import read_json
from sdjax.train.frozen import read_frozen
from tests.fuzz import mutation

_SPIECE = Path(__file__).parents[1] / "data" / "tiny_spiece.model"
_LONGEST = 20_000  # letters of a message, which may list a hundred weights
_WORDS = ["a small red circle", "a large blue square"]


def _judged(read: Callable[[], object]) -> str:
    """Return what became of an input; any error but a UserError is a fault."""
    try:
        read()
    except UserError as error:
        assert len(str(error)) < _LONGEST, f"a message of {len(str(error))} characters"
        return "refused"
    return "read"


def _hurt(rng: np.random.Generator, file: Path) -> None:
    """Damage a file: as JSON where it is some, else its bytes."""
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.85:
        hurt = mutation.tree(rng, json.loads(data))
        file.write_bytes(json.dumps(hurt).encode("utf-8", "surrogatepass"))
    elif file.suffix == ".safetensors" and rng.random() < 0.6:
        file.write_bytes(_other_header(rng, data))
    else:
        file.write_bytes(mutation.damaged(rng, data))


def _other_header(rng: np.random.Generator, data: bytes) -> bytes:
    """Return a safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutation.tree(rng, json.loads(data[8 : 8 + length]), 2)).encode()
    said = len(header) if rng.random() < 0.9 else int(rng.integers(2**63))
    return said.to_bytes(8, "little") + header + data[8 + length :]


# ---- good files, made once for a process ---------------------------------------------------------


@functools.cache
def _tiny() -> Model:
    """A pipeline of the smallest networks, with random weights."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.train(_WORDS, 530, context_length=8)
    configs = {
        "unet": UNetConfig(
            sample_size=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
        ),
        "vae": VAEConfig(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, sample_size=8,
        ),
        "text_encoder": CLIPTextConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8,
        ),
    }  # fmt: skip
    params = {
        f"{name}.{path}": rng.standard_normal(want.shape).astype(np.float32)
        for name, config in configs.items()
        for path, want in abstract_params(SD.parts[name], config).items()
    }
    return Model(
        SD, configs, params=params, tokenizers={"tokens": tokenizer}, schedule=ScheduleConfig()
    )


@functools.cache
def _good(kind: str) -> dict[str, bytes]:
    """The files of a good model: {name within its folder: bytes}."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, kind)
        if kind == "diffusers":
            write_diffusers(folder, _tiny(), max_shard_size="20KB")
        elif kind == "workdir":
            save_workdir(folder, _tiny())
        elif kind == "single":
            write_single_file(folder / "model.safetensors", _tiny())
            _tiny().tokenizers["tokens"].save(folder / "tokenizer")
        else:
            _tiny().tokenizers["tokens"].save(folder)
        return {str(file.relative_to(folder)): file.read_bytes() for file in _files(folder)}


def _write(kind: str, folder: Path) -> Path:
    for name, data in _good(kind).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _chosen(rng: np.random.Generator, files: list[Path]) -> Path:
    return files[rng.integers(len(files))]


# ---- targets -------------------------------------------------------------------------------------


def diffusers_settings(rng: np.random.Generator, folder: Path) -> str:
    """A pipeline with other configs, scheduler, index or tokenizer; its weights are not read."""
    _write("diffusers", folder / "m")
    _hurt(rng, _chosen(rng, [f for f in _files(folder) if f.suffix != ".safetensors"]))

    def read() -> None:
        schedule = read_any(folder / "m", with_weights=False).schedule
        if schedule is not None:  # the index names no scheduler any more
            make_schedule(schedule)

    return _judged(read)


def diffusers_weights(rng: np.random.Generator, folder: Path) -> str:
    """A pipeline with other weights, or another list of its files of weights."""
    _write("diffusers", folder / "m")
    files = [f for f in _files(folder) if "safetensors" in f.name]
    _hurt(rng, _chosen(rng, files))
    return _judged(lambda: read_any(folder / "m"))


def single_file(rng: np.random.Generator, folder: Path) -> str:
    """A single file with another header, or other bytes."""
    file = _write("single", folder) / "model.safetensors"
    _hurt(rng, file)
    hints = Hints(tokenizer=str(folder / "tokenizer"))
    return _judged(lambda: read_any(file, hints=hints))


def workdir(rng: np.random.Generator, folder: Path) -> str:
    """A workdir with another configuration, tokenizer or checkpoint."""
    _write("workdir", folder / "m")
    files = _files(folder)
    if rng.random() < 0.5:
        files = [folder / "m" / "config.json"]
    _hurt(rng, _chosen(rng, files))
    return _judged(lambda: read_any(folder / "m"))


def tokenizer(rng: np.random.Generator, folder: Path) -> str:
    """A tokenizer with other files, in either layout, which encodes if it is read."""
    _write("tokenizer", folder)
    if rng.random() < 0.5:
        vocab = json.loads((folder / "vocab.json").read_text())
        merges = (folder / "merges.txt").read_text().splitlines()[1:]
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
        added = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}]
        content = {"model": model, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    _hurt(rng, _chosen(rng, _files(folder)))

    def read() -> None:
        found = Tokenizer.load(folder)
        found.check_vocabulary(found.largest_id + 1, folder)
        assert found.encode([*_WORDS, "\ud800 " * 20]).max() <= found.largest_id

    return _judged(read)


def t5_tokenizer(rng: np.random.Generator, folder: Path) -> str:
    """T5's tokenizer with other files, in either layout, which encodes if it is read."""
    spiece = folder / "spiece.model"
    spiece.write_bytes(_SPIECE.read_bytes())
    if rng.random() < 0.6:
        T5Tokenizer.load(folder, context_length=8).save(folder)
        spiece.unlink()
    _hurt(rng, _chosen(rng, _files(folder)))

    def read() -> None:
        found = T5Tokenizer.load(folder)
        found.check_vocabulary(found.largest_id + 1, folder)
        assert found.encode([*_WORDS, "\ud800 é… " * 20]).max() <= found.largest_id

    return _judged(read)


def safetensors(rng: np.random.Generator, folder: Path) -> str:
    """A safetensors file with another header or other bytes, read in all three ways."""
    file = folder / "a.safetensors"
    values = {"a": np.ones((2, 3), np.float32), "b": np.zeros((), np.int64), "c.d": np.ones(0)}
    save_file(values, file, metadata={"format": "pt"})
    _hurt(rng, file)
    one = SingleDeviceSharding(jax.devices()[0])
    wanted = {"a": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=one)}
    words = [
        _judged(lambda: load_file(file)),
        _judged(lambda: read_header(file)),
        _judged(lambda: read_frozen(paths.to_path(file), wanted)),
    ]
    return max(words)


def clip_settings(rng: np.random.Generator, folder: Path) -> str:
    """The config.json and preprocessor_config.json of a CLIP."""
    config = {
        "model_type": "clip", "projection_dim": 8,
        "text_config": {"hidden_size": 8, "num_attention_heads": 2, "eos_token_id": 2},
        "vision_config": {"hidden_size": 8, "num_attention_heads": 2, "image_size": 32},
    }  # fmt: skip
    picture = {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_rescale": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "picture.json").write_text(json.dumps(picture))
    _hurt(rng, _chosen(rng, _files(folder)))

    def as_group(name: str) -> dict:
        found = read_json(folder / name)
        if not isinstance(found, dict):
            raise UserError(f"{name}: no group")
        return found

    def read() -> None:
        _, vision = read_clip_config(as_group("config.json"), "config.json")
        preprocess = ClipPreprocess.from_json(as_group("picture.json"), "picture.json")
        preprocess.check(vision.image_size, "picture.json")
        preprocess.pixels(np.zeros((1, 8, 8, 3), np.uint8))

    return _judged(read)


def arrays(rng: np.random.Generator, folder: Path) -> str:
    """Statistics in .npz and latents in .npy, damaged or of other numbers."""
    kinds = ("f4", "f8", "c16", "i8", "?", "O", "S3", "U3", "V4", "M8[s]", [("a", "f4")])
    kind = np.dtype(kinds[rng.integers(len(kinds))])
    shapes = [(2,), (2, 2), (3, 2), (), (0,), (1, 4, 4, 4), (2, 2, 2)]
    values = {
        name: np.zeros(shapes[rng.integers(len(shapes))] if rng.random() < 0.4 else shape, kind)
        for name, shape in {"mu": (2,), "sigma": (2, 2), "features": (3, 2)}.items()
    }
    words = ['{"tower": "x"}', "[" * 100_000, "3", '{"a": ' + "9" * 5000 + "}"]
    values["meta"] = np.array(words[rng.integers(len(words))])
    file = io.BytesIO()
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **values)
    latents = io.BytesIO()
    np.save(latents, np.zeros((1, 4, 4, 4), kind))
    for name, data in (("a.npz", file.getvalue()), ("a.npy", latents.getvalue())):
        hurt = mutation.damaged(rng, data) if rng.random() < 0.7 else data
        (folder / name).write_bytes(hurt)
    words = [
        _judged(lambda: reference.read(folder / "a.npz")),
        _judged(lambda: read_latents(str(folder / "a.npy"), 1, (4, 4, 4))),
    ]
    return max(words)


_AUDIT = b"""prompts: [a doctor, a nurse]
pictures_per_prompt: 10
attributes:
  hair: {dark: [dark hair, black hair], fair: fair hair}
  smile: [smiling, serious]
targets: {hair: {dark: 0.7, fair: 0.3}}
labeller: my_package.my_module:label
"""
_SPACE = b"""fields:
  optim.learning_rate: {low: 1e-5, high: 1e-2, log: true}
  train.steps: {low: 10, high: 20, step: 5}
  model.dtype: {choices: [float32, bfloat16]}
metric: loss
pruner: {name: none}
"""
_YAML = (
    b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"!!binary x", b"9" * 5000, b"? ",
    b"[" * 3000, b"{a: " * 300, b": ", b"- ", b"\n", b"2001-99-99", b"1:99:99", b".inf", b".nan",
    b"0x", b"~", b"\t", b"%YAML 9", b"---", b"...", b"'", b'"', b"\\", b"\x00", b"\xff", b"|", b">",
)  # fmt: skip


def yaml(rng: np.random.Generator, folder: Path) -> str:
    """An audit and a search space with other words in them."""
    words = []
    for name, data in (("audit.yaml", _AUDIT), ("space.yaml", _SPACE)):
        hurt = bytearray(mutation.damaged(rng, data) if rng.random() < 0.5 else data)
        for _ in range(rng.integers(0, 4)):
            at = int(rng.integers(len(hurt) + 1))
            hurt[at:at] = _YAML[rng.integers(len(_YAML))]
        (folder / name).write_bytes(hurt)
    words.append(_judged(lambda: read_audit(folder / "audit.yaml")))
    words.append(_judged(lambda: read_space(folder / "space.yaml", Config())))
    return max(words)


TARGETS = [
    (function.__name__, function)
    for function in (
        diffusers_settings, diffusers_weights, single_file, workdir, tokenizer, t5_tokenizer,
        safetensors, clip_settings, arrays, yaml,
    )
]  # fmt: skip
