"""Textual inversion, whole: only the new rows move, a run is killed and goes on, others read it."""

import copy
import dataclasses
import json
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax import evaluate, sample
from sdjax.checkpoints import checkpoint
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.references import read_references
from sdjax.config import default, resolve
from sdjax.convert import convert
from sdjax.data.templates import OBJECT, STYLE
from sdjax.encoding.encoder import make_text_encoder
from sdjax.errors import UserError
from sdjax.families.conditioning import encode_text, make_conditioner
from sdjax.families.embeddings import rows_path, table_path, with_tokens
from sdjax.families.registry import adopted
from sdjax.formats.embeddings import read_embedding
from sdjax.models.config import ConfigError
from sdjax.models.weights import load_file
from sdjax.train import loop
from tests.odd_names import ODD
from tests.train.test_loop import assert_same_run, final_state, rows, start, wait_for_step

WORD, INITIALIZER, VECTORS = "<cat>", "circle", 3
PROMPTS = ["a <cat> circle", "a red circle"]


def recipe(folder, shapes_dir):
    c = default(method="embedding")
    c.init_from = str(folder)
    c.method.update(tokens=(WORD,), vectors=VECTORS, initializer=(INITIALIZER,))
    c.data.update(data_dir=str(shapes_dir), resolution=16, batch_size=8, shapes_train=40,
                  shapes_test=8, threads=1)  # fmt: skip
    c.optim.update(learning_rate=5e-3, weight_decay=1e-2)
    c.train.update(steps=6, log_every=1, checkpoint_every=3, sample_every=0, report=False)
    c.validation.examples = 0
    c.sample.count = 2
    c.sample.sampler.steps = 2
    return c


