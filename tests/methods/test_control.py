"""The method control: its start, a whole run killed and resumed, and the folder that it writes."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax import evaluate, sample
from sdjax.checkpoints import checkpoint
from sdjax.checkpoints.checkpoint import restore_params
from sdjax.checkpoints.controls import read_control
from sdjax.checkpoints.references import read_references
from sdjax.checkpoints.workdir import read_workdir
from sdjax.config import default, resolve
from sdjax.config_model import method_of_run
from sdjax.errors import UserError
from sdjax.families.beside.controlnet import CONTROLNET
from sdjax.formats.controlnet import read_controlnet_files
from sdjax.formats.folders import ModelError
from sdjax.models.params import component
from sdjax.models.weights import to_diffusers
from sdjax.train import loop
from sdjax.train.finish import last_screen
from sdjax.train.gallery import beside_conditions, read_examples
from sdjax.train.selection import Selection
from tests.methods.runs import assert_is_what_it_exported, begun, read
from tests.train.test_loop import assert_same_run, start, wait_for_step

ZERO = ("controlnet.controlnet_down_blocks", "controlnet.controlnet_mid_block")
EMBEDDING = "controlnet.controlnet_cond_embedding."
WORDS = ["a red circle", "a blue square", "a green star", "a small red circle"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve soft pictures with captions, and a condition beside each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        picture = small.resize((20, 20), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:02d}.png")
        picture.point(lambda v: 255 * (v > 127)).save(folder / f"{i:02d}.edge.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": WORDS[i % 4]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def recipe(base, pictures, folder):
    """A run whose step compiles in seconds."""
    c = default(method="control")
    c.init_from = str(base)
    c.method.widths = (4, 8)
    c.data.update(
        name="image_text_folder", path=str(pictures), data_dir=str(folder / "data"),
        resolution=16, batch_size=4, threads=1, eval_split="train", min_side=8,
        images=({"name": "control", "key": "edge", "kind": "condition"},),
    )  # fmt: skip
    c.objective.caption_dropout = 0.25
    c.optim.learning_rate = 1e-3
    c.ema.profiles = ("0.5",)
    c.train.update(steps=4, log_every=1, checkpoint_every=2, sample_every=0, report=False)
    c.validation.examples = 0
    c.sample.count = 2
    c.sample.sampler.steps = 2
    return c


@pytest.fixture(scope="module")
def config(pipeline_folder, pictures, tmp_path_factory):
    return recipe(pipeline_folder, pictures, tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing happened to. Do not write into it."""
    folder = tmp_path_factory.mktemp("whole") / "run [1]"
    assert loop.run(resolve(config), str(folder)) == loop.DONE
    return folder


@pytest.fixture(scope="module")
def beginning(config):
    return begun(config)


def test_a_run_starts_with_what_the_unet_says_and_learns_from_the_last_convolutions_on(
    config, beginning
):
    """FT-50: at first the convolutions at zero alone, then all but the embedding, then all."""
    made, params, batch, draw = beginning
    assert batch["control"].shape == (4, 16, 16, 3)
    assert batch["control"].min() >= 0 and batch["control"].max() == 1.0  # FT-52
    trained = {p: v for p, v in params.items() if made.trainable(p)}
    assert {path.split(".")[0] for path in trained} == {CONTROLNET}
    frozen = {p: v for p, v in params.items() if p not in trained}

    @jax.jit
    def step(trained, batch):
        def mean(trained):
            per_example, _ = made.phases[0].loss(trained, frozen, {}, batch, draw)
            return jnp.mean(per_example), per_example

        (_, losses), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        moved = {p: v - 0.1 * gradients[p] for p, v in trained.items()}
        return losses, gradients, moved

    values = config.to_dict()
    values["method"], values["data"]["images"] = {"name": "denoise"}, ()
    base = read(values)[1].phases[0]
    plain = jax.jit(lambda p: base.loss(p, {}, {}, batch, draw)[0])(frozen)
    losses, gradients, moved = step(trained, batch)
    # To the bit it is where both are computed alike, see test_controlnet.py.
    np.testing.assert_allclose(losses, plain, rtol=1e-6)
    reached = [{p for p, g in gradients.items() if np.any(g)}]
    for _ in range(2):
        _, gradients, moved = step(moved, batch)
        reached.append({p for p, g in gradients.items() if np.any(g)})
    assert reached[0] == {p for p in trained if p.startswith(ZERO)}
    assert len(reached[0]) == 10
    embedding = {p for p in trained if p.startswith(EMBEDDING)}
    assert reached[1] == set(trained) - {p for p in embedding if "conv_out" not in p}
    assert reached[2] == set(trained)
    other = {**batch, "control": 1 - batch["control"]}
    assert np.any(step(moved, batch)[0] != step(moved, other)[0])


