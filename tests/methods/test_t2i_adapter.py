"""The method t2i_adapter: its loss, a run broken off and resumed, and the folder that it writes."""

import json
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
from sdjax.checkpoints.workdir import read_workdir
from sdjax.config import default, resolve
from sdjax.config_model import method_of_run
from sdjax.errors import UserError
from sdjax.families.beside.t2i_adapter import T2I_ADAPTER
from sdjax.families.family import Model
from sdjax.families.sd import SD, UNetConfig
from sdjax.families.sdxl import SDXL, UNET_SDXL
from sdjax.formats.folders import ModelError
from sdjax.methods.t2i_adapter import T2IAdapterMethodConfig, network_config
from sdjax.models.params import component
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.vae import VAEConfig
from sdjax.models.weights import to_diffusers
from sdjax.train import loop
from sdjax.train.finish import last_screen
from sdjax.train.selection import Selection
from tests.conftest import make_tiny_config
from tests.methods.runs import assert_is_what_it_exported, begun, begun_from, broken_off, read
from tests.train.test_loop import assert_same_run

IMAGES = ({"name": "control", "kind": "condition", "made": "soft_edges"},)


@pytest.fixture(scope="module")
def config(tiny_vae, shapes_dir, tiny_model):
    """A run whose step compiles in seconds. Do not change it."""
    c = begun_from(make_tiny_config(tiny_vae, shapes_dir), tiny_model, "t2i_adapter")
    c.data.images = IMAGES
    c.objective.timestep_sampling = "cubic"
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


def test_the_loss_is_that_of_the_unet_with_what_the_adapter_adds(config, beginning):
    """Without what it says the UNet's alone; with it every weight of the adapter has a gradient."""
    made, params, batch, draw = beginning
    trained = {p: v for p, v in params.items() if made.trainable(p)}
    assert {path.split(".")[0] for path in trained} == {T2I_ADAPTER}
    frozen = {p: v for p, v in params.items() if p not in trained}

    @jax.jit
    def step(trained, batch):
        def mean(trained):
            per_example, _ = made.phases[0].loss(trained, frozen, {}, batch, draw)
            return jnp.mean(per_example), per_example

        (_, losses), gradients = jax.value_and_grad(mean, has_aux=True)(trained)
        return losses, gradients

    values = config.to_dict()
    values["method"], values["data"]["images"] = {"name": "denoise"}, ()
    base = read(values)[1].phases[0]
    plain = jax.jit(lambda p: base.loss(p, {}, {}, batch, draw)[0])(frozen)
    silent, _ = step({p: jnp.zeros_like(v) for p, v in trained.items()}, batch)
    np.testing.assert_allclose(silent, plain, rtol=1e-6)
    losses, gradients = step(trained, batch)
    assert np.all(losses != plain)  # nothing of it starts at zero
    assert all(np.any(g) for g in gradients.values())
    other = {**batch, "control": 1 - batch["control"]}
    assert np.all(step(trained, other)[0] != losses)


def test_validation_and_maxima_are_of_the_adapter(beginning):
    made, params, batch, draw = beginning
    timesteps = made.timesteps(3)
    given = params, batch, draw.keys
    losses = jax.eval_shape(lambda *a: made.validate(*a, timesteps), *given)
    assert losses.shape == (4, 3)
    found = jax.eval_shape(lambda *a: made.maxima(*a, timesteps), *given)
    assert set(found) == {"adapter.body.0"}
    kinds = jax.eval_shape(lambda *a: made.predictions(*a, timesteps), *given)
    assert set(kinds) == {"epsilon", "v_prediction"}


def test_a_run_broken_off_goes_on_to_the_same_bits(config, whole, tmp_path):
    again = broken_off(whole, tmp_path / "run", 1)
    shutil.rmtree(again / "t2i_adapter")
    assert loop.run(resolve(config), str(again)) == loop.DONE
    assert_same_run(whole, again)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        left, right = (f / "t2i_adapter" / file for f in (whole, again))
        assert left.read_bytes() == right.read_bytes()


def test_the_workdir_holds_the_adapter_and_refers_to_the_rest(whole):
    assert set(read_references(whole)) == {"unet", "vae", "text_encoder"}
    assert not (whole / "frozen.safetensors").exists() and not (whole / "diffusers").exists()
    state = restore_params(whole, "params", 2)
    assert {path.split(".")[0] for path in state} == {T2I_ADAPTER}
    assert set(read_workdir(whole).networks) == {"unet", "vae", "text_encoder"}


