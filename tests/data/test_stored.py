"""Stored datasets that strangers made: nothing of theirs is imported, and no number is believed."""

import ast
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from sdjax.data.config import DataConfig, DataError
from sdjax.data.sources import open_source
from sdjax.data.tfds import stored
from sdjax.data.tfds.records import Records
from sdjax.data.tfds.tfds_on_cpu import own_classes, tfds
from sdjax.errors import UserError
from tests.fuzz import stored_dataset

TEXT = "tensorflow_datasets.core.features.text_feature.Text"
EVIL = {"pythonClassName": "evil_module.Feature", "jsonFeature": {"json": "{}"}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stored_dataset.write(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def folder(dataset, tmp_path):
    return Path(shutil.copytree(dataset, tmp_path / "data"))


@pytest.fixture
def evil_module(tmp_path, monkeypatch):
    """A module in the working directory, which Python would import, and run."""
    (tmp_path / "evil_module.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert not Path("ran").exists() and "evil_module" not in sys.modules


def change(file, edit):
    """Edit a JSON file by a function of its content."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def features_of(content):
    return content["featuresDict"]["features"]


def test_unspoilt_dataset_is_read(folder):
    pictures = stored_dataset.read(folder)
    assert [int(p[0, 0, 0]) for p in pictures] == [0, 60, 120, 180]


def at_the_top(content):
    content["pythonClassName"] = "evil_module.Feature"


def as_a_feature(content):
    features_of(content)["more"] = EVIL


def in_snake_case(content):
    features_of(content)["more"] = {"python_class_name": "evil_module.Feature"}


def in_a_sequence(content):
    features_of(content)["captions"]["sequence"]["feature"] = EVIL


def in_a_dictionary(content):
    features_of(content)["more"] = {
        "pythonClassName": content["pythonClassName"],
        "featuresDict": {"features": {"inner": EVIL}},
    }


def in_json_within_json(content):
    old = {"type": "evil_module.Feature", "content": {}}
    features_of(content)["more"] = {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "jsonFeature": {"json": json.dumps({"feature": old, "length": None})},
    }


def as_older_versions_wrote(content):
    old = {"type": content["pythonClassName"],
           "content": {"text": {"type": "evil_module.Feature", "content": {}}}}  # fmt: skip
    content.clear()
    content.update(old)


def of_another_module_of_tfds(content):
    features_of(content)["more"] = {"pythonClassName": "tensorflow_datasets.scripts.cli.main.X"}


def of_no_string(content):
    features_of(content)["more"] = {"pythonClassName": ["evil_module.Feature"]}


@pytest.mark.parametrize(
    "edit",
    [at_the_top, as_a_feature, in_snake_case, in_a_sequence, in_a_dictionary, in_json_within_json,
     as_older_versions_wrote, of_another_module_of_tfds, of_no_string],
)  # fmt: skip
@pytest.mark.usefixtures("evil_module")
def test_feature_class_of_a_stranger_is_refused_unimported(folder, edit):
    change(folder / "features.json", edit)
    with pytest.raises(DataError, match="features.json names the feature class .* not of TFDS"):
        stored_dataset.read(folder)


@pytest.mark.usefixtures("evil_module")
def test_feature_class_in_dataset_info_is_refused_unimported(folder):
    def edit(info):
        info["features"] = json.loads((folder / "features.json").read_text())
        as_a_feature(info["features"])

    change(folder / "dataset_info.json", edit)
    with pytest.raises(DataError, match="dataset_info.json names the feature class"):
        stored_dataset.read(folder)


@pytest.mark.usefixtures("evil_module")
def test_named_dataset_of_a_stranger_is_refused_unimported(folder, tmp_path):
    """TFDS finds the folder itself, and must not import either."""
    change(folder / "features.json", as_a_feature)
    shutil.copytree(folder, tmp_path / "all" / "stranger" / "1.0.0")
    config = DataConfig(name="stranger", data_dir=str(tmp_path / "all"))
    with pytest.raises(DataError, match="names the feature class 'evil_module.Feature'"):
        open_source(config, "train")


@pytest.mark.usefixtures("evil_module")
def test_tfds_itself_imports_no_module_that_a_file_names(folder):
    change(folder / "features.json", as_a_feature)
    with pytest.raises(DataError, match="evil_module.Feature"):
        tfds.builder_from_directory(str(folder))


def test_own_classes_are_all_that_tfds_registers():
    ours = own_classes()
    registered = tfds.features.FeatureConnector._registered_features
    theirs = {n for n, kind in registered.items() if kind.__module__.startswith("tensorflow_data")}
    assert ours >= theirs - {"tensorflow_datasets.core.features.top_level_feature.TopLevelFeature"}
    assert TEXT in ours and "tensorflow_datasets.core.features.feature.Tensor" in ours
    assert all(name.startswith("tensorflow_datasets.core.features.") for name in ours)


def test_only_one_function_opens_a_builder_from_a_directory():
    """All others would let a folder name what is imported."""
    openers = {"builder_from_directory", "builder_from_directories", "builder_from_metadata",
               "builder_from_files", "ReadOnlyBuilder", "from_config", "from_json", "load",
               "dataset_collection"}  # fmt: skip
    package, found = Path(stored.__file__).parents[1], []
    for file in package.rglob("*.py"):
        text = file.read_text()
        if "tfds" not in text and "tensorflow_datasets" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in openers:
                if ast.unparse(node.value).startswith(("tfds", "read_only_builder")):
                    found.append((file.name, node.attr))
    assert found == [("stored.py", "builder_from_directory")]


@pytest.mark.parametrize("length", [2**40, 2**62])
def test_more_examples_than_the_file_can_hold_are_refused(folder, length):
    change(
        folder / "dataset_info.json", lambda c: c["splits"][0].update(shardLengths=[str(length)])
    )
    with pytest.raises(DataError, match="dataset_info.json: split 'train' has .* examples"):
        stored_dataset.read(folder)


@pytest.mark.parametrize(
    "fields",
    [{"filepathTemplate": "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"},
     {"filepathTemplate": "/etc/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"},
     {"filepathTemplate": "inner/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}],
)  # fmt: skip
def test_shards_outside_the_folder_are_refused(folder, fields):
    change(folder / "dataset_info.json", lambda c: c["splits"][0].update(fields))
    with pytest.raises(DataError, match="expected files of that folder"):
        stored_dataset.read(folder)


def test_pipe_in_place_of_a_shard_is_refused(folder):
    shard = next(folder.glob("*array_record*"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match="is a device, a pipe or a socket; expected a file"):
        stored_dataset.read(folder)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, '{"pythonClassName": null}', "\0"])
def test_damaged_description_is_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        stored_dataset.read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_picture_of_another_feature_reaches_no_decoder(folder):
    """TFDS would give every picture of a record to Pillow, and Pillow an EPS to Ghostscript."""
    image = tfds.features.Image(shape=(None, None, 3))

    class Builder:
        class info:
            features = tfds.features.FeaturesDict({"image": image, "list": {"inner": image}})

        def as_data_source(*args, **kwargs):
            return [tfds_record()]

    records = Records(Builder, "train", {"image": tfds.decode.SkipDecoding()})
    assert records[0]["image"] == b"%!PS-Adobe-3.0 EPSF-3.0\n"
    with pytest.raises(DataError, match="'list' is a FeaturesDict, which is not read here"):
        records[0]["list"]


def tfds_record():
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name in ("image", "list/inner"):
        example.features.feature[name].bytes_list.value.append(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    return example.SerializeToString()


def test_nested_numbers_are_read_as_tfds_reads_them():
    features = tfds.features.FeaturesDict(
        {"boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature(), "n": np.int32})}
    )
    maker = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    boxes = [{"box": tfds.features.BBox(0.0, 0.25, 0.5, 1.0), "n": i} for i in range(2)]
    data = maker.get_tf_example(features.encode_example({"boxes": boxes})).SerializeToString()

    class Builder:
        class info:
            pass

        def as_data_source(*args, **kwargs):
            return [data]

    Builder.info.features = features
    ours, theirs = Records(Builder, "train", {})[0]["boxes"], features.deserialize_example_np(data)
    for name, value in theirs["boxes"].items():
        np.testing.assert_array_equal(ours[name], value)
