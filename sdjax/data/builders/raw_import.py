"""TFDS builders that import raw data on first use: an image folder, tar shards, parquet files.

The stored dataset is keyed by a fingerprint of the files (names, sizes and times, and a folder's
metadata), so changed data is imported again. Rows that cannot be used are left out, and listed with
the reason in `skipped.json` beside the dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from sdjax.data import named_images
from sdjax.data.config import DataConfig, DataError
from sdjax.data.named_images import NamedImage
from sdjax.data.raw import clean, folder, formats, parquet, webdataset
from sdjax.data.raw.remedies import unusable
from sdjax.data.raw.rows import SPLITS, Chosen, Fields, Row, Shard, Skip, fraction, passed_over
from sdjax.data.tfds.features import FORMAT
from sdjax.data.tfds.stored import prepare_builder
from sdjax.data.tfds.tfds_on_cpu import quiet_tfds, tfds
from sdjax.system import text_files, untrusted

SKIP_REPORT = "skipped.json"
PASSED_OVER = "passed_over.json"  # members of tars without a row, by ending
TEST_SHARE = 0.03
_OPTIONS = ("text_key", "image_key", "min_side", "max_aspect", "max_pixels", "outside_links")


@dataclasses.dataclass(eq=False)
class ImportConfig(tfds.core.BuilderConfig):
    """The shards of a source, notes about them, and the rules for their rows.

    whole: whether no test split is cut off a source that has none.
    """

    path: str = ""
    shards: list[Shard] = dataclasses.field(default_factory=list, repr=False)
    notes: list[str] = dataclasses.field(default_factory=list, repr=False)
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)
    fields: Fields = Fields()
    rules: clean.Rules = clean.Rules()
    whole: bool = False


def import_config(
    path: str,
    format: str,
    fields: Fields,
    rules: clean.Rules,
    *,
    outside: bool = False,
    whole: bool = False,
) -> ImportConfig:
    """The configuration of an import, named by the folder and a fingerprint of all its content.

    outside: links may lead out of the folder.
    whole: see `ImportConfig`.

    Raises DataError when there is nothing to read.
    """
    survey = formats.survey(path, format, fields, outside=outside)
    identity = f"{formats.fingerprint(survey.shards, fields)} {rules} {outside}"
    identity += " whole" if whole else ""
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    stem = Path(path).expanduser().resolve().name
    base = re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_") or "folder"
    notes = survey.lines()
    if _is_cut(survey.shards) and not whole:
        notes.append(f"split test: {TEST_SHARE:.0%} of them, by a hash of the name")
    return ImportConfig(
        name=f"{base}-{fingerprint}", path=path, shards=survey.shards, notes=notes,
        passed_over=dict(survey.passed_over), fields=fields, rules=rules,
        whole=whole,
    )  # fmt: skip


def feature_types(
    scores: tuple[str, ...] = (), images: tuple[NamedImage, ...] = ()
) -> dict[str, Any]:
    """The features of every dataset made of raw data.

    Scores become float32 features, and named pictures images of their names.
    """
    return {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "text": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "file_name": tfds.features.Text(),
        "width": tfds.features.Scalar(np.int32),
        "height": tfds.features.Scalar(np.int32),
        "original_width": tfds.features.Scalar(np.int32),
        "original_height": tfds.features.Scalar(np.int32),
        **{score: tfds.features.Scalar(np.float32) for score in scores},
        **{one.name: tfds.features.Image(shape=(None, None, one.channels)) for one in images},
    }


def feature_values(example: clean.Example) -> dict[str, Any]:
    """The values of an example's features, as `feature_types` encodes them."""
    height, width = example.pixels.shape[:2]
    return {
        "image": io.BytesIO(example.image),
        "text": example.text,
        "captions": list(example.captions),
        "file_name": example.name,
        "width": width,
        "height": height,
        "original_width": example.original[1],
        "original_height": example.original[0],
        **example.scores,
        **{name: io.BytesIO(encoded) for name, encoded in example.images.items()},
    }


