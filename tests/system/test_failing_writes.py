"""Every write of every verb fails in words: the path, the cause, the remedy; exit code 2.

The system is told to let no file grow (ulimit -f), which libraries in C++ and Rust meet as well,
and root too, whom a read-only folder does not stop.
"""

import contextlib
import dataclasses
import errno
import os
import re
import resource
import sys
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax import convert, errors, prepare, report
from sdjax.checkpoints import references
from sdjax.checkpoints.assemble import Assembled
from sdjax.config import Config, resolve
from sdjax.data import encoded
from sdjax.data.config import DataError
from sdjax.data.prepare.settings import Workspace
from sdjax.data.sources import open_source
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.encoding import encoder
from sdjax.errors import UserError, WriteError
from sdjax.evaluation import reference
from sdjax.families.embeddings import Embedding
from sdjax.families.registry import FAMILIES
from sdjax.formats.embeddings import write_embeddings
from sdjax.formats.folders import replaced_folder
from sdjax.models.weights import save_file
from sdjax.optim import ema
from sdjax.planning import plan_cache
from sdjax.sampling import animation, drawing, grids, strips
from sdjax.system import locks, paths
from sdjax.train import frozen, loop, rollback, startup
from sdjax.train.monitoring import monitor
from sdjax.train.rollback import Spike

WORDS = "File too large; raise the limit on the size of files \\(ulimit -f\\)"