def train(config, workdir, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return loop.run(resolve(config), str(workdir))


@pytest.fixture(scope="module")
def config(pipeline_folder, shapes_dir):
    return recipe(pipeline_folder, shapes_dir)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The workdir of a whole run. Do not write into it."""
    folder = tmp_path_factory.mktemp("embedding") / ODD
    assert train(config, folder) == loop.DONE
    return folder


def draw(model, output, *options):
    np.save(
        output / "latents.npy",
        np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32),
    )
    given = ["--prompts", *PROMPTS, "--steps=3", "--guidance=4", "--height=16", "--width=16"]
    latents = f"--latents={output / 'latents.npy'}"
    assert sample.main([f"--model={model}", f"--output={output}", latents, *given, *options]) == 0
    return [np.asarray(Image.open(output / f"{i:05d}.png"), np.float32) / 255 for i in range(2)]


def test_only_the_new_rows_are_trained_and_all_of_them_move(trained, pipeline_folder):
    """FT-30, FT-31."""
    path, base = rows_path("text_encoder"), read_any(pipeline_folder)
    _, state, _ = final_state(trained)
    params = {name for name in state if name.startswith("['params']")}
    assert params == {f"['params']['{path}']"}
    found = read_any(trained)
    table = found.params[table_path("text_encoder")]
    old = base.params[table_path("text_encoder")]
    np.testing.assert_array_equal(table[: len(old)], old)
    others = found.params.keys() - {table_path("text_encoder")}
    assert others == base.params.keys() - {table_path("text_encoder")}
    for name in others:
        np.testing.assert_array_equal(found.params[name], base.params[name], err_msg=name)
    tokenizer = base.tokenizers["tokens"]
    (begun,) = old[tokenizer.encode([INITIALIZER])[0, 1:2]]
    moved = np.abs(table[len(old) :] - begun)
    assert moved.shape == (VECTORS, 24) and (moved.max(1) > 1e-3).all()
    assert moved.max() < 6 * 1.1 * 5e-3  # of Adam's, which moves a number by its rate at most
    # A caption of 16 tokens is cut, and these templates are spelled in letters.
    shares = [row["train/with_token"] for row in rows(trained).values()]
    assert all(0 <= share < 1 for share in shares) and max(shares) > 0


def test_captions_are_templates_with_the_word(trained):
    saved = json.loads((trained / "config.json").read_text())
    assert saved["data"]["captions"]["texts"] == [text.replace("{}", WORD) for text in OBJECT]
    assert len(OBJECT) == 27 and len(STYLE) == 19


def test_a_killed_run_goes_on_to_the_same_bits(config, trained, tmp_path):
    process = start(config.copy_and_resolve_references(), tmp_path)
    wait_for_step(process, tmp_path, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.latest_step(tmp_path) in (None, 3, 6)
    assert train(config, tmp_path) == loop.DONE
    assert_same_run(trained, tmp_path)
    for file in (trained / "embedding").iterdir():
        assert file.read_bytes() == (tmp_path / "embedding" / file.name).read_bytes()


def test_a_run_with_other_words_is_not_continued(config, trained):
    with pytest.raises(ConfigError, match=r"method.tokens: was \['<cat>'\], is \['<dog>'\]"):
        train(config, trained, **{"method.tokens": ("<dog>",)})


@pytest.mark.parametrize("file", ["learned_embeds", "cat"])
def test_diffusers_draws_the_same_pictures_with_the_file(
    torch_pipeline, trained, pipeline_folder, tmp_path, file
):
    import torch

    written = trained / "embedding" / f"{file}.safetensors"
    assert load_file(written)[WORD].shape == (VECTORS, 24)
    pipeline = copy.deepcopy(torch_pipeline)
    pipeline.load_textual_inversion(str(written))
    theirs = pipeline.tokenizer(
        pipeline.maybe_convert_prompt(PROMPTS, pipeline.tokenizer),
        padding="max_length", max_length=16, return_tensors="np",
    ).input_ids  # fmt: skip
    model = read_any(trained)
    np.testing.assert_array_equal(model.tokenizers["tokens"].encode(PROMPTS), theirs)
    (tmp_path / "run").mkdir()
    (tmp_path / "file").mkdir()
    ours = draw(trained, tmp_path / "run")
    latents = np.load(tmp_path / "run" / "latents.npy")
    want = pipeline(
        PROMPTS, height=16, width=16, num_inference_steps=3, guidance_scale=4.0,
        latents=torch.from_numpy(latents), output_type="np",
    ).images  # fmt: skip
    loaded = draw(pipeline_folder, tmp_path / "file", f"--embedding={written}")
    for one, other, torchs in zip(ours, loaded, want, strict=True):
        assert np.abs(one - torchs).max() < 0.01
        np.testing.assert_array_equal(one, other)


def test_a_folder_converted_of_a_run_draws_the_word_in_diffusers(trained, tmp_path):
    import diffusers
    import torch

    convert(trained, tmp_path / "folder", to="diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    ours = draw(trained, tmp_path)
    latents = torch.from_numpy(np.load(tmp_path / "latents.npy"))
    want = pipeline(PROMPTS, height=16, width=16, num_inference_steps=3, guidance_scale=4.0,
                    latents=latents, output_type="np").images  # fmt: skip
    for one, other in zip(ours, want, strict=True):
        assert np.abs(one - other).max() < 0.01
    with pytest.raises(UserError, match="a single file has no tokenizer.*'<cat>'"):
        convert(trained, tmp_path / "model.safetensors")


def test_a_prompt_without_the_word_is_told(pipeline_folder, trained, tmp_path, capsys):
    file = trained / "embedding" / "cat.safetensors"
    draw(pipeline_folder, tmp_path, f"--embedding={file}:<other>")
    assert "no prompt has the word '<other>'" in capsys.readouterr().err
    options = [f"--model={pipeline_folder}", f"--output={tmp_path}", "--prompts=a"]
    assert sample.main([*options, f"--embedding={file}:red"]) == 2
    assert "already; choose another word" in capsys.readouterr().err


def test_evaluate_takes_a_run_and_a_file(trained, tmp_path, shapes_dir, capsys):
    file = trained / "embedding" / "cat.safetensors"
    options = [f"--data_dir={shapes_dir}", "--num_samples=0", "--metrics=validation_loss",
               "--validation_examples=4", "--resamples=0", f"--embedding={file}:<dog>"]  # fmt: skip
    run = [f"--model={trained}", "--dataset=own", f"--output={tmp_path / 'run'}"]
    assert evaluate.main([*run, *options]) == 0, capsys.readouterr().err
    loss = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert np.isfinite(loss["validation_loss"]["value"])
    assert evaluate.main([*run, *options, f"--embedding={file}"]) == 2
    assert "'<cat>' in its vocabulary already" in capsys.readouterr().err
    assert evaluate.main(["--images=x", f"--output={tmp_path}", f"--embedding={file}"]) == 2
    assert "for a model that draws, not for --images" in capsys.readouterr().err


def encoded_by_torch(pipeline, text):
    """(context, pooled) of a prompt."""
    import torch

    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    return context.numpy(), pooled.numpy()


def test_rows_of_both_encoders_of_sdxl_move(xl_folder, torch_xl_pipeline, shapes_dir, tmp_path):
    """FT-34; only the first encoder's did in diffusers#9010."""
    config = recipe(xl_folder, shapes_dir)
    assert train(config, tmp_path, **{"train.steps": 2, "train.checkpoint_every": 2}) == loop.DONE
    base, folder = read_any(xl_folder), tmp_path / "embedding"
    names = {file.stem for file in folder.iterdir()}
    assert names == {"learned_embeds", "learned_embeds_2", "cat"}
    word = read_embedding(folder / "cat.safetensors", base, WORD)
    for name, found in word.rows.items():
        field = base.family.parts[name].tokens
        (own,) = base.tokenizers[field].encode([INITIALIZER])[0, 1:2]
        moved = np.abs(found - base.params[table_path(name)][own])
        assert (moved.max(1) > 1e-3).all(), name
    pipeline = copy.deepcopy(torch_xl_pipeline)
    for i in ("", "_2"):
        pipeline.load_textual_inversion(
            str(folder / f"learned_embeds{i}.safetensors"),
            text_encoder=getattr(pipeline, f"text_encoder{i}"),
            tokenizer=getattr(pipeline, f"tokenizer{i}"),
        )
    model = read_any(tmp_path)
    conditioner = make_conditioner(model, model.tokenizers)
    made = conditioner.embed(dict(model.params), encode_text(model.tokenizers, PROMPTS[:1]))
    context, pooled = encoded_by_torch(pipeline, PROMPTS[0])
    np.testing.assert_allclose(made["context"], context, atol=2e-5)
    np.testing.assert_allclose(made["pooled"], pooled, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": (), "initializer": ()}, "method.tokens is empty"),
        ({"initializer": ("a", "b")}, "expected a text for each"),
        ({"tokens": ("<a>", "<a>")}, "expected words that differ"),
        ({"tokens": ("<a>", "<b>"), "initializer": ("a", "a")}, "templates is 'object', of one"),
        ({"vectors": 0}, "vectors is 0"),
        ({"vectors": 15}, "15 vectors; expected 1 to 14"),
        ({"templates": "photo"}, "expected object, style or captions"),
        ({"tokens": ("red",)}, "already; choose another word"),
        ({"initializer": ("a red",)}, "has 2 tokens in text_encoder; expected 1, or one for each"),
    ],
)
def test_words_that_cannot_be_learnt_are_refused_with_the_field(config, tmp_path, changes, words):
    """FT-33."""
    with pytest.raises(UserError, match=words):
        train(config, tmp_path, **{f"method.{name}": value for name, value in changes.items()})


