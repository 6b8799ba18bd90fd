"""The method ip_adapter: what is dropped, its loss, a run broken off and resumed, its file."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax import sample
from sdjax.checkpoints.checkpoint import restore_params
from sdjax.checkpoints.controls import read_control
from sdjax.checkpoints.references import read_references
from sdjax.checkpoints.workdir import bundle, read_workdir
from sdjax.config import default, resolve
from sdjax.config_model import method_of_run
from sdjax.diffusion.losses import dropped_captions, example_keys
from sdjax.errors import UserError
from sdjax.evaluation.loading import NetworkOptions, load
from sdjax.evaluation.opening import open_session
from sdjax.evaluation.request import Request
from sdjax.families.beside.ip_adapter import IP_ADAPTER
from sdjax.formats.image_encoder import read_image_encoder
from sdjax.methods.ip_adapter import IPAdapterMethodConfig, dropped
from sdjax.models.params import component
from sdjax.models.weights import load_file, save_file
from sdjax.train import loop
from tests.conftest import make_tiny_config, randomise
from tests.methods.runs import assert_is_what_it_exported, begun, begun_from, broken_off, read
from tests.train.test_loop import assert_same_run

KEYS = "ip_adapter.ip_adapter.0.to_k_ip.kernel"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The folder of a small CLIP image tower of transformers, which reads pictures of 12 pixels."""
    transformers = pytest.importorskip("transformers")
    made = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=12, patch_size=6, projection_dim=10,
        )
    )  # fmt: skip
    randomise(made, 9)
    folder = tmp_path_factory.mktemp("tower")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tiny_vae, shapes_dir, tiny_model, tower):
    """A run whose step compiles in seconds; the UNet has one cross-attention. Do not change it."""
    c = begun_from(make_tiny_config(tiny_vae, shapes_dir), tiny_model, "ip_adapter")
    c.method.update(image_encoder_from=str(tower), embedding_dim=10)
    c.optim.groups, c.train.export = (), True
    c.ema.profiles = ("0.5",)
    return c


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing happened to. Do not write into it."""
    folder = tmp_path_factory.mktemp("whole") / "run [1]"
    assert loop.run(resolve(config), str(folder)) == loop.DONE
    return folder


@pytest.fixture(scope="module")
def beginning(config):
    return begun(config)


def test_captions_and_pictures_are_dropped_alone_and_together():
    """The shares of the authors' tutorial_train.py: 5 % each."""
    keys = example_keys(jax.random.key(0), jnp.arange(40_000))
    picture = dropped(IPAdapterMethodConfig(), 0.1, keys)
    caption = dropped_captions(keys, 0.1)
    for share in (picture & ~caption, ~picture & caption, picture & caption):
        np.testing.assert_allclose(share.mean(), 0.05, atol=0.004)
    none = IPAdapterMethodConfig(image_dropout=0.0, both_dropout=0.0)
    assert not dropped(none, 0.1, keys).any()


def test_a_run_starts_with_the_keys_and_values_of_the_text_and_trains_the_adapter_alone(beginning):
    made, params, batch, draw = beginning
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    np.testing.assert_array_equal(params[KEYS], params[f"{attention}.to_k.kernel"])
    values = KEYS.replace("to_k", "to_v")
    np.testing.assert_array_equal(params[values], params[f"{attention}.to_v.kernel"])
    trained = {p: v for p, v in params.items() if made.trainable(p)}
    assert {path.split(".")[0] for path in trained} == {IP_ADAPTER}
    frozen = {p: v for p, v in params.items() if p not in trained}

    @jax.jit
    def step(trained, batch):
        def mean(trained):
            per_example, _ = made.phases[0].loss(trained, frozen, {}, batch, draw)
            return jnp.mean(per_example), per_example

        (_, losses), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        return losses, gradients

    losses, gradients = step(trained, batch)
    assert all(np.any(g) for g in gradients.values())
    # The keys of no picture and of another one give another loss; without values it is the UNet's.
    other = {**trained, KEYS: 2 * trained[KEYS]}
    assert np.all(step(other, batch)[0] != losses)