@contextlib.contextmanager
def no_file_grows_beyond(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def no_half_bytecode(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
PARAMS = {"unet.conv_in.bias": jnp.arange(64.0)}


ASSEMBLED = Assembled(Config(), {"vae.a": np.zeros(9)}, {}, ())
WORD = Embedding("<cat>", {"text_encoder": np.ones((1, 8), np.float32)})
REFERENCE = references.Reference("vae_from", "tiny", digest=references.digest({}))


def records(folder):
    plain = SimpleNamespace(encode_example=dict, serialize_example=lambda _: b"x" * 100)
    example = {"moments": np.zeros((2, 2, 8), np.float32), "text": "a"}
    encoder.write_records(folder / "records", [example], plain, encoding_of_nothing())


def encoding_of_nothing():
    return encoded.Encoding("x", {"vae": ""}, "float32", 16, "center", {}, False, {}, {}, {})


WRITERS = {
    "text": lambda folder: paths.write_text(folder / "text", "some"),
    "tokenizer": lambda folder: Tokenizer.train(["a b"] * 4, 560).save(folder / "tokenizer"),
    "png": lambda folder: grids.save_png(folder / "a.png", PICTURE),
    "strip": lambda folder: strips.append_column(folder / "strip.png", 1, PICTURE[None]),
    "animation": lambda folder: animation.save_animation(folder / "a.webp", [PICTURE] * 2),
    "reference": lambda folder: reference.write(folder / "r.npz", np.ones((4, 2)), {}),
    "captions": lambda folder: drawing._write_metadata(folder, drawing.Prompts(("a",)), 2),
    "snapshots": lambda folder: ema.save_snapshots(folder, 1, {"power-0.05": PARAMS}),
    "batch": lambda folder: monitor.dump_batch(folder, 1, {"image": jnp.zeros((1, 8, 8, 3))}),
    "rollbacks": lambda folder: rollback.record(folder, Spike(3, "loss", 2.0, 1.0)),
    "config": lambda folder: startup.write_config(folder, Config()),
    "frozen": lambda folder: frozen.keep(Config(), folder, ASSEMBLED, {"vae.a": np.zeros(9)}, {}),
    "references": lambda folder: references.write_references(folder, {"vae": REFERENCE}),
    "work of prepare": lambda folder: Workspace(str(folder)).write_json(folder / "work" / "a", {}),
    "encoded": lambda folder: encoded.write(folder, encoding_of_nothing(), {}),
    "records": records,
    "weights": lambda folder: save_file(PARAMS, folder / "x.safetensors"),
    "words": lambda folder: write_embeddings(folder, FAMILIES["sd"], [WORD]),
    "lock": lambda folder: locks.held(folder, "--output", "x").__enter__(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_grow_is_named(name, tmp_path):
    folder = paths.to_path(tmp_path)
    (folder / "work").mkdir()
    with no_file_grows_beyond(0), pytest.raises(WriteError, match=WORDS) as failed:
        WRITERS[name](folder)
    assert str(failed.value).startswith(str(tmp_path))
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


def test_a_plan_is_not_lost_where_it_cannot_be_kept(tmp_path, capsys):
    with no_file_grows_beyond(0):
        with plan_cache.entry(tmp_path, "key") as entry:
            entry.value = {"a": 1}
    assert entry.value == {"a": 1} and not list(tmp_path.iterdir())
    words = capsys.readouterr().err
    assert re.search(rf"key.json.gz cannot be written: {WORDS}", words)


# ---- verbs -----------------------------------------------------------------------------------


def says(capsys, folder):
    """That the last line is about a file of this folder that cannot be written."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    assert re.search(rf"^error: .*{re.escape(str(folder))}.*{WORDS}", lines[-1]), lines
    return True


@pytest.mark.parametrize(
    ("to", "limit"), [("diffusers", 300), ("diffusers", 3000), ("single_file", 300)]
)
def test_convert_leaves_nothing_behind(tiny_vae, tmp_path, capsys, to, limit):
    target = tmp_path / ("x.safetensors" if to == "single_file" else "x")
    with no_file_grows_beyond(limit):
        assert convert.main([f"--input={tiny_vae}", f"--output={target}", f"--to={to}"]) == 2
    assert says(capsys, tmp_path) and not list(tmp_path.iterdir())


def test_convert_to_a_workdir_leaves_nothing_behind(tiny_vae, tmp_path, capsys):
    with no_file_grows_beyond(300):
        assert convert.main([f"--input={tiny_vae}", f"--output={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint could not be written" in error and "Is the disk full" in error
    assert str(tmp_path) in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_threads_make_again_after_the_failure_is_removed(tmp_path):
    def late():
        (partial / "checkpoints").mkdir(parents=True)

    with pytest.raises(UserError, match="full"):
        with replaced_folder(tmp_path / "x", overwrite=False) as partial:
            thread = threading.Timer(0.15, late)
            thread.start()
            raise UserError("the disk is full")
    thread.join()
    assert not list(tmp_path.iterdir())


def test_report_says_where_else_to_write(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    with no_file_grows_beyond(300):
        assert report.main([f"--workdir={tmp_path}", f"--output={tmp_path / 'x.html'}"]) == 2
    assert says(capsys, tmp_path / "x.html") and not (tmp_path / "x.html").exists()


def test_prepare_says_what_its_worker_could_not_write(tmp_path, capsys):
    pytest.importorskip("apache_beam")
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(3):
        Image.fromarray(PICTURE + i).save(raw / f"{i}.png")
        (raw / f"{i}.txt").write_text("a picture")
    with no_file_grows_beyond(500):
        code = prepare.main(["", f"--input={raw}", f"--output={tmp_path / 'out'}", "--workers=1"])
    assert code == 2 and says(capsys, tmp_path / "out")


def test_a_dataset_that_cannot_be_stored_is_named(tiny_config, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    config = resolve(tiny_config)
    data = dataclasses.replace(config.data, data_dir=str(tmp_path / "data"))
    with no_file_grows_beyond(2_000), pytest.raises(DataError, match=WORDS) as failed:
        open_source(data, "train")
    assert "cannot prepare captioned_shapes" in str(failed.value)
    assert str(tmp_path / "data") in str(failed.value)


def test_main_names_the_frozen_weights_that_do_not_fit(tiny_config, tmp_path):
    run = paths.to_path(tmp_path / "run")
    tiny_config.train.bundle_frozen = True
    config = resolve(tiny_config)
    open_source(config.data, "train")  # which stores the dataset
    with no_file_grows_beyond(20_000), pytest.raises(WriteError, match=WORDS) as failed:
        loop.run(config, str(run))
    assert str(failed.value).startswith(str(run / "frozen.safetensors"))
    assert not (run / locks.FILE).exists()


@pytest.mark.parametrize("code", sorted(errors._REMEDIES))
def test_what_the_system_says_has_a_remedy_however_it_is_wrapped(code):
    own = OSError(code, os.strerror(code), "/disk/file")
    assert "run the same command again" in errors.describe(own)
    assert errors.describe(own).startswith(f"/disk/file: {os.strerror(code)}")
    quoted = RuntimeError(f"INTERNAL: write failed: {os.strerror(code)} [os_error_code=1]")
    assert os.strerror(code) in str(errors.write_error("/disk/file", quoted))
    wrapped = RuntimeError("a thread failed")
    wrapped.__cause__ = own
    assert errors.system_error(wrapped) == code


def test_errors_that_are_none_of_a_disk_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), paths.writing(tmp_path / "x"):
        raise RuntimeError("a bug")
    with pytest.raises(UserError, match="wrong input"), paths.writing(tmp_path / "x"):
        raise UserError("wrong input")
    assert errors.system_error(OSError(errno.ENOENT, "No such file")) is None
    assert not list(tmp_path.iterdir())