def test_the_copy_has_the_weights_of_the_unet_and_zeros_where_it_speaks(beginning):
    _, params, *_ = beginning
    copied = [p for p in component(params, CONTROLNET) if f"unet.{p}" in params]
    assert copied
    for path in copied:
        np.testing.assert_array_equal(params[f"{CONTROLNET}.{path}"], params[f"unet.{path}"])
    rest = {p: v for p, v in component(params, CONTROLNET).items() if p not in copied}
    for path, value in rest.items():
        zero = f"{CONTROLNET}.{path}".startswith((*ZERO, f"{EMBEDDING}conv_out"))
        assert np.any(value) != zero or path.endswith("bias"), path


def test_validation_and_maxima_are_of_the_controlnet(beginning):
    made, params, batch, draw = beginning
    timesteps = made.timesteps(3)
    given = params, batch, draw.keys
    losses = jax.eval_shape(lambda *a: made.validate(*a, timesteps), *given)
    assert losses.shape == (4, 3)
    found = jax.eval_shape(lambda *a: made.maxima(*a, timesteps), *given)
    assert "mid_block.resnets.0" in found and not any("up_blocks" in path for path in found)
    kinds = jax.eval_shape(lambda *a: made.predictions(*a, timesteps), *given)
    assert set(kinds) == {"epsilon", "v_prediction"}