def test_the_loss_is_that_of_the_unet_where_nothing_is_shown(config, beginning):
    made, params, batch, draw = beginning
    silent = {**params, KEYS.replace("to_k", "to_v"): 0 * params[KEYS]}
    values = config.to_dict()
    values["method"] = {"name": "denoise"}
    base = read(values)[1].phases[0]
    plain = jax.jit(lambda p: base.loss(p, {}, {}, batch, draw)[0])(
        {p: v for p, v in params.items() if not p.startswith(("ip_adapter", "image_encoder"))}
    )
    losses = jax.jit(lambda p: made.phases[0].loss(p, {}, {}, batch, draw)[0])(silent)
    np.testing.assert_allclose(losses, plain, rtol=1e-6)


def test_plus_sees_the_patches_of_another_picture_where_it_is_not_dropped(config):
    """IP-Adapter Plus, and a named picture in place of the main one."""
    changed = config.copy_and_resolve_references()
    changed.method.update(
        embedding_dim=8, image_tokens=3, resampler_layers=1, resampler_width=64, image_dropout=0.5,
        both_dropout=0.0,
    )  # fmt: skip
    changed.objective.caption_dropout = 0.0
    changed.data.images = ({"name": "reference", "kind": "condition", "made": "grey"},)
    made, params, batch, draw = begun(changed)
    trained = {p: v for p, v in params.items() if made.trainable(p)}
    assert trained["ip_adapter.image_proj.latents"].shape == (1, 3, 64)
    np.testing.assert_array_equal(
        params[KEYS], params["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.kernel"]
    )
    frozen = {p: v for p, v in params.items() if p not in trained}

    @jax.jit
    def step(trained, batch):
        def mean(trained):
            per_example, _ = made.phases[0].loss(trained, frozen, {}, batch, draw)
            return jnp.mean(per_example), per_example

        (_, losses), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        return losses, gradients

    losses, gradients = step(trained, batch)
    assert all(np.any(g) for g in gradients.values())
    gone = dropped(IPAdapterMethodConfig(image_dropout=0.5, both_dropout=0.0), 0.0, draw.keys)
    assert 0 < gone.sum() < 4
    other, _ = step(trained, {**batch, "reference": 1 - batch["reference"]})
    np.testing.assert_array_equal(other == losses, gone)


def test_validation_and_maxima_are_of_the_adapter(beginning):
    made, params, batch, draw = beginning
    timesteps = made.timesteps(3)
    given = params, batch, draw.keys
    losses = jax.eval_shape(lambda *a: made.validate(*a, timesteps), *given)
    assert losses.shape == (4, 3)
    found = jax.eval_shape(lambda *a: made.maxima(*a, timesteps), *given)
    assert set(found) == {"ip_adapter.0"}
    kinds = jax.eval_shape(lambda *a: made.predictions(*a, timesteps), *given)
    assert set(kinds) == {"epsilon", "v_prediction"}


def test_a_run_broken_off_goes_on_to_the_same_bits(config, whole, tmp_path):
    again = broken_off(whole, tmp_path / "run", 1)
    shutil.rmtree(again / "ip_adapter")
    assert loop.run(resolve(config), str(again)) == loop.DONE
    assert_same_run(whole, again)
    left, right = (f / "ip_adapter" / "ip_adapter.safetensors" for f in (whole, again))
    assert left.read_bytes() == right.read_bytes()


def test_the_workdir_holds_the_adapter_and_refers_to_the_rest(whole, tower):
    references = read_references(whole)
    assert set(references) == {"unet", "vae", "text_encoder", "image_encoder"}
    assert references["image_encoder"].path == str(tower)
    assert not (whole / "frozen.safetensors").exists()
    state = restore_params(whole, "params", 2)
    assert {path.split(".")[0] for path in state} == {IP_ADAPTER}
    assert set(read_workdir(whole).networks) == {"unet", "vae", "text_encoder"}


def test_a_run_follows_its_tower_to_another_folder_and_refuses_another_tower(
    config, whole, tower, tmp_path
):
    moved = config.copy_and_resolve_references()
    moved.method.image_encoder_from = str(shutil.copytree(tower, tmp_path / "tower"))
    again = broken_off(whole, tmp_path / "run", 1)
    shutil.rmtree(again / "ip_adapter")
    assert loop.run(resolve(moved), str(again)) == loop.DONE
    assert read_references(again)["image_encoder"].path == str(tmp_path / "tower")
    left, right = (f / "ip_adapter" / "ip_adapter.safetensors" for f in (whole, again))
    assert left.read_bytes() == right.read_bytes()
    file = tmp_path / "tower" / "model.safetensors"
    save_file({n: 2 * v for n, v in load_file(file).items()}, file)
    other = broken_off(whole, tmp_path / "other", 1)
    with pytest.raises(UserError, match="image_encoder"):
        loop.run(resolve(moved), str(other))


