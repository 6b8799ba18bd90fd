"""From pictures to records: the networks that encode ahead, and one shard of what they make."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.config import Config
from sdjax.data import encoded, named_images, transforms
from sdjax.data.config import DataError
from sdjax.data.encoded import Encoding
from sdjax.data.sources import Source
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.conditioning import encode_text, make_conditioner
from sdjax.families.registry import model_of
from sdjax.system import paths

Example = dict[str, Any]


def make_vae_encoder(config: Config, params: Mapping[str, Any], batch: int) -> Callable:
    """A function images float32 [n <= batch, H, W, 3] -> moments float32 [n, h, w, 2C].

    It runs on all devices of this host, and compiles once for each H, W.
    """
    networks = bind(model_of(config.model), ("vae",), dtype=config.model.dtype)

    def encode(vae: Any, images: jax.Array) -> jax.Array:
        return networks.module("vae", vae).encode(images).astype(jnp.float32)

    return _on_this_host(encode, {path: params[path] for path in networks.abstract}, batch)


def make_text_encoder(
    config: Config, params: Mapping[str, Any], tokenizers: Mapping[str, Any], batch: int
) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """Return a function n texts -> {"context": float32 [n, L, D], ...}, the family's features.

    Raises:
        UserError: the texts may have words that the run is still to learn.
    """
    model = model_of(config.model)
    for name, encoder in model.text_encoders.items():
        if tokenizers[model.family.parts[name].tokens].largest_id >= encoder.vocab_size:
            raise UserError(
                f"method {config.method.name!r} learns words that {name} does not have yet: their "
                "features cannot be encoded ahead; encode the pictures alone"
            )
    conditioner = make_conditioner(model, tokenizers, dtype=config.model.dtype)
    own = {path: params[path] for path in conditioner.networks.abstract}
    run = _on_this_host(conditioner.embed, own, batch)

    def texts_to_embeddings(texts: Sequence[str]) -> dict[str, np.ndarray]:
        parts = [
            run(encode_text(tokenizers, texts[start : start + batch]))
            for start in range(0, len(texts), batch)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return texts_to_embeddings


def _on_this_host(function: Callable, params: Mapping[str, Any], batch: int) -> Callable:
    """`function(params, inputs)` over the devices of this host, for up to `batch` rows."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    spread, on_all = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    placed = jax.device_put({path: np.asarray(v) for path, v in params.items()}, on_all)
    compiled = jax.jit(function)

    def run(inputs: Any) -> Any:
        count = len(jax.tree.leaves(inputs)[0])

        def padded(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([rows, np.repeat(rows[-1:], batch - count, 0)])

        made = compiled(placed, jax.device_put(jax.tree.map(padded, inputs), spread))
        return jax.tree.map(lambda rows: np.asarray(rows, np.float32)[:count], made)

    return run


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that all shards of a split share.

    shapes: (height, width) of each example's crop, None where `data.buckets` refuses it.
    embed: texts to embeddings, None to keep captions alone.
    """

    source: Source
    shapes: Sequence[tuple[int, int] | None]
    config: Config
    batch: int
    encoding: Encoding
    encode: Callable[[np.ndarray], np.ndarray]
    embed: Callable[[Sequence[str]], dict[str, np.ndarray]] | None


def encode_shard(
    job: Job,
    indices: Sequence[int],
    dropped: dict[str, list[str]],
    *,
    done: Callable[[int], None] = lambda count: None,
) -> list[Example]:
    """Examples in the order of `indices`; what cannot be encoded goes to `dropped`, by reason.

    Args:
        done: is told how many more have been looked at.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        shape = job.shapes[index]
        if shape is None:
            dropped.setdefault("refused by data.buckets", []).append(job.source.key(index))
            done(1)
        else:
            groups.setdefault(shape, []).append(index)
    made: dict[int, Example] = {}
    for shape, members in groups.items():
        for start in range(0, len(members), job.batch):
            some = members[start : start + job.batch]
            made |= _encode_some(job, some, shape, dropped)
            done(len(some))
    examples = [made[index] for index in sorted(made)]
    if job.embed is not None and examples:
        _add_text(examples, job.embed)
    return [example for example in examples if _is_finite(example, dropped)]


def _encode_some(
    job: Job, indices: Sequence[int], shape: tuple[int, int], dropped: dict[str, list[str]]
) -> dict[int, Example]:
    """At most a batch of one shape."""
    loaded: dict[int, Example] = {}
    for index in indices:
        try:
            loaded[index] = _load(job, index, *shape)
        except DataError as error:
            if error.__cause__ is None:  # an order of the configuration, and no broken record
                raise
            print(f"left out: {error}", file=sys.stderr, flush=True)
            dropped.setdefault("cannot be read", []).append(f"example {index}")
    names = ("image", *job.encoding.encoded_images)
    fields = zip(names, named_images.moment_fields(names[1:]), strict=True)
    for (name, field), side in itertools.product(fields, encoded.sides(job.encoding)):
        if loaded:
            images = np.stack([example.pop(f"{name}{side}") for example in loaded.values()])
            for example, moments in zip(loaded.values(), job.encode(images), strict=True):
                example[f"{field}{side}"] = moments
    return loaded


def _is_finite(example: Example, dropped: dict[str, list[str]]) -> bool:
    for name, array in example.items():
        if _is_moments(name) or name in encoded.TEXT_FIELDS:
            if not np.isfinite(array).all():
                what = name.removesuffix("_flipped")
                dropped.setdefault(f"NaN or Inf in {what}", []).append(example["file_name"])
                return False
    return True


def _is_moments(field: str) -> bool:
    """Whether a field of a record holds moments."""
    return field.removesuffix("_flipped").rpartition("_")[2] == "moments"


def _load(job: Job, index: int, height: int, width: int) -> Example:
    """One example, cropped as training would; a random crop is drawn once, from seed and index."""
    example, data = job.source[index], job.config.data
    made: Example = {}
    for mirror in (False, True)[: 1 + job.encoding.flipped]:
        prepared = transforms.prepare(
            example["image"], np.random.default_rng([job.config.seed, index]), height=height,
            width=width, crop=data.crop, flip=False, mirror=mirror, original=example["original"],
            images=example["images"],
        )  # fmt: skip
        side = "_flipped" if mirror else ""
        made |= {f"image{side}": prepared.image, f"size{side}": prepared.size}
        for name in job.encoding.encoded_images:
            made[f"{name}{side}"] = _pixels(prepared, name)
        if not mirror:
            kept = job.encoding.kept_images
            made |= {name: encoded.to_png(prepared.images[name]) for name in kept}
    caption = example["caption"]
    return made | {
        **example.get("numbers", {}),
        "text": caption.main,
        "captions": list(caption.others),
        # Of label templates; which of several captions to take is decided by those who train.
        "main_share": 1.0 if data.captions.others_key else caption.main_share,
        "weight": example.get("weight", np.float32(1)),  # data.weight_key="weight" takes it
        "file_name": job.source.key(index),
        "height": height,
        "width": width,
    }


def _pixels(prepared: transforms.Prepared, name: str) -> np.ndarray:
    """The picture of this name as the VAE takes it, float32 [H, W, 3] in [-1, 1]."""
    if name == named_images.MASKED:
        return prepared.image * (transforms.scaled(prepared.images[named_images.MASK]) < 0.5)
    return transforms.normalise(prepared.images[name])


def _add_text(examples: list[Example], embed: Callable) -> None:
    """Embeddings of the main caption and of the others, [captions, ...]."""
    texts = [[example["text"], *example["captions"]] for example in examples]
    made = embed([text for some in texts for text in some])
    start = 0
    for example, some in zip(examples, texts, strict=True):
        example |= {name: rows[start : start + len(some)] for name, rows in made.items()}
        start += len(some)


def _packed(example: Example, encoding: Encoding) -> Example:
    """As `encoded.features` has it."""
    packed: Example = {"shape": np.asarray(example["moments"].shape, np.int32)}
    if encoding.has_text:  # some families have no pooled caption
        packed |= {"pooled": b"", "pooled_shape": np.zeros(2, np.int32)}
    for name, value in example.items():
        if _is_moments(name) or name in encoded.TEXT_FIELDS:
            packed[name] = encoded.pack(value, encoding.dtype)
            if name in encoded.TEXT_FIELDS:
                packed[f"{name}_shape"] = np.asarray(value.shape, np.int32)
        else:
            packed[name] = value
    return packed


def write_records(
    file: paths.Path, examples: Sequence[Example], features: Any, encoding: Encoding
) -> int:
    """One ArrayRecord file, whole or not at all; gives its bytes without what frames them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    size = 0
    with paths.writing(file) as local:
        writer = ArrayRecordWriter(str(local), "group_size:1")
        for example in examples:
            data = features.serialize_example(features.encode_example(_packed(example, encoding)))
            size += len(data)
            writer.write(data)
        writer.close()
    return size