def test_a_killed_run_goes_on_to_the_same_bits(config, whole, tmp_path):
    process = start(config, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.latest_step(tmp_path / "run") in (None, 2, 4)
    assert loop.run(resolve(config), str(tmp_path / "run")) == loop.DONE
    assert_same_run(whole, tmp_path / "run")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        left, right = (f / "controlnet" / file for f in (whole, tmp_path / "run"))
        assert left.read_bytes() == right.read_bytes()


def test_the_unet_and_the_encoders_are_referred_to_and_not_copied(whole, pipeline_folder):
    assert set(read_references(whole)) == {"unet", "vae", "text_encoder"}
    assert not (whole / "frozen.safetensors").exists() and not (whole / "diffusers").exists()
    state = restore_params(whole, "params", 4)
    assert {path.split(".")[0] for path in state} == {CONTROLNET}
    base = read_workdir(whole)
    assert set(base.networks) == {"unet", "vae", "text_encoder"}
    assert base.params.keys() == {p for p in base.params if not p.startswith(CONTROLNET)}


def test_pictures_stand_beside_their_conditions(config, whole, pictures):
    """FT-52: a white pixel of the file is 1, and a black one 0."""
    own = resolve(config)
    examples = read_examples(own, {}, 2)
    assert examples.named["control"].shape == (2, 16, 16, 3)
    assert set(np.unique(examples.named["control"])) >= {0.0, 1.0}
    drawn = np.full((2, 16, 16, 3), 7, np.uint8)
    shown = beside_conditions(own, examples, drawn)
    np.testing.assert_array_equal(shown[:, :, 16:], drawn)
    np.testing.assert_array_equal(shown[:, :, :16], 255 * examples.named["control"])
    sheet = Image.open(whole / "samples" / "00000004.png")
    assert sheet.width >= 2 * 32


def test_the_folder_that_a_run_writes_loads_in_diffusers(whole):
    """FT-53: no key is missing or unexpected; the average is what is written."""
    diffusers = pytest.importorskip("diffusers")
    model, info = diffusers.ControlNetModel.from_pretrained(
        whole / "controlnet", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    average = component(restore_params(whole, "ema:0.5", 4), CONTROLNET)
    ours, theirs = to_diffusers(average), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)


def test_a_workdir_is_a_controlnet(whole, pictures, pipeline_folder, tmp_path, capsys):
    exported = assert_is_what_it_exported(whole, whole / "controlnet", CONTROLNET, 4)
    first = read_control(whole / "checkpoints" / "2")[1]
    raw = read_control(whole, weights="raw")[1]
    for other in (first, raw):
        assert any(np.any(value != exported[path]) for path, value in other.items())
    for i, net in enumerate((whole, whole / "controlnet")):
        assert 0 == sample.main([
            f"--model={pipeline_folder}", "--prompts=a red circle", f"--output={tmp_path / str(i)}",
            "--steps=2", f"--controlnet={net}", f"--control_image={pictures / '00.edge.png'}",
        ])  # fmt: skip
    one, other = (np.asarray(Image.open(tmp_path / f"{i}" / "00000.png")) for i in range(2))
    np.testing.assert_array_equal(one, other)
    shutil.copytree(whole, tmp_path / "other")
    values = json.loads((whole / "config.json").read_text())
    values["method"] = {"name": "denoise"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="the method 'denoise', which trains no network"):
        read_control(tmp_path / "other")


def test_a_run_is_evaluated_as_its_network_beside_the_model(
    whole, pictures, pipeline_folder, tmp_path, capsys
):
    common = ["--num_samples=4", "--batch_size=4", "--features=pixels", "--resamples=0",
              "--height=16", "--width=16", "--steps=2", "--split=train", "--sampler=ddim",
              f"--data_dir={tmp_path / 'data'}", "--guidance=3", "--per_prompt=2"]  # fmt: skip
    alone = [f"--model={whole}", "--dataset=own", "--metrics=diversity,validation_loss",
             "--validation_examples=4"]  # fmt: skip
    beside = [f"--model={pipeline_folder}", f"--controlnet={whole}", f"--dataset={pictures}",
              "--named_image=control=edge:condition", "--metrics=diversity"]  # fmt: skip
    found = {}
    for name, options in (("alone", alone), ("beside", beside)):
        output = tmp_path / name
        assert 0 == evaluate.main([*common, *options, f"--output={output}"]), capsys.readouterr()
        found[name] = json.loads((output / "metrics.json").read_text())["metrics"]
    images = [
        [np.asarray(Image.open(tmp_path / name / "images" / f"{i:06d}.png")) for i in range(4)]
        for name in found
    ]
    np.testing.assert_array_equal(*images)
    assert found["alone"]["diversity"] == found["beside"]["diversity"]
    loss = found["alone"]["validation_loss"]["value"]
    assert np.isfinite(loss) and loss > 0


def test_a_run_goes_on_from_a_controlnet(config, whole):
    changed = config.copy_and_resolve_references()
    changed.method.controlnet_from = str(whole / "controlnet")
    _, expected = read_controlnet_files(whole / "controlnet")
    derived = component(read(changed)[0].derived, CONTROLNET)
    assert derived.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(derived[path], value)
    changed.method.pooled = True
    with pytest.raises(UserError, match="global_pool_conditions is False, not True"):
        read(changed)
    changed.method.controlnet_from = str(whole / "nowhere")
    with pytest.raises(UserError, match=r"method.controlnet_from is .*nowhere': no such folder"):
        read(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.images": ()}, r"'control' is missing.*it takes control \(condition\)"),
        ({"data.images": ({"name": "control", "key": "edge"},)}, "of the kind 'picture'"),
        ({"method.widths": (4, 8, 16)}, r"halved 2 times; the VAE .* 1/2: expected 2 widths"),
        ({"method.widths": ()}, "method.widths is"),
        ({"method.channel_order": "gbr"}, "method.channel_order is 'gbr'"),
        ({"method.widths": (4, 5000)}, "1 to 4,096"),
    ],
)
def test_recipes_that_do_not_suit_are_refused(config, changes, words):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        read(changed)


def test_metrics_of_pictures_without_conditions_are_refused(config):
    changed = config.copy_and_resolve_references()
    changed.validation.update(metrics=("fid",), examples=8)
    with pytest.raises(UserError, match="whose pictures follow others that metrics do not have"):
        resolve(changed)


def test_the_last_screen_says_how_to_draw_with_it(config, tmp_path):
    said = last_screen(
        resolve(config), tmp_path, None, {"controlnet": tmp_path / "controlnet"}, "", 4,
        Selection(resolve(config).validation),
    )  # fmt: skip
    assert f"--model={config.init_from} --controlnet={tmp_path} --control_image=FILE" in said
    assert "sdjax.convert" not in said and str(tmp_path / "controlnet") in said


def test_a_family_without_a_unet_is_refused(config):
    changed = default(family="sd3", method="control")
    changed.data.images = config.data.images
    with pytest.raises(UserError, match="for UNets.*'sd3'"):
        resolved = resolve(changed)
        method_of_run(resolved, {})