def test_a_bundled_workdir_holds_the_tower(whole, tower, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert set(bundle(tmp_path / "run")) == {"unet", "vae", "text_encoder", "image_encoder"}
    kept = load_file(tmp_path / "run" / "frozen.safetensors")
    for path, value in read_image_encoder(tower).params.items():
        np.testing.assert_array_equal(kept[f"image_encoder.{path}"], value)


def test_a_workdir_is_an_adapter_that_draws(whole, tower, tiny_model, tmp_path):
    file = whole / "ip_adapter" / "ip_adapter.safetensors"
    assert_is_what_it_exported(whole, file, IP_ADAPTER, 2)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30, 20, 3), np.uint8)).save(tmp_path / "a.png")
    places = whole, whole / "ip_adapter" / "ip_adapter.safetensors"
    for i, place in enumerate(places):
        assert 0 == sample.main([
            f"--model={tiny_model}", "--prompts=a red circle", f"--output={tmp_path / str(i)}",
            "--steps=2", f"--ip_adapter={place}", f"--ip_image={tmp_path / 'a.png'}",
            f"--image_encoder={tower}",
        ])  # fmt: skip
    one, other = (np.asarray(Image.open(tmp_path / f"{i}" / "00000.png")) for i in range(2))
    np.testing.assert_array_equal(one, other)


def test_a_run_is_evaluated_with_its_tower(whole, tower, tmp_path):
    with pytest.raises(UserError, match="a run of 'ip_adapter'.*give --image_encoder=DIR"):
        load(whole)
    loaded = load(whole, networks=NetworkOptions(image_encoder=str(tower)))
    request = Request(
        model=str(whole), dataset="own", num_samples=2, batch_size=2, resamples=0, per_prompt=2,
        features="pixels", metrics=("diversity", "validation_loss"), validation_examples=2,
    )  # fmt: skip
    session = open_session(request, loaded, tmp_path)
    found = session.run(tmp_path).metrics
    assert found.keys() == {"diversity", "validation_loss"}
    shown = session.conditions.bound(loaded.found.params)(np.arange(2), seed=0, shape=(8, 8, 4))
    assert set(shown) == {IP_ADAPTER, f"{IP_ADAPTER}_nothing"}
    np.testing.assert_array_equal(shown[IP_ADAPTER][0], shown[IP_ADAPTER][1])  # of one example


def test_the_gallery_shows_what_is_seen_beside_what_is_drawn(whole):
    sheet = Image.open(whole / "samples" / "00000002.png")
    assert sheet.width >= 2 * 32


def test_a_run_goes_on_from_an_adapter(config, whole):
    changed = config.copy_and_resolve_references()
    file = whole / "ip_adapter" / "ip_adapter.safetensors"
    changed.method.adapter_from = str(file)
    derived = component(read(changed)[0].derived, IP_ADAPTER)
    for path, value in read_control(file)[1].items():
        np.testing.assert_array_equal(derived[path], value)
    changed.method.image_tokens = 8
    with pytest.raises(UserError, match="than the recipe's: tokens is 4, not 8"):
        read(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method.image_encoder_from": ""}, "image_encoder_from is empty; name the folder"),
        ({"method.image_encoder_from": "/nowhere"}, "/nowhere: no such folder"),
        ({"method.embedding_dim": 1024}, "reads 1024 features .* and the image encoder gives 10"),
        ({"method.resampler_layers": 2, "method.embedding_dim": 8},
         "method: resampler_width = 16: expected a multiple of 64"),
        ({"method.image_tokens": 0}, "method.image_tokens is 0; expected 1 or more"),
        ({"method.both_dropout": 0.5}, "expected both_dropout to be a part of caption_dropout"),
        ({"method.image_dropout": 1.5}, "method.image_dropout is 1.5; expected 0 to 1"),
        ({"data.images": ({"name": "control", "kind": "condition", "made": "canny"},)},
         "'control' is not read"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_suit_are_refused(config, changes, words):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        read(changed)


def test_a_family_without_a_unet_is_refused():
    changed = default(family="sd3", method="ip_adapter")
    with pytest.raises(UserError, match="for UNets.*'sd3'"):
        method_of_run(resolve(changed), {})
