"""Frozen networks that lie outside of the workdir: followed, checked, moved, bundled."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdjax.checkpoints.assemble import Assembled
from sdjax.checkpoints.reading import lasts, locate, read_any
from sdjax.checkpoints.references import Reference, digest, follow, read_references
from sdjax.checkpoints.workdir import read_run, read_workdir
from sdjax.config import resolve
from sdjax.convert import convert, main
from sdjax.errors import UserError
from sdjax.formats.folders import ModelError
from sdjax.models.weights import load_file
from sdjax.system import paths
from sdjax.train import frozen, loop, startup
from tests.conftest import make_tiny_config
from tests.train.test_loop import assert_same_run, rows

WEIGHTS = "diffusion_pytorch_model.safetensors"


def train(config, folder, **changes):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return loop.run(resolve(changed), str(folder))


@pytest.fixture(scope="module")
def recipe(tiny_vae, shapes_dir):
    config = make_tiny_config(tiny_vae, shapes_dir)
    config.train.update(steps=4, checkpoint_every=2)
    return config


@pytest.fixture
def config(recipe, tiny_vae, tmp_path):
    """With a VAE of its own, which may be spoilt."""
    config = recipe.copy_and_resolve_references()
    config.vae_from = str(shutil.copytree(tiny_vae, tmp_path / "vae"))
    return config


@pytest.fixture(scope="module")
def bundled(recipe, tmp_path_factory):
    """A run that holds its VAE."""
    folder = tmp_path_factory.mktemp("bundled") / "run"
    assert train(recipe, folder, train__bundle_frozen=True) == loop.DONE
    return folder


@pytest.fixture(scope="module")
def referring(recipe, tmp_path_factory):
    """The same run, which refers to it. Do not write into it."""
    folder = tmp_path_factory.mktemp("referring") / "run"
    assert train(recipe, folder) == loop.DONE
    return folder


def converted(folder, out):
    """{file: bytes} of everything that a conversion of a workdir writes."""
    convert(folder, out)
    return {f.relative_to(out): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def test_a_run_refers_to_the_folder_of_its_vae_and_copies_nothing(
    referring, bundled, tiny_vae, tmp_path
):
    assert not (referring / "frozen.safetensors").exists()
    assert not (bundled / "frozen.json").exists() and (bundled / "frozen.safetensors").exists()
    vae = {p: v for p, v in read_any(tiny_vae).params.items() if p.startswith("vae.")}
    assert read_references(paths.to_path(referring)) == {
        "vae": Reference("vae_from", str(tiny_vae), None, "", digest(vae),
                         sum(value.size for value in vae.values()))
    }  # fmt: skip
    assert rows(referring) == rows(bundled)
    want = converted(bundled, tmp_path / "a")
    assert converted(referring, tmp_path / "b") == want and len(want) > 5


def test_a_digest_is_that_of_the_values_in_a_canonical_order():
    params = {"b.kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.float32(1)}
    lines = "\n".join(
        f'["{path}", {shape}, "{hashlib.sha256(data).hexdigest()}"]'
        for path, shape, data in (
            ("a", [], b"\0\0\x80\x3f"),
            ("b.kernel", [2, 3], np.array([0, 1, 2, 3, 4, 5], "<f4").tobytes()),
        )
    )
    assert digest(params) == "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    assert digest(dict(reversed(params.items()))) == digest(params)
    transposed = {**params, "b.kernel": np.asfortranarray(params["b.kernel"])}
    assert digest(transposed) == digest(params)
    others = (
        {**params, "b.kernel": params["b.kernel"].reshape(3, 2)},
        {**params, "a": np.nextafter(np.float32(1), np.float32(2))},
        {**params, "c": np.zeros(0, np.float32)},
        {"b": params["b.kernel"], "a": params["a"]},
    )
    assert len({digest(params), *map(digest, others)}) == 5


def test_a_moved_vae_is_missed_and_found_again_and_the_run_is_the_same_to_the_bit(
    config, referring, tmp_path, capsys
):
    run, new = tmp_path / "run", str(tmp_path / "new")
    assert train(config, run, train__steps=2) == loop.DONE
    shutil.move(config.vae_from, new)
    with pytest.raises(UserError) as missed:
        train(config, run)
    for words in (str(run), config.vae_from, "vae", "no such folder", "--config.vae_from=PLACE"):
        assert words in str(missed.value)
    with pytest.raises(ModelError, match="cannot be read there now"):
        read_workdir(run)
    assert "unet" in read_workdir(run, components=("unet",)).networks
    assert train(config, run, vae_from=new) == loop.DONE
    assert f"changed since the last start: vae_from: was {config.vae_from!r}" in (
        capsys.readouterr().out
    )
    assert_same_run(referring, run)
    assert read_references(paths.to_path(run))["vae"].path == new
    assert converted(run, tmp_path / "a") == converted(referring, tmp_path / "b")
    # The command of the beginning goes on now, too.
    assert train(config, run, train__steps=5) == loop.DONE
    config.vae_from = ""
    with pytest.raises(UserError, match="vae_from: was .* is ''"):
        train(config, run)


def test_a_vae_of_which_a_byte_has_changed_is_refused(config, bundled, tmp_path):
    run = tmp_path / "run"
    assert train(config, run, train__steps=2) == loop.DONE
    file = Path(config.vae_from, WEIGHTS)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    for fails in (lambda: train(config, run), lambda: read_workdir(run)):
        with pytest.raises(UserError) as refused:
            fails()
        assert f"the vae in {config.vae_from} is not the one" in str(refused.value)
        assert str(run / "frozen.json") in str(refused.value)
    # Another place with another VAE is refused as well, and changes nothing.
    other = shutil.copytree(config.vae_from, tmp_path / "other")
    file.write_bytes(whole)
    before = (run / "frozen.json").read_bytes()
    with pytest.raises(UserError, match=f"the vae in {other} is not the one"):
        train(config, run, vae_from=str(other))
    assert (run / "frozen.json").read_bytes() == before
    assert train(config, run) == loop.DONE
    assert_same_run(bundled, run)


def test_a_run_is_bundled_when_it_resumes_or_later(config, bundled, tmp_path, capsys):
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert train(config, run, train__steps=2) == loop.DONE
    shutil.copytree(run, copy)
    assert train(config, run, train__bundle_frozen=True) == loop.DONE
    assert main([f"--input={copy}", "--bundle"]) == 0
    assert main([f"--input={copy}", "--bundle"]) == 0
    assert "copied into" in (said := capsys.readouterr().out) and "holds all" in said
    shutil.rmtree(config.vae_from)
    assert train(config, copy) == loop.DONE
    for folder in (run, copy):
        assert not (folder / "frozen.json").exists()
        kept = load_file(folder / "frozen.safetensors")
        want = load_file(bundled / "frozen.safetensors")
        assert kept.keys() == want.keys()
        assert all(np.array_equal(kept[path], want[path]) for path in want)
        assert_same_run(bundled, folder)
    for wrong in (["--output=x"], ["--step=2"], []):
        source = [f"--input={copy}"] if wrong else []
        assert main([*source, "--bundle", *wrong]) == 2


def test_a_start_that_ends_before_its_first_checkpoint_leaves_nothing_behind_for_the_next(
    recipe, referring, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(startup, "initial_params", killed)
        train(recipe, run, train__bundle_frozen=True)
    assert (run / "config.json").exists() and not any(run.glob("checkpoints/*"))
    assert (run / "frozen.safetensors").exists() and not (run / "frozen.json").exists()
    assert train(recipe, run) == loop.DONE
    assert not (run / "frozen.safetensors").exists() and (run / "frozen.json").exists()
    assert_same_run(referring, run)


def test_what_an_earlier_start_kept_is_kept_no_longer(recipe, tiny_vae, tmp_path):
    config, folder = resolve(recipe), paths.to_path(tmp_path)
    bundled = dataclasses.replace(
        config, train=dataclasses.replace(config.train, bundle_frozen=True)
    )
    vae = read_any(tiny_vae).params
    assembled = Assembled(config, vae, {}, (), sources={"vae": locate("vae_from", str(tiny_vae))})
    for own, left in ((config, "frozen.json"), (bundled, "frozen.safetensors")) * 2:
        frozen.keep(own, folder, assembled, vae, {})
        assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_run_from_a_run_refers_to_where_that_one_refers(recipe, referring, tmp_path):
    first = read_references(paths.to_path(referring))["vae"]
    second = tmp_path / "second"
    assert train(recipe, second, init_from=str(referring), vae_from="", train__steps=2) == loop.DONE
    found = read_references(paths.to_path(second))["vae"]
    assert found == dataclasses.replace(first, field="init_from")


def test_networks_frozen_in_part_are_of_a_checkpoint(recipe, referring, tmp_path):
    part, own = tmp_path / "part", {"vae_from": "", "init_from": str(referring)}
    own["optim__groups"] = ((r"^unet\.mid_block\.", 0.0),)
    assert train(recipe, part, train__steps=2, **own) == loop.DONE
    found = read_references(paths.to_path(part))
    assert (found["unet"].path, found["unet"].step) == (str(referring), 4)
    assert found["unet"].weights == "warmup-0.9"
    read, first = read_workdir(part), read_workdir(referring)
    same = {p for p, v in read.params.items() if np.array_equal(v, first.params[p])}
    assert {
        p for p in same if p.startswith("unet.mid_block.")
    } and "unet.conv_in.kernel" not in same
    assert sum(read.params[p].size for p in same if p.startswith("unet.")) == (
        found["unet"].parameters
    )
    assert train(recipe, part, train__steps=3, **own) == loop.DONE


def test_a_checkpoint_that_its_run_may_still_delete_is_copied(recipe, referring, tmp_path):
    assert lasts(locate("init_from", str(referring)))
    going = shutil.copytree(referring, tmp_path / "going")
    saved = json.loads((going / "config.json").read_text())
    saved["train"]["steps"] = 100
    (going / "config.json").write_text(json.dumps(saved))
    source = locate("init_from", str(going))
    assert source.step == 4 and not lasts(source)
    params = {"unet.a": np.ones(3, np.float32)}
    assembled = Assembled(resolve(recipe), params, {}, (), sources={"unet": source})
    frozen.keep(resolve(recipe), paths.to_path(tmp_path), assembled, params, {})
    assert not (tmp_path / "frozen.json").exists()
    assert load_file(tmp_path / "frozen.safetensors")["unet.a"].tolist() == [1, 1, 1]


def test_no_reference_leads_to_another_nor_from_a_disk_to_a_bucket(referring, tmp_path):
    chain = shutil.copytree(referring, tmp_path / "chain")
    entry = json.loads((chain / "frozen.json").read_text())["vae"]
    for path, words in (
        (str(referring), "refers to another folder"),
        (str(chain), "refers to another folder"),
        ("gs://nobody/vae", "refers to no bucket"),
        (str(tmp_path / "vae.bin"), "no such folder or file"),
    ):
        (chain / "frozen.json").write_text(json.dumps({"vae": {**entry, "path": path}}))
        with pytest.raises(ModelError, match=words):
            read_workdir(chain)


def test_single_files_and_workdirs_are_followed_too(referring, tmp_path, tiny_vae):
    want = read_any(tiny_vae).params
    reference = read_references(paths.to_path(referring))["vae"]
    for place in (tmp_path / "workdir", tmp_path / "vae.safetensors"):
        convert(tiny_vae, place)
        moved = dataclasses.replace(reference, path=str(place))
        found = follow(paths.to_path(referring), "vae", moved, read_run)
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[path], want[path]) for path in want)
