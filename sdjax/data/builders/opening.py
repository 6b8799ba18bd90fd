"""Opening the TFDS builder of a configured dataset of any kind."""

from __future__ import annotations

from typing import Any

from sdjax.data.config import RAW_NAMES, WITH_PATH, DataConfig, DataError
from sdjax.data.tfds.stored import INFO, builder_from_directory, prepare_builder
from sdjax.system import paths, text_files, untrusted


def prepared_builder(config: DataConfig) -> Any:
    """The TFDS builder of a dataset, prepared (generated, imported or downloaded) if need be.

    Raises DataError for an unknown name, an empty or missing folder, or a dataset that was stored
    in a format without random access.
    """
    if config.name in RAW_NAMES:
        from sdjax.data.builders import raw_import

        return raw_import.prepare(config)
    if config.name in ("prepared", "encoded"):
        return _prepared_folder(config)
    if config.name == "captioned_shapes":
        from sdjax.data.builders import captioned_shapes

        builder = captioned_shapes.make_builder(
            data_dir=config.data_dir,
            train_examples=config.shapes_train,
            test_examples=config.shapes_test,
            pair_fraction=config.shapes_pairs,
            colours=config.shapes_colours,
            rare=config.shapes_rare,
        )
        prepare_builder(builder)
        return builder
    builder = _named_builder(config)
    prepare_builder(builder, quiet=False)
    return builder


def _prepared_folder(config: DataConfig) -> Any:
    """The builder of a dataset that `sdjax.prepare` wrote, read in its place."""
    if not (paths.to_path(config.path) / INFO).exists():
        raise DataError(
            f"data.path is {config.path!r}, where there is no {INFO}; expected the "
            "--output of a run of sdjax.prepare that is finished"
        )
    builder = builder_from_directory(config.path)
    try:
        report = text_files.read_json(paths.to_path(config.path) / "report.json")
        builder.notes = [f"when it was prepared: {note}" for note in report["notes"]]
    except paths.storage_errors(text_files.TextError, KeyError, TypeError):
        pass  # encoded datasets have no report, and nothing else needs it
    return builder


def _named_builder(config: DataConfig) -> Any:
    """The builder of a dataset that TFDS knows by name."""
    from sdjax.data.tfds.tfds_on_cpu import tfds

    try:
        return tfds.builder(config.name, data_dir=config.data_dir or None, try_gcs=False)
    except untrusted.damage(tfds.core.registered.DatasetNotFoundError) as error:
        raise DataError(
            f"data.name is {config.name!r}, which TFDS cannot open: {str(error)[:500]}\nexpected "
            f"'captioned_shapes', one of {WITH_PATH} (with data.path), or a name of "
            "https://www.tensorflow.org/datasets/catalog, or of a dataset in data.data_dir"
        ) from error
