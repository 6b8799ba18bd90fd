"""Encoding ahead: pictures to VAE moments and captions to embeddings, once for all epochs.

Each host encodes and writes its own shards with its own devices and never waits for another. A
shard appears whole or not at all, so the same command goes on after an interruption. When all
shards are there the first host describes the dataset, which makes it readable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.assemble import Assembled, assemble, check_complete
from sdjax.config import Config, to_dict
from sdjax.data import encoded, named_images, numbers
from sdjax.data.config import is_encoded, parts
from sdjax.data.encoded import Encoding
from sdjax.data.sources import Source, open_source
from sdjax.data.stream import bucketed
from sdjax.data.tfds.dataset_folder import Stored, file_name, write_metadata
from sdjax.encoding.encoder import (
    Job,
    encode_shard,
    make_text_encoder,
    make_vae_encoder,
    write_records,
)
from sdjax.errors import UserError
from sdjax.families.registry import FAMILIES
from sdjax.methods.registry import METHODS
from sdjax.models.params import component
from sdjax.system import locks, paths, progress, text_files, untrusted

DATASET = "encoded"  # the name of the TFDS dataset, and of its files
# Those of the encoder; the weights tell of the rest.
VAE_SETTINGS = ("down_block_types", "norm_num_groups", "mid_block_add_attention", "use_quant_conv")
WAIT = 3600.0  # seconds the first host waits for a new shard of another


@dataclasses.dataclass(frozen=True)
class Options:
    """The parts that are kept, and how the work is cut. The rest is the configuration's."""

    splits: tuple[str, ...] = ()  # () takes data.split and data.eval_split
    text: bool = False  # embeddings too
    flipped: bool = False  # mirrored pictures too
    dtype: str = "bfloat16"
    batch: int = 16  # a device and call
    shard_examples: int = 1024

    def __post_init__(self) -> None:
        if self.dtype not in encoded.DTYPES:
            raise UserError(f"--encode_dtype is {self.dtype!r}; expected {sorted(encoded.DTYPES)}")
        for name in ("batch", "shard_examples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class Report:
    """examples written and dropped {reason: names}, by split."""

    examples: dict[str, int]
    dropped: dict[str, dict[str, list[str]]]


def encode_dataset(
    config: Config, output: str, options: Options, *, host: int = 0, hosts: int = 1
) -> Report | None:
    """Encode the splits of config.data into the folder `output`; host 0 gives the report.

    Raises:
        UserError: the configuration cannot be encoded, networks are missing, or the folder holds
            something else.
    """
    if not config.draws or config.data.mixture or is_encoded(config.data):
        raise UserError(
            "only a method that draws from prompts, with one dataset of pictures, can be encoded; "
            "for a mixture encode each part, and mix what comes out"
        )
    assembled = assemble(config)
    config = assembled.config
    wanted = ("vae", *(config.model.text_encoders if options.text else ()))
    check_complete(config, assembled.params, {f"{name}.": None for name in wanted})
    data, kind = config.data, METHODS[config.method.name]
    splits = options.splits or tuple(dict.fromkeys((data.split, data.eval_split)))
    if slices := [split for split in splits if not split.isidentifier()]:
        raise UserError(
            f"--splits: {slices} cannot be names of encoded splits; encode them whole, and give "
            "slices to data.split when you train"
        )
    columns = numbers.of_columns(FAMILIES[config.model.family].numbers)
    encoding = Encoding(
        dataset=open_source(data, data.split).name,
        networks={name: fingerprint(assembled, name) for name in wanted},
        dtype=options.dtype,
        resolution=data.resolution,
        crop=data.crop,
        buckets=encoded.bucket_fields(data),
        flipped=options.flipped,
        selection=encoded.selection(data),
        images=dict(kind.encodes(config.method, named_images.kinds_of(data.images))),
        numbers={name: list(shape) for name, shape in columns.items()},
    )
    folder = paths.to_path(output)
    _begin(folder, encoding, options)
    batch = options.batch * jax.local_device_count()
    encode = make_vae_encoder(config, assembled.params, batch)
    embed = None
    if options.text:
        embed = make_text_encoder(config, assembled.params, assembled.tokenizers, batch)
    from sdjax.data.tfds.tfds_on_cpu import tfds

    features = encoded.features(tfds, encoding)
    every = []
    for split in splits:
        source = open_source(data, split, columns=columns)
        shards = Shards(folder, split, len(source), options.shard_examples)
        job = Job(source, _shapes(config, source), config, batch, encoding, encode, embed)
        _encode_split(job, shards, features, host=host, hosts=hosts)
        every.append(shards)
    return _describe(every, encoding, features) if host == 0 else None


def _encode_split(job: Job, shards: Shards, features: Any, *, host: int, hosts: int) -> None:
    """Every shard of this host that is not there yet."""
    mine = shards.missing(host, hosts)
    total = sum(len(shards.indices(shard)) for shard in mine)
    with progress.work(f"encoding {shards.split}", total, unit="examples") as work:
        for shard in mine:
            dropped: dict[str, list[str]] = {}
            examples = encode_shard(job, shards.indices(shard), dropped, done=work.advance)
            size = write_records(shards.file(shard), examples, features, job.encoding)
            note = {"examples": len(examples), "bytes": size, "dropped": dropped}
            paths.write_text(shards.note(shard), json.dumps(note))


def _shapes(config: Config, source: Source) -> list[tuple[int, int] | None]:
    """Return (height, width) of each example's crop; None for one that buckets refuse."""
    side = config.data.resolution
    if not config.data.buckets.step:
        return [(side, side)] * len(source)
    shapes: list[tuple[int, int] | None] = [None] * len(source)
    found = bucketed(config.data, source)
    for shape, members in zip(found.shapes, found.members, strict=True):
        for index in members:
            shapes[int(index)] = shape
    return shapes


def _begin(folder: paths.Path, encoding: Encoding, options: Options) -> None:
    """Raises UserError if the folder was begun with other settings."""
    file = folder / "started.json"
    settings = {**dataclasses.asdict(encoding), "shard_examples": options.shard_examples}
    paths.make_folder(folder)
    if paths.exists(file):
        before = text_files.read_object(file)
        changed = [k for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise UserError(
                f"{folder} was begun with other settings ({', '.join(changed)}); give the same to "
                "go on, or another --output"
            )
    elif any(not locks.is_lock(path) for path in folder.iterdir()):
        raise UserError(f"--output={folder} is not empty, and nothing encoded; give another folder")
    else:
        paths.write_text(file, json.dumps(settings, indent=1) + "\n")


def _describe(every: Sequence[Shards], encoding: Encoding, features: Any) -> Report:
    """Write the metadata that make the dataset readable, when all shards of all hosts are there."""
    stored, dropped = {}, {}
    for shards in every:
        notes = shards.notes(timeout=WAIT)
        stored[shards.split] = Stored(
            [note["examples"] for note in notes], sum(n["bytes"] for n in notes)
        )
        dropped[shards.split] = _together(note["dropped"] for note in notes)
    folder = every[0].folder
    write_metadata(
        folder, dataset=DATASET, features=features, splits=stored,
        description=f"{encoding.dataset}, encoded for training by sdjax.",
    )  # fmt: skip
    encoded.write(folder, encoding, dropped)
    return Report({split: sum(s.lengths) for split, s in stored.items()}, dropped)


def _together(parts: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in parts:
        for reason, names in part.items():
            found.setdefault(reason, []).extend(names)
    return found


def check_encoded(config: Config, assembled: Assembled | None, trained: Collection[str]) -> None:
    """That what was encoded ahead is what this run would have encoded itself.

    assembled: the networks; None to resume, for then they are those of the start.
    trained: paths of the parameters that are.

    Raises:
        UserError: listing what differs: settings, weights, or a text encoder that is trained.
    """
    if not is_encoded(config.data):
        return
    if not config.draws:
        raise UserError(
            f"data.name is 'encoded', but method.name is {config.method.name!r}, which trains "
            "on pictures: give it those"
        )
    with_text = config.data.text_embeddings
    encoders = config.model.text_encoders
    if with_text and any(path.split(".")[0] in encoders for path in trained):
        raise UserError(
            "data.text_embeddings is True, but a text encoder is trained, which the stored "
            "embeddings cannot follow: freeze it in optim.groups, or train on captions"
        )
    if any(path.startswith("vae") for path in trained):
        raise UserError("data.name is 'encoded', but the VAE is trained, which stored moments "
                        "cannot follow: give it pictures")  # fmt: skip
    for data in parts(config.data):
        encoding = encoded.read(data.path)
        if with_text and not encoding.has_text:
            raise UserError(
                f"data.text_embeddings is True, but {data.path} has none; encode it with "
                "--encode_text, or set data.text_embeddings to False"
            )
        names = () if assembled is None else tuple(encoding.networks) if with_text else ("vae",)
        encoded.check(data, encoding, {n: fingerprint(assembled, n) for n in names if assembled})


def fingerprint(assembled: Assembled, name: str) -> str:
    """Return a digest of all that decides how a network encodes a picture or a caption.

    The weights as float32 (of a VAE those of the encoder), the settings, for a text encoder its
    tokenizer and the settings of its family that change features; the same wherever they come from.
    """
    model, params = assembled.config.model, component(assembled.params, name)
    if name == "vae":
        params = {p: v for p, v in params.items() if not p.startswith(("decoder", "post_quant"))}
        settings = {k: v for k, v in to_dict(model.vae).items() if k in VAE_SETTINGS}
    else:
        encoder, family = model.networks[name], FAMILIES[model.family]
        settings = {
            **{k: v for k, v in to_dict(encoder).items() if k not in encoder.inert},
            **{k: model.settings[k] for k in family.encodes},
            "tokenizer": assembled.tokenizers[model.parts[name].tokens].identity,
        }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, value in sorted(params.items()):
        array = np.ascontiguousarray(np.asarray(value, np.float32))
        digest.update(f"{path}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]


def _noted(file: paths.Path) -> dict[str, Any]:
    """The note beside a shard."""
    with untrusted.explained(file, "the note of a shard", remedy="delete it and its shard"):
        note = text_files.read_object(file, most=untrusted.MOST_TEXT)
        examples, size, dropped = (note[name] for name in ("examples", "bytes", "dropped"))
        names = {reason: [str(name) for name in found] for reason, found in dropped.items()}
        return {"examples": int(examples), "bytes": int(size), "dropped": names}


class Shards:
    """The files of one split: which records each has, and which of them this host writes."""

    def __init__(self, folder: paths.Path, split: str, examples: int, per_shard: int):
        self.folder, self.split, self.examples = folder, split, examples
        self.count = max(1, -(-examples // per_shard))
        self.per_shard = per_shard

    def file(self, shard: int) -> paths.Path:
        """Return the file of a shard's records."""
        return self.folder / file_name(DATASET, self.split, shard, self.count)

    def note(self, shard: int) -> paths.Path:
        """Beside it: how many records it has, their bytes, and what is not among them."""
        return self.folder / f"{self.file(shard).name}.json"

    def indices(self, shard: int) -> range:
        """Return the places in the source of a shard's records."""
        first = shard * self.per_shard
        return range(first, min(first + self.per_shard, self.examples))

    def missing(self, host: int, hosts: int) -> list[int]:
        """Those of a host that are still to be written."""
        return [s for s in range(host, self.count, hosts) if not paths.exists(self.note(s))]

    def notes(self, *, timeout: float) -> list[dict[str, Any]]:
        """Wait for the notes of all shards, and return them.

        Raises:
            UserError: after `timeout` seconds without a new one.
        """
        last, seen = time.monotonic(), -1
        while True:
            found = [s for s in range(self.count) if paths.exists(self.note(s))]
            if len(found) == self.count:
                return [_noted(self.note(s)) for s in range(self.count)]
            if len(found) > seen:
                last, seen = time.monotonic(), len(found)
            if time.monotonic() - last > timeout:
                raise UserError(
                    f"{self.folder}: {self.count - len(found)} of {self.count} shards of "
                    f"{self.split} are not there, and none has come for {timeout:.0f} s; run the "
                    "same command again, on all hosts: it goes on with what is missing"
                )
            time.sleep(1)
