"""Pivotal tuning, whole: words and factors move together, then the words are fixed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import sample
from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.averages import with_averages
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import read_adapter_run
from sdjax.config import default, resolve
from sdjax.config_model import blank_method
from sdjax.errors import UserError
from sdjax.families.conditioning import encode_text, make_conditioner
from sdjax.families.embeddings import is_rows, rows_path, table_path
from sdjax.formats.embeddings import read_embedding, with_files
from sdjax.formats.folders import ModelError
from sdjax.methods.embedding import EmbeddingConfig, _as_spread, _first_rows
from sdjax.models.adapters.networks import MARK
from sdjax.models.weights import load_file
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train import loop
from sdjax.train.program import build
from tests.methods.runs import broken_off
from tests.train.test_loop import assert_same_run, final_state

WORD, VECTORS = "<cat>", 2
ROWS = rows_path("text_encoder")
PROMPTS = [f"a {WORD} circle", "a red circle"]


def recipe(folder, shapes_dir):
    c = default(method="pivotal")
    c.init_from = str(folder)
    c.method.update(tokens=(WORD,), vectors=VECTORS, targets=("attention",), rank=2)
    c.method.update(text_targets=("attention",), dropout=0.1, words_end=0.5)
    c.data.update(data_dir=str(shapes_dir), resolution=16, batch_size=4, shapes_train=40,
                  shapes_test=8, threads=1)  # fmt: skip
    c.data.captions.texts = (f"a {WORD}", "a {} " + WORD)
    c.optim.update(learning_rate=1e-2, weight_decay=1e-2)
    c.train.update(steps=4, log_every=1, checkpoint_every=2, sample_every=0, report=False)
    c.ema.profiles = ()
    c.validation.examples = 0
    c.sample.count = 2
    c.sample.sampler.steps = 2
    return c


@pytest.fixture(scope="module")
def config(tiny_model, shapes_dir):
    return recipe(tiny_model, shapes_dir)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The workdir of a whole run. Do not write into it."""
    folder = tmp_path_factory.mktemp("pivotal") / "toy"
    assert loop.run(resolve(config), str(folder)) == loop.DONE
    return folder


def params(folder):
    _, state, _ = final_state(folder)
    start = "['params']['"
    return {k[len(start) : -2]: v for k, v in state.items() if k.startswith(start)}


def test_words_are_fixed_after_their_share_and_factors_go_on(config, trained, tiny_model, tmp_path):
    """FT-34: to the bit."""
    half = params(broken_off(trained, tmp_path / "toy", 2))
    whole = params(trained)
    assert all(path == ROWS or MARK in path for path in whole) and ROWS in whole
    np.testing.assert_array_equal(half[ROWS], whole[ROWS])
    for path, value in whole.items():
        if MARK in path:
            assert np.any(value != half[path]), path
    read, base = read_any(trained), read_any(tiny_model)
    table, old = (m.params[table_path("text_encoder")] for m in (read, base))
    np.testing.assert_array_equal(table[: len(old)], old)
    np.testing.assert_array_equal(table[len(old) :], whole[ROWS])
    assert not read.changes
    begun = _first_rows(resolve(config).method, base, base.params)[ROWS]
    assert whole[ROWS].shape == (VECTORS, 16) and np.all(whole[ROWS] != begun)


def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(config, trained, tmp_path):
    copied = broken_off(trained, tmp_path / "toy", 2)
    assert loop.run(resolve(config), str(copied)) == loop.DONE
    assert_same_run(trained, copied)
    for file in (*(trained / "adapter").iterdir(), *(trained / "embedding").iterdir()):
        ours, theirs = load_file(file), load_file(copied / file.parent.name / file.name)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def draw(folder, output, *options):
    given = ["--prompts", f"a {WORD} circle", "--steps=2", "--height=16", "--width=16", "--seed=1"]
    assert sample.main([f"--model={folder}", f"--output={output}", *given, *options]) == 0
    return np.asarray(Image.open(output / "00000.png"), np.int32)


def test_the_files_make_of_the_base_what_the_workdir_holds(trained, tiny_model, tmp_path):
    lora, word = trained / "adapter" / "toy.safetensors", trained / "embedding" / "cat.safetensors"
    base, read = read_any(tiny_model), read_any(trained)
    for place in (lora, trained):
        both, _ = with_files(with_loras(base, [str(place)]), [f"{word}:{WORD}"])
        assert both.params.keys() == read.params.keys()
        for path, value in read.params.items():
            np.testing.assert_allclose(both.params[path], value, atol=1e-6, err_msg=path)
    ours = draw(trained, tmp_path / "run")
    theirs = draw(tiny_model, tmp_path / "files", f"--lora={lora}", f"--embedding={word}:{WORD}")
    assert np.abs(theirs - ours).max() <= 1