def test_the_folder_that_a_run_writes_loads_in_diffusers(whole):
    """FT-54: no key is missing or unexpected; the average is what is written."""
    diffusers = pytest.importorskip("diffusers")
    model, info = diffusers.T2IAdapter.from_pretrained(
        whole / "t2i_adapter", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = to_diffusers(component(restore_params(whole, "ema:0.5", 2), T2I_ADAPTER))
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)


def test_a_workdir_is_an_adapter(whole, tiny_model, tmp_path, capsys):
    exported = assert_is_what_it_exported(whole, whole / "t2i_adapter", T2I_ADAPTER, 2)
    first = read_control(whole / "checkpoints" / "1")[1]
    assert any(np.any(value != exported[path]) for path, value in first.items())
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    for i, (option, net) in enumerate(
        [("t2i_adapter", whole), ("controlnet", whole / "t2i_adapter")]
    ):
        assert 0 == sample.main([
            f"--model={tiny_model}", "--prompts=a red circle", f"--output={tmp_path / str(i)}",
            "--steps=2", f"--{option}={net}", f"--control_image={tmp_path / 'a.png'}",
        ])  # fmt: skip
    one, other = (np.asarray(Image.open(tmp_path / f"{i}" / "00000.png")) for i in range(2))
    np.testing.assert_array_equal(one, other)
    shutil.copytree(whole, tmp_path / "other")
    values = json.loads((whole / "config.json").read_text())
    values["method"] = {"name": "denoise"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="'denoise', which trains no network"):
        read_control(tmp_path / "other")


def test_a_run_goes_on_from_an_adapter(config, whole):
    changed = config.copy_and_resolve_references()
    changed.method.adapter_from = str(whole / "t2i_adapter")
    _, expected = read_control(whole / "t2i_adapter")
    derived = component(read(changed)[0].derived, T2I_ADAPTER)
    assert derived.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(derived[path], value)
    changed.method.grey = True
    with pytest.raises(UserError, match="in_channels is 3, not 1"):
        read(changed)
    changed.method.adapter_from = str(whole / "nowhere")
    with pytest.raises(UserError, match=r"method.adapter_from is .*nowhere': no such folder"):
        read(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.images": ()}, r"'control' is missing.*it takes control \(condition\)"),
        ({"method.kind": "light_adapter"}, "method.kind=light_adapter: channels = "),
        ({"method.kind": "full_adapter_xl"}, "16 at 1/4, 16 at 1/4; the UNet has 16 at 1/2"),
        ({"method.kind": "full"}, "method.kind is 'full'; expected '' or one of"),
        ({"method.res_blocks": 0}, "method.res_blocks is 0"),
    ],
)
def test_recipes_that_do_not_suit_are_refused(config, changes, words):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        read(changed)


def test_a_family_without_a_unet_is_refused():
    changed = default(family="sd3", method="t2i_adapter")
    changed.data.images = IMAGES
    with pytest.raises(UserError, match="for UNets.*'sd3'"):
        method_of_run(resolve(changed), {})


def test_the_shapes_are_those_of_published_adapters():
    """The config.json of TencentARC's t2iadapter_canny_sd15v2, t2i-adapter-canny-sdxl-1.0 and
    t2iadapter_color_sd14v1."""
    models = {"sd": Model(SD, {"unet": UNetConfig(), "vae": VAEConfig()}),
              "xl": Model(SDXL, {"unet": UNET_SDXL, "vae": VAEConfig()})}  # fmt: skip
    full = T2IAdapterConfig()
    xl = T2IAdapterConfig(downscale_factor=16, adapter_type="full_adapter_xl")
    light = T2IAdapterConfig(
        channels=(320, 640, 1280), num_res_blocks=4, adapter_type="light_adapter"
    )
    assert network_config(models["sd"], T2IAdapterMethodConfig()) == full
    assert network_config(models["xl"], T2IAdapterMethodConfig()) == xl
    chosen = T2IAdapterMethodConfig(kind="light_adapter", res_blocks=4)
    assert network_config(models["sd"], chosen) == light
    with pytest.raises(UserError, match="is not for this model"):
        network_config(models["xl"], chosen)


def test_the_last_screen_says_how_to_draw_with_it(config, tmp_path):
    resolved = resolve(config)
    said = last_screen(
        resolved, tmp_path, None, {"t2i_adapter": tmp_path / "t2i_adapter"}, "", 2,
        Selection(resolved.validation),
    )  # fmt: skip
    assert f"--model={config.init_from} --t2i_adapter={tmp_path} --control_image=FILE" in said