def limit_of_test(names: set[str]) -> float:
    """The limit of `fraction` up to which names become the test split: about 3 %, at least one.

    It is -1, for none, with fewer than two names. Images keep their split as a folder grows.
    """
    fractions = sorted(fraction(name) for name in names)
    if len(fractions) < 2:
        return -1.0
    limit = max(TEST_SHARE, fractions[0])
    return limit if fractions[-1] > limit else -1.0


class RawImport(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Images and captions imported from raw files.

    Features: image (the file's own bytes if it is a plain RGB PNG, JPEG or WebP, else a PNG of the
    decoded picture), text (the main caption), captions (alternatives), file_name, and the size in
    pixels, upright. original_height and original_width are the size before the picture was stored
    smaller, if the data has it. Raise VERSION whenever an image would be chosen or stored in
    another way.
    """

    VERSION = tfds.core.Version("1.4.0")
    RELEASE_NOTES = {
        "1.0.0": "PNG, JPEG and WebP as they are, everything else as PNG.",
        "1.1.0": "Captions, width and height; lists of captions are used.",
        "1.2.0": "Upright JPEGs with EXIF as they are; PNGs of 16 bits as PNGs of 8.",
        "1.3.0": "The size before a picture was stored smaller.",
        "1.4.0": "Each row has a split of its own; more layouts of folders, endings and captions.",
    }
    url_infos = None  # nothing is downloaded

    def _info(self) -> Any:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                feature_types(images=self.builder_config.fields.images)
            ),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        self._skipped: list[Skip] = []
        self._passed_over: dict[str, Counter[str]] = {}  # by shard
        generators = {}
        for split, shards, chosen in _splits(config.shards, config.fields, config.whole):
            # A split without any usable image must not be written: read the first one.
            examples = self._examples(shards, chosen)
            first = next(examples, None)
            if first is None:
                logging.warning("%s: no usable image for the split %s", config.path, split)
            else:
                generators[split] = self._generate_examples(first, examples)
        if not generators:
            options = {name: f"data.{name}" for name in _OPTIONS}
            others = config.passed_over | self._all_passed_over()
            raise DataError(
                f"data.path is {config.path!r}, of which not one image can be used: "
                f"{summary(self._skipped)}; expected images, each with a caption (data.text_key is "
                f"{config.fields.text!r}){unusable(self._skipped, others, options)}"
            )
        return generators

    def _generate_examples(
        self, first: clean.Example, others: Iterator[clean.Example]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(itertools.chain([first], others)):
            yield index, feature_values(example)
        # Here data_path is the unfinished dataset, so the report appears together with it.
        report = [dataclasses.asdict(skip) for skip in self._skipped]
        (self.data_path / SKIP_REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False))
        (self.data_path / PASSED_OVER).write_text(json.dumps(self._all_passed_over()))

    def _all_passed_over(self) -> dict[str, int]:
        return dict(sum(self._passed_over.values(), Counter()))

    def _examples(self, shards: list[Shard], chosen: Chosen) -> Iterator[clean.Example]:
        """The usable examples of shards; the others are added to the skips."""
        config = self.builder_config
        for shard in shards:
            # A shard that is read for two splits is counted once.
            counts = self._passed_over[shard.path] = Counter()
            for item in formats.read(shard, config.fields, chosen, counts):
                made = clean.clean(item, config.rules) if isinstance(item, Row) else item
                if isinstance(made, Skip):
                    self._skipped.append(made)
                else:
                    yield made


class ImageTextFolder(RawImport):
    """An image folder: metadata.jsonl, metadata.csv, or a .txt beside each image."""


class Webdataset(RawImport):
    """Tar shards as img2dataset writes them."""


class Parquet(RawImport):
    """Parquet files with image bytes and captions."""


_BUILDERS = {
    folder.FORMAT: ImageTextFolder, webdataset.FORMAT: Webdataset, parquet.FORMAT: Parquet
}  # fmt: skip


def _splits(
    shards: list[Shard], fields: Fields, whole: bool
) -> Iterator[tuple[str, list[Shard], Chosen]]:
    """Yield each split, its shards, and a function that chooses its rows.

    A source of train alone is split by name, but for `whole`. Every row, and every skip, is in
    exactly one split.
    """
    if whole and _is_cut(shards):
        yield "train", shards, lambda name, split: True
        return
    if not _is_cut(shards):
        for wanted in SPLITS:
            group = [shard for shard in shards if wanted in shard.splits]
            if group:
                yield wanted, group, functools.partial(_is_of, wanted)
        return
    limit = limit_of_test({name for shard in shards for name in formats.names(shard, fields)})
    yield "train", shards, lambda name, split: fraction(name) > limit
    if limit >= 0:
        yield "test", shards, lambda name, split: fraction(name) <= limit


def _is_cut(shards: list[Shard]) -> bool:
    """Whether the source has the split train alone, of which a part becomes test."""
    return all(shard.splits == ("train",) for shard in shards)


def _is_of(wanted: str, name: str, split: str) -> bool:
    """Whether a row's split is the wanted one."""
    return split == wanted


def summary(skipped: list[Skip]) -> str:
    """Counts by reason, such as "3 skipped (2 truncated, 1 no_caption)"."""
    reasons = Counter(skip.reason for skip in skipped).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    return f"{len(skipped)} skipped" + (f" ({counts})" if counts else "")


def _line(skip: Skip) -> str:
    """A line about a skip."""
    return f"{skip.name}: {skip.reason}" + (f" ({skip.detail})" if skip.detail else "")


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning, each message once."""
    logging.warning(message)


_REMEDY = "delete the folder: it is imported again"


def read_skipped(builder: Any) -> list[Skip]:
    """The rows that the import left out, from its report."""
    file = builder.data_path / SKIP_REPORT
    with untrusted.explained(file, "an import's report", remedy=_REMEDY):
        return [Skip(**entry) for entry in text_files.read_json(file, most=untrusted.MOST_TEXT)]


def prepare(config: DataConfig) -> Any:
    """Import config.path unless its present content was imported; report the rows left out.

    Raises DataError when nothing is usable, or more is skipped than config.max_bad_examples.
    """
    images = named_images.stored(config.images)
    fields = Fields(image=config.image_key, text=config.text_key, images=images)
    texts = config.captions.texts
    needed = not texts or any("{}" in text for text in texts)
    rules = clean.Rules(
        min_side=config.min_side, max_aspect=config.max_aspect, max_pixels=config.max_pixels,
        min_caption_chars=int(needed), images=images,
    )  # fmt: skip
    with quiet_tfds():
        builder = _BUILDERS[config.name](
            config=import_config(
                config.path,
                config.name,
                fields,
                rules,
                outside=config.outside_links,
                whole=config.eval_split == config.split,
            ),
            data_dir=config.data_dir or None,
            file_format=FORMAT,
        )
    prepare_builder(builder)
    builder.notes = builder.builder_config.notes
    others_file = builder.data_path / PASSED_OVER
    with untrusted.explained(others_file, "an import's report", remedy=_REMEDY):
        if others := text_files.read_object(others_file):
            builder.notes = [*builder.notes, f"in tars, {passed_over(others)}"]
    skipped = read_skipped(builder)
    report = Path(builder.data_path) / SKIP_REPORT
    if skipped:
        _warn_once(f"{config.path}: {summary(skipped)}, listed in {report}")
    if 0 <= config.max_bad_examples < len(skipped):
        some = "\n  ".join(_line(skip) for skip in skipped[:10])
        raise DataError(
            f"{config.path}: {summary(skipped)}, more than data.max_bad_examples = "
            f"{config.max_bad_examples}; mend them or raise the limit. All are in {report}:\n"
            f"  {some}"
        )
    return builder
