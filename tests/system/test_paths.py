"""Paths are names, not patterns: whatever a folder is called, what lies in it is found."""

import pickle
import shlex

import numpy as np
import pytest

from sdjax.data.config import DataError
from sdjax.data.raw.rows import find_shards
from sdjax.errors import UserError
from sdjax.evaluation.ema_lengths import convert_command
from sdjax.formats.weight_files import WeightsError, find_weights
from sdjax.optim import ema
from sdjax.sampling.grids import save_png
from sdjax.system import paths
from sdjax.web.report import evaluations, pictures
from tests.odd_names import NAMES, ODD


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """An oddly named folder, beside others that its name would match as a pattern."""
    for name in ("x v", "a", "ab", "axb", "A", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    folder = paths.to_path(tmp_path) / request.param
    folder.mkdir(exist_ok=True)
    return folder


def names(found):
    return sorted(path.name for path in found)


def test_glob_below_any_folder_finds_its_own_files_alone(folder):
    for name in ("a.png", "b.png", "c.txt", ".hidden.png"):
        (folder / name).touch()
    (folder / ODD).mkdir()
    (folder / ODD / "d.png").touch()
    assert names(folder.glob("*.png")) == ["a.png", "b.png"]
    assert names(folder.glob("*/*.png")) == ["d.png"] and names(folder.glob(".*")) == [
        ".hidden.png"
    ]
    assert [str(path) for path in folder.glob("c.*")] == [str(folder / "c.txt")]
    assert not list((folder / "none").glob("*")) and not list((folder / "c.txt").glob("*"))


def test_a_path_keeps_its_kind_through_what_is_done_to_it(tmp_path):
    path = paths.to_path(tmp_path)
    made = (path / "x", path.parent, path.parents[0], path.with_name("y"), path.absolute(),
            path.expanduser(), path.with_suffix(".z"), path.joinpath("a", "b"), *path.iterdir(),
            paths.absolute("x"), paths.resolved("x"), pickle.loads(pickle.dumps(path)),
            paths.to_path("gs://bucket/x") / "y")  # fmt: skip
    assert {type(one) for one in made} == {paths.Path}


def test_weights_in_any_folder_are_found(folder):
    with pytest.raises(WeightsError, match="no weights"):
        find_weights(folder)
    (folder / "model.fp16.safetensors").touch()
    (folder / "pytorch_model.bin").touch()
    assert find_weights(folder, "fp16") == folder / "model.fp16.safetensors"
    (folder / "model.safetensors").touch()
    assert find_weights(folder) == folder / "model.safetensors"


def test_snapshots_pictures_and_evaluations_of_any_workdir_are_found(folder):
    (folder / "ema_snapshots").mkdir()
    (folder / "ema_snapshots" / "00000004-power-0.05.safetensors").touch()
    assert [(s.step, s.sigma_rel) for s in ema.list_snapshots(folder)] == [(4, 0.05)]
    (folder / "samples").mkdir()
    image = np.zeros((8, 8, 3), np.uint8)
    for name in ("00000004.png", "strip.png"):
        save_png(folder / "samples" / name, image, {})
    gallery = pictures.gather(folder)
    assert gallery.shown == 1 and len(gallery.strips) == 1 and not gallery.unreadable
    within = folder / "evaluations" / "one"
    within.mkdir(parents=True)
    (within / "metrics.json").write_text('{"step": 4}')
    save_png(within / "grid.png", image, {})
    (found,), problems = evaluations.gather(folder)
    assert found.step == 4 and len(found.pictures) == 1 and not problems


def test_shards_in_any_folder_are_found_by_folder_file_and_pattern(folder):
    for name in ("train-0.tar", "train-1.tar", "test-0.tar", "[a] *.tar"):
        (folder / name).touch()
    every = ["[a] *.tar", "test-0.tar", "train-0.tar", "train-1.tar"]

    def found(path):
        survey = find_shards(str(path), (".tar",), "webdataset", outside=False)
        return [shard.name for shard in survey.shards]

    assert found(folder) == every
    for name in every:
        assert found(folder / name) == [name]
    assert found(folder / "train-*.tar") == ["train-0.tar", "train-1.tar"]
    assert found(folder / "*-[0].tar") == ["test-0.tar", "train-0.tar"]
    if not folder.name.startswith("."):
        assert found(folder.parent / "*" / "train-1.tar") == [f"{folder.name}/train-1.tar"]
    for wrong in (folder / "none-*.tar", folder / "none[1].tar", folder / "none" / "*.tar"):
        with pytest.raises(DataError, match="no file that ends in"):
            found(wrong)


def test_a_pattern_of_all_depths_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="name the folder alone"):
        find_shards(str(tmp_path / "**" / "*.tar"), (".tar",), "webdataset", outside=False)


def test_printed_commands_are_read_by_a_shell_as_they_are_meant(folder):
    words = shlex.split(convert_command(folder, folder / "out", 0.1, 4))
    assert f"--input={folder}" in words and f"--output={folder / 'out' / 'diffusers'}" in words