def test_words_for_a_model_without_weights_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="text_encoder has no weights.*set config.init_from"):
        train(config, tmp_path, init_from="", vae_from="tiny")


def test_features_encoded_ahead_are_refused_with_the_reason(config, tmp_path):
    changes = {"data.name": "encoded", "data.path": "x", "data.text_embeddings": True}
    with pytest.raises(UserError, match="trains what stands before these in the text encoders"):
        train(config, tmp_path, **changes)


def test_captions_with_words_still_to_be_learnt_are_not_encoded_ahead(config, pipeline_folder):
    model = read_any(pipeline_folder)
    own = resolve(config)
    own = dataclasses.replace(own, model=adopted(own.model, model, model.networks, whole=True))
    longer = with_tokens(model.tokenizers, {WORD: VECTORS})
    with pytest.raises(UserError, match="words that text_encoder does not have yet"):
        make_text_encoder(own, model.params, longer, 1)


def test_the_tiny_recipe_learns_a_word_from_five_pictures_without_captions(tiny_config, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "pictures [5]"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    assert train(tiny_config, base, **{"train.steps": 1}) == loop.DONE
    file = Path(__file__).parents[2] / "configs" / "textual_inversion_tiny.py"
    config = runpy.run_path(str(file))["get_config"]()
    changes = {
        "init_from": str(base), "data.path": str(folder), "data.data_dir": str(tmp_path / "tfds"),
        "data.resolution": 16, "data.batch_size": 4, "train.steps": 2, "train.sample_every": 0,
        "train.log_every": 1, "train.report": False, "sample.sampler.steps": 2,
    }  # fmt: skip
    workdir = tmp_path / "word"
    assert train(config, workdir, **changes) == loop.DONE
    assert [row["train/with_token"] for row in rows(workdir).values()] == [1.0, 1.0]
    before, after = read_any(base), read_any(workdir)
    row = after.params[table_path("text_encoder")][-1]
    ours = after.tokenizers["tokens"].encode(["a <thing>"])[0, 2]
    assert ours == before.tokenizers["tokens"].largest_id + 1
    (circle,) = before.tokenizers["tokens"].encode(["circle"])[0, 1:2]
    moved = np.abs(row - before.params[table_path("text_encoder")][circle])
    # The base has taken one step from outputs of zero: gradients are near Adam's eps.
    assert 0 < moved.max() < 2 * 1.1 * 5e-3
    # The frozen networks lie where they were.
    assert set(read_references(workdir)) == {"unet", "vae", "text_encoder"}
    assert not (workdir / "frozen.safetensors").exists()
