"""Datasets that TFDS stores: prepared, or opened from folders of unknown origin.

The files of such a folder name classes. TFDS imports the module of a class that it does not know,
which runs the module. Here the files are read first, and a file that names another class is
refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from absl import logging

from sdjax.data.config import DataError
from sdjax.data.tfds.features import FORMAT
from sdjax.errors import cause_of, system_error
from sdjax.system import paths, text_files, untrusted

# The files that describe a dataset; either may hold its features.
INFO, FEATURES = "dataset_info.json", "features.json"
# Up to this many examples, the announced number is not checked against the size of the shards.
_MANY = 10_000_000
_LONGEST_NAME = 300  # letters


def builder_from_directory(folder: paths.PathLike) -> Any:
    """Return the TFDS builder of a stored dataset. Every folder is opened by this function.

    Raises:
        DataError: a file of the folder cannot be read. Or it names a class that is not of TFDS, a
            file outside the folder, or more examples than there are.
    """
    from sdjax.data.tfds.tfds_on_cpu import quiet_tfds, tfds

    where = paths.to_path(folder)
    _check_kinds(where)
    check_classes(where)
    with quiet_tfds(), untrusted.explained(where, "a dataset of TFDS", error=DataError):
        builder = tfds.builder_from_directory(str(where))
        _check_names(where, builder)
        _check_splits(where, builder)
    return builder


def _check_kinds(folder: paths.Path) -> None:
    """Check that a folder holds files and folders alone, and no long list of labels.

    TFDS would wait for a pipe for ever, and reads lists of labels whole.
    """
    if paths.is_remote(folder):
        return
    for file in folder.iterdir():
        if file.is_dir():
            continue
        size = untrusted.check_regular(file) if file.exists() else 0
        if file.name.endswith(".labels.txt") and size > untrusted.MOST_JSON:
            raise DataError(f"{file}: {size:,} bytes; expected at most {untrusted.MOST_JSON:,}")


def check_classes(folder: paths.Path) -> None:
    """Check that the files of a stored dataset name feature classes of TFDS alone.

    Raises:
        DataError: one of them names another class, or is no JSON.
    """
    from sdjax.data.tfds.tfds_on_cpu import foreign, own_classes

    known = own_classes()
    for name in (INFO, FEATURES):
        file = folder / name
        if not paths.exists(file):
            continue
        with untrusted.explained(file, "a file of TFDS", error=DataError):
            classes = list(class_names(text_files.read_json(file)))
        for found in classes:
            if not isinstance(found, str) or found not in known:
                raise DataError(f"{file} {foreign(found)}")


def class_names(content: Any) -> Iterator[Any]:
    """Yield the class names in features.json or dataset_info.json.

    They are found at any depth, in every spelling that TFDS reads, and in JSON within the JSON.
    """
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            if key in ("pythonClassName", "python_class_name"):
                yield inner
            elif key == "type" and "content" in value and not isinstance(inner, dict):
                yield inner  # the spelling of TFDS before 4.4
            elif key == "json" and isinstance(inner, str):
                nested = json.loads(inner)
                untrusted.check_depth(nested)
                left.append(nested)
            else:
                left.append(inner)


def _check_names(folder: paths.Path, builder: Any) -> None:
    """Check that names which errors and reports repeat are short and printable."""
    info = builder.info
    for name in (info.full_name, *info.splits, *info.features):
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
            raise DataError(
                f"{folder}: the name {untrusted.brief(name)} of the dataset, a split or a feature; "
                f"expected at most {_LONGEST_NAME} letters that can be printed"
            )


def _check_splits(folder: paths.Path, builder: Any) -> None:
    """Check that a dataset's shards lie in its folder, and can have the announced examples.

    A number in dataset_info.json, which may be anything, decides how much memory is allocated.
    """
    for name, split in builder.info.splits.items():
        lengths = split.shard_lengths
        files = list(split.filepaths)
        outside = [file for file in files if file.parent != files[0].parent or ".." in file.parts]
        if outside or (files and str(files[0].parent) != str(folder)):
            raise DataError(
                f"{folder / INFO}: split {untrusted.brief(name)} is in "
                f"{untrusted.brief(str((outside or files)[0]))}; expected files of that folder"
            )
        if min(lengths, default=0) < 0 or len(files) != len(lengths):
            raise DataError(f"{folder / INFO}: split {untrusted.brief(name)} has shards of "
                            f"{untrusted.brief(lengths)} examples")  # fmt: skip
        if sum(lengths) <= _MANY:
            continue
        for file, length in zip(files, lengths, strict=True):
            size = untrusted.check_regular(paths.to_path(str(file)))
            if length > size:
                raise DataError(
                    f"{folder / INFO}: split {untrusted.brief(name)} has {length:,} examples in "
                    f"{file}, which has {size:,} bytes; get that file again, or the dataset"
                )


def prepare_builder(builder: Any, *, quiet: bool = True) -> None:
    """Write the dataset if it is missing; safe when several hosts try at once.

    Raises DataError when it cannot be written. In a bucket none is: ArrayRecord's library reads
    from there, but writes files alone.
    """
    from sdjax.data.tfds.tfds_on_cpu import quiet_tfds

    if builder.data_path.exists():
        if not builder.info.splits:  # another process has written them since the builder was made
            _read_info(builder)
        return
    if paths.is_remote(builder.data_path):
        raise DataError(
            f"{builder.info.full_name} is not in {builder.data_dir}, and cannot be prepared in a "
            "bucket; prepare it with a local data.data_dir (a run of one step), and copy that "
            "folder there: `gcloud storage cp -r DIR/* gs://BUCKET/FOLDER`"
        )
    logging.info("preparing %s in %s, once", builder.info.full_name, builder.data_dir)
    try:
        with quiet_tfds() if quiet else contextlib.nullcontext():
            builder.download_and_prepare(file_format=FORMAT)
    except Exception as error:
        if not isinstance(error, paths.storage_errors()) and system_error(error) is None:
            raise
        # Another process on a shared disk may have finished first: its rename made ours fail.
        if not (builder.data_path / INFO).exists():
            raise DataError(
                f"cannot prepare {builder.info.full_name} in {builder.data_dir}: "
                f"{'; '.join(cause_of(error))}; data.data_dir (or $TFDS_DATA_DIR) must be a "
                "writable folder with room, and a dataset that TFDS downloads needs the network"
            ) from error
        _read_info(builder)
    if not builder.info.splits:  # TFDS found a finished dataset, and left it at that
        _read_info(builder)


def _read_info(builder: Any) -> None:
    """Have a builder know the splits that another process wrote."""
    with untrusted.explained(builder.data_path, "a dataset of TFDS", error=DataError):
        builder.info.read_from_directory(builder.data_path)