def test_diffusers_takes_both_files_and_reads_the_prompt_alike(trained, tiny_model):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    plain = pipeline.encode_prompt(PROMPTS[1:], "cpu", 1, False)[0].detach().numpy()
    pipeline.load_textual_inversion(str(trained / "embedding" / "cat.safetensors"), token=WORD)
    pipeline.load_lora_weights(trained / "adapter")
    theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    model = read_any(trained)
    tokens = encode_text(model.tokenizers, PROMPTS)
    made = make_conditioner(model, model.tokenizers).embed(dict(model.params), tokens)
    np.testing.assert_allclose(made["context"], theirs.detach().numpy(), atol=2e-5)
    assert np.abs(made["context"][1:] - plain).max() > 1e-3  # of the text encoder's factors


def test_every_verb_takes_the_run_for_its_adapter_and_its_word(trained, tiny_model):
    model, adapter = read_adapter_run(trained, "raw", None)
    assert {path.split(".")[0] for path in adapter} == {"unet", "text_encoder"}
    assert not model.changes
    found = read_embedding(trained / "embedding" / "cat.safetensors", read_any(tiny_model))
    np.testing.assert_array_equal(found.rows["text_encoder"], params(trained)[ROWS])
    saved = json.loads((trained / "config.json").read_text())["method"]
    assert (saved["name"], saved["words_end"], saved["std_power"]) == ("pivotal", 0.5, 0.1)


def test_an_average_of_another_length_says_that_adapters_have_none(trained):
    with pytest.raises(ModelError, match="the run trained adapters, and averages of other lengths"):
        with_averages(read_any(trained), trained, params(trained))


def test_rows_begin_at_random_as_spread_as_the_table(tiny_model):
    config = EmbeddingConfig(tokens=("<a>", "<b>"), vectors=400, templates="captions")
    base = read_any(tiny_model)
    (rows,) = _first_rows(config, base, base.params).values()
    table = base.params[table_path("text_encoder")]
    assert rows.shape == (800, table.shape[1])
    assert rows.std() == pytest.approx(table.std(), rel=0.02)
    assert abs(rows.mean()) < 0.01 and np.any(rows[:400] != rows[400:])
    np.testing.assert_array_equal(rows, _first_rows(config, base, base.params)[ROWS])


def test_the_spread_of_rows_follows_the_table_by_the_rule_of_diffusers():
    """`retract_embeddings`: rows * (std of the table / std of the rows) ** 0.1, torch's std."""
    rng = np.random.default_rng(0)
    table, rows = (rng.normal(size=s).astype(np.float32) for s in ((50, 24), (2, 24)))
    table *= 0.02
    new = torch.tensor(rows)
    expected = new * (torch.tensor(table).std() / new.std()) ** 0.1
    frozen = {table_path("text_encoder"): jnp.asarray(table)}
    found = jax.jit(lambda r: _as_spread(0.1, {ROWS: r, "x": r}, frozen))(jnp.asarray(rows))
    np.testing.assert_allclose(found[ROWS], expected.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(found["x"], rows)
    zeros = _as_spread(0.1, {ROWS: jnp.zeros((1, 24))}, frozen)
    np.testing.assert_array_equal(zeros[ROWS], np.zeros((1, 24)))


def spans(config, **changes):
    """The spans of steps that the program of a tiny recipe has."""
    config.method = {"name": "pivotal", "tokens": (WORD,), **changes}
    config = resolve(config)
    program = build(config, blank_method(config), make_mesh(MeshConfig(), jax.devices()[:1]))
    (one,) = program.optimizations
    assert one.paths == program.split.trained.keys()
    return {"rows" if is_rows(path) else "factors": span for path, span in one.spans.items()}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"rows": (0, 3)}),
        ({"words_end": 1.0}, {}),
        ({"words_end": 1 / 3, "factors_begin": 1 / 3}, {"rows": (0, 2), "factors": (2, 6)}),
    ],
)
def test_shares_of_the_run_become_steps(tiny_config, changes, expected):
    assert spans(tiny_config, **changes) == expected


def test_an_average_of_its_own_is_refused(tiny_config):
    tiny_config.optim.update(name="schedule_free")
    with pytest.raises(UserError, match="optim.name is 'schedule_free' with method 'pivotal'"):
        spans(tiny_config)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"words_end": 0.0}, r"words_end is 0.0; expected a share in \(0, 1\]"),
        ({"factors_begin": 1.0}, r"factors_begin is 1.0; expected a share in \[0, 1\)"),
        ({"factors_begin": 0.8}, "factors_begin is 0.8 with words_end 0.5: nothing"),
        ({"std_power": 2.0}, r"std_power is 2.0; expected a number in \[0, 1\]"),
        ({"tokens": ()}, "method.tokens is empty"),
        ({"targets": ("attn9",)}, "method.targets: 'attn9' takes no layer"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(tiny_config, changes, words):
    with pytest.raises(UserError, match=words):
        spans(tiny_config, **changes)
