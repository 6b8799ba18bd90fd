"""Runs whose text is encoded ahead: text encoders leave the devices, and nothing else changes."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve, to_dict
from sdjax.config_model import blank_method, method_of_run
from sdjax.encoding.dataset import Options, encode_dataset
from sdjax.families.conditioning import encode_text
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.parallel.mesh import make_mesh
from sdjax.train import captions, loop, program, startup
from sdjax.train.announce import memory_classes
from tests.conftest import XLA_FLAGS, make_tiny_config
from tests.methods.runs import begun_from, broken_off
from tests.train.test_loop import assert_same_run, rows
from tests.train.test_mesh import FLAGS

WORDS = "text_encoder."


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, tiny_model, tiny_vae, shapes_dir):
    """Captioned shapes with what the encoders of `tiny_model` make of them."""
    config = begun_from(make_tiny_config(tiny_vae, shapes_dir), tiny_model, "denoise")
    folder = tmp_path_factory.mktemp("encoded") / "data"
    encode_dataset(resolve(config), str(folder), Options(dtype="float32", batch=8, text=True))
    return folder


@pytest.fixture
def config(tiny_config, tiny_model, encoded):
    c = begun_from(tiny_config, tiny_model, "denoise")
    c.data.update(name="encoded", path=str(encoded), text_embeddings=True)
    c.objective.caption_dropout = 0.5
    c.validation.update(examples=4, every=2)
    c.train.update(sample_every=2, export=True)
    c.sample.update(prompts=("a red circle", "a blue square", "a star"), negative_prompt="a green")
    return c


def drawn(workdir):
    return np.asarray(Image.open(workdir / "samples" / "00000002.png"))


@pytest.fixture
def frozen(monkeypatch):
    """What each run has on the devices besides its state."""
    seen, place = [], startup.place_frozen
    monkeypatch.setattr(
        startup, "place_frozen", lambda *a, **k: seen.append(place(*a, **k)) or seen[-1]
    )
    return seen


def test_the_run_is_that_with_encoders_on_the_devices(
    config, tiny_model, tmp_path, monkeypatch, frozen
):
    assert loop.run(resolve(config), str(tmp_path / "away")) == loop.DONE
    assert not any(path.startswith(WORDS) for path in frozen[0])
    assert "empty_caption.context" in frozen[0]
    ours, theirs = (read_diffusers(f).params for f in (tmp_path / "away/diffusers", tiny_model))
    for path in theirs:
        if path.startswith(WORDS):
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)

    # A kill after the first step; the encoders are read from where the workdir refers to.
    broken = broken_off(tmp_path / "away", tmp_path / "broken", 1)
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(tmp_path / "away", broken)
    np.testing.assert_array_equal(drawn(tmp_path / "away"), drawn(broken))

    monkeypatch.setattr(program, "_encoding_once", lambda *a: {})
    assert loop.run(resolve(config), str(tmp_path / "there")) == loop.DONE
    assert any(path.startswith(WORDS) for path in frozen[-1])
    one, other = (rows(tmp_path / name) for name in ("away", "there"))
    for step in (1, 2):
        for name, value in other[step].items():
            if "loss" in name:
                # The encoders are compiled apart from the step; all is float32.
                np.testing.assert_allclose(one[step][name], value, rtol=1e-5, err_msg=name)
    assert "validation/warmup-0.9999/loss" in other[2]
    # Rounding of a pixel to a level of 255 may fall to the other side.
    difference = np.abs(drawn(tmp_path / "away").astype(int) - drawn(tmp_path / "there"))
    assert difference.max() <= 1 and drawn(tmp_path / "there").std() > 1


def test_dropped_captions_are_the_empty_one(config):
    assembled = assemble(resolve(config))
    method = method_of_run(assembled.config, assembled.tokenizers)
    conditioner = method.conditioner
    made = conditioner.nothing(assembled.params)
    stored = {f"empty_caption.{name}": value[0] for name, value in made.items()}
    assert {p: (v.shape, v.dtype) for p, v in stored.items()} == {
        p: (v.shape, v.dtype) for p, v in conditioner.stored().items()
    }
    batch = {"context": np.ones((4, *made["context"].shape[1:]), np.float32)}
    keys = jax.random.split(jax.random.key(0), 4)
    for params in (assembled.params, stored):  # no encoder is needed where it is stored
        dropped = conditioner.drop(params, batch, keys, 1.0)["context"]
        np.testing.assert_array_equal(dropped, np.repeat(made["context"], 4, axis=0))


def test_captions_beyond_a_batch_are_encoded_alike(config):
    assembled = assemble(resolve(config))
    method = method_of_run(assembled.config, assembled.tokenizers)
    own = {p: v for p, v in assembled.params.items() if p.startswith(WORDS)}
    encode = captions.caption_encoder(method.conditioner, own, make_mesh(assembled.config.mesh))
    texts = [f"a red circle {i % 5}" for i in range(captions.ROWS + 2)]
    tokens = encode_text(assembled.tokenizers, texts)
    made = encode(tokens)["context"]
    assert len(made) == len(texts)
    expected = method.conditioner.embed(own, tokens)["context"]
    np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize("field, value", [
    ("data.text_embeddings", False), ("validation.metrics", ("fid",)),
])  # fmt: skip
def test_encoders_stay_where_captions_are_too_many_or_tokens(config, tiny_model, field, value):
    away = _program(config)
    assert {p.split(".")[0] for p in away.encoders} == {"text_encoder"}
    assert not any(p.startswith(WORDS) for p in away.frozen)
    config.update_from_flattened_dict({field: value})
    there = _program(config)
    assert not there.encoders and any(p.startswith(WORDS) for p in there.frozen)
    bytes_of = lambda built: memory_classes(built)["frozen networks"]  # noqa: E731
    encoders = sum(4 * v.size for p, v in away.encoders.items())
    assert bytes_of(there) - bytes_of(away) == encoders - 4 * 24 * 16


def test_a_dry_run_counts_encoders_before_the_first_step_alone(config, capsys, tmp_path):
    assert loop.run(resolve(config), str(tmp_path / "run"), dry_run=True) == loop.DONE
    rows = [line for line in capsys.readouterr().out.splitlines() if "GiB" not in line]
    (row,) = [line for line in rows if "text encoders, before the first step" in line]
    assert float(row.strip("│┃ ").split("│")[-1]) == 0.0  # of 5,000 parameters
    assert any("total" in line for line in rows[: rows.index(row)])


def _program(config):
    made = resolve(config)
    return program.build(made, blank_method(made), make_mesh(made.mesh))


def test_a_workdir_without_its_encoders_still_ends(config, tmp_path, capsys, monkeypatch):
    """The features are at hand until the export, which then says what it lacks."""
    from sdjax.formats.folders import ModelError
    from sdjax.train import finish

    def gone(*args, **kwargs):
        raise ModelError("text_encoder is not where it was")

    monkeypatch.setattr(finish, "frozen_params", gone)
    assert loop.run(resolve(config), str(tmp_path / "run")) == loop.DONE
    assert "no diffusers folder is written: text_encoder is not" in capsys.readouterr().out
    assert "text_encoder" in read_any(tmp_path / "run").networks


@pytest.mark.slow  # two processes
def test_losses_do_not_depend_on_the_mesh(config, tmp_path):
    """The encoders are split over the mesh while they encode, and so is the empty caption."""
    config.data.batch_size = 8
    config.optim.learning_rate = 2e-4
    config.train.export = False
    code = (
        "import json, sys\nfrom sdjax.config import resolve\nfrom sdjax.parallel import sharding\n"
        "from sdjax.train import loop\nsharding.MIN_FSDP_SIZE = 64  # the model is tiny\n"
        "sys.exit(loop.run(resolve(json.loads(sys.argv[1])), sys.argv[2]))\n"
    )
    for name, sizes, flags in (("one", (1, 1, 1), XLA_FLAGS), ("eight", (2, 4, 1), FLAGS)):
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
        values = json.dumps(to_dict(resolve(config)))
        run = subprocess.run(
            [sys.executable, "-c", code, values, str(tmp_path / name)],
            env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    for step in (1, 2):
        one, eight = (rows(tmp_path / name)[step] for name in ("one", "eight"))
        np.testing.assert_allclose(eight["train/loss"], one["train/loss"], rtol=1e-5)
    difference = np.abs(drawn(tmp_path / "eight").astype(int) - drawn(tmp_path / "one"))
    assert difference.max() <= 1
