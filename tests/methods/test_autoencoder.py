"""The losses of an autoencoder and its critic against torch's autograd, and what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.checkpoint import restore_params
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.references import read_references
from sdjax.config import resolve
from sdjax.config_model import blank_method
from sdjax.diffusion.losses import example_keys, fold_keys, normal_like
from sdjax.errors import UserError
from sdjax.families.beside.critics import with_critics
from sdjax.families.bind import bind
from sdjax.families.registry import model_of
from sdjax.families.sd import SDConfig
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.formats.folders import ModelError
from sdjax.methods.autoencoding.config import AutoencoderConfig
from sdjax.methods.autoencoding.losses import Losses
from sdjax.methods.denoise import LATENTS
from sdjax.methods.method import Draw
from sdjax.models import weights
from sdjax.models.critics.patchgan import PatchGANConfig
from sdjax.models.lpips.network import LPIPS, LPIPSConfig
from sdjax.models.params import component, prefixed
from sdjax.models.vae import VAEConfig
from sdjax.models.weights import save_file
from sdjax.train import loop
from tests.conftest import small_autoencoder
from tests.methods.runs import broken_off
from tests.models.conftest import _error, _from_torch, _jit, _randomised, _tensors, _to_torch

torch = pytest.importorskip("torch")

VAE = VAEConfig(  # with groups of two channels the bias before a norm has a difference of two sums
    block_out_channels=(16, 16), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
TRUNK, CRITIC = LPIPSConfig(widths=(4, 4, 6, 6, 6)), PatchGANConfig(width=4, layers=1)
MODEL = model_of(dataclasses.replace(SDConfig(), vae=VAE), ("vae",))
NETWORKS = bind(with_critics(MODEL, lpips=TRUNK, critic=CRITIC))
LDM = AutoencoderConfig(
    reduction="sum", kl_weight=1e-3, learn_logvar=True, lpips_weight=0.7, critic_weight=0.5,
    critic_width=4, critic_layers=1, critic_start=2, critic_loss_start=4,
)  # fmt: skip
KEYS = example_keys(jax.random.key(1), jnp.arange(3))


def draw(step=10, key=1):
    return Draw(jax.random.key(key), KEYS, jnp.arange(3), 3, step)


@pytest.fixture(scope="module")
def nets():
    """Torch's networks, and all parameters {path: array} of ours."""
    diffusers = pytest.importorskip("diffusers")
    from tests.models.test_lpips import Torch
    from tests.models.test_patchgan import discriminator

    torch.manual_seed(3)
    vae = _randomised(diffusers.AutoencoderKL.from_config(VAE.to_json()))
    critic = _randomised(discriminator(4, 1), 2).train()
    trunk = Torch(TRUNK)
    for layer in trunk.features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    trunk = trunk.double()
    params = {"loss.logvar": np.float32(0.3)}
    for name, module in (("vae", vae), ("lpips", trunk), ("critic", critic)):
        own = component(NETWORKS.abstract, name)
        tensors = {n: v for n, v in _tensors(module).items() if "running" not in n}
        tensors = {n: v for n, v in tensors.items() if "num_batches" not in n}
        params |= prefixed(weights.from_diffusers(tensors, own), name)
    return vae, trunk, critic, {path: jnp.asarray(value) for path, value in params.items()}


@pytest.fixture(scope="module")
def images():
    return np.tanh(np.random.default_rng(5).normal(size=(3, 16, 16, 3))).astype(np.float32)


def apart(params):
    trained = {p: v for p, v in params.items() if not p.startswith("lpips.")}
    return trained, {p: v for p, v in params.items() if p.startswith("lpips.")}


def differentiated(phase, params, batch, at, prefix):
    """(loss, aux, gradients) of a phase as the step has them."""
    trained, frozen = apart(params)
    own = {p: v for p, v in trained.items() if p.startswith(prefix)}

    @_jit
    def run(own, trained, frozen, batch, step):
        def mean(own):
            values, aux = phase({**trained, **own}, frozen, {}, batch, at._replace(step=step))
            return jnp.mean(values * batch.get("weight", 1.0)), aux

        return jax.value_and_grad(mean, has_aux=True)(own)

    (loss, aux), gradients = run(own, trained, frozen, batch, jnp.asarray(at.step))
    return loss, aux, gradients


def theirs_main(nets, images, weight, config):
    """`LPIPSWithDiscriminator` of the generator, differentiated.

    Returns (the loss but for the verdict, the verdict, its adaptive weight, logvar).
    """
    vae, trunk, critic, _ = nets
    for module in (vae, critic):
        module.zero_grad()
    x, w = _to_torch(images), torch.tensor(weight).double()
    posterior = vae.encode(x).latent_dist
    shape = _from_torch(posterior.mean).shape
    noise = _to_torch(np.asarray(normal_like(fold_keys(KEYS, LATENTS), jnp.zeros(shape))))
    made = vae.decode(posterior.mean + posterior.std * noise).sample
    logvar = torch.tensor(0.3).double().requires_grad_()
    error = (x - made).abs() if config.loss == "l1" else (x - made).square()
    error = error + config.lpips_weight * trunk(x, made)[:, None, None, None]
    nll = (error / logvar.exp() + logvar).sum((1, 2, 3))
    nll = nll if config.reduction == "sum" else nll / x[0].numel()
    verdict = -critic.main(made).mean((1, 2, 3))
    last = vae.decoder.conv_out.weight
    slopes = [
        torch.autograd.grad((w * each).mean(), last, retain_graph=True)[0]
        for each in (nll, verdict)
    ]
    adaptive = (slopes[0].norm() / (slopes[1].norm() + 1e-4)).clamp(0, 1e4).detach()
    plain = nll + config.kl_weight * posterior.kl()
    (w * (plain + config.critic_weight * adaptive * verdict)).mean().backward()
    return (w * plain).mean(), verdict, adaptive, logvar


def check_gradients(ours, theirs, atol=2e-5):
    """Check that they are equal, each in units of its largest number, as of each network alone."""
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        if path.endswith("to_k.bias"):  # softmax does not see it
            continue
        if np.any(value):
            assert _error(ours[path], value) <= atol, path
        else:  # of a hinge whose halves cancel
            np.testing.assert_allclose(ours[path], 0, atol=1e-6, err_msg=path)


def of_torch(module):
    return {path: parameter.grad.numpy() for path, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    "changes, weight",
    [({}, (1, 1, 1)), ({"loss": "l2", "reduction": "mean"}, (2.0, 0.0, 0.5))],
)
def test_the_autoencoder_learns_as_with_torchs_autograd(nets, images, changes, weight):
    config = dataclasses.replace(LDM, **changes)
    loss, verdict, adaptive, logvar = theirs_main(nets, images, weight, config)
    batch = {"image": images}
    if set(weight) != {1}:
        batch["weight"] = np.float32(weight)
    ours, aux, gradients = differentiated(
        Losses(config, NETWORKS).main, nets[3], batch, draw(), ("vae.", "loss.")
    )
    np.testing.assert_allclose(ours, loss.item(), rtol=5e-5)
    np.testing.assert_allclose(aux["generator"], verdict.detach(), rtol=2e-4)
    np.testing.assert_allclose(aux["adaptive_weight"], adaptive.item(), rtol=5e-5)
    np.testing.assert_allclose(gradients["loss.logvar"], logvar.grad, rtol=5e-5)
    check_gradients(weights.to_diffusers(component(gradients, "vae")), of_torch(nets[0]))


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_the_critic_learns_as_with_torchs_autograd(nets, images, kind):
    vae, _, critic, params = nets
    critic.zero_grad()
    with torch.no_grad():
        x = _to_torch(images)
        posterior = vae.encode(x).latent_dist
        shape = _from_torch(posterior.mean).shape
        noise = _to_torch(np.asarray(normal_like(fold_keys(KEYS, LATENTS), jnp.zeros(shape))))
        made = vae.decode(posterior.mean + posterior.std * noise).sample
    real, fake = critic.main(x), critic.main(made)
    act = torch.nn.functional.softplus if kind == "vanilla" else lambda x: torch.relu(1 + x)
    loss = 0.5 * (act(-real).mean() + act(fake).mean())
    loss.backward()
    config = dataclasses.replace(LDM, critic_loss=kind)
    ours, aux, gradients = differentiated(
        Losses(config, NETWORKS).critic, params, {"image": images}, draw(), "critic."
    )
    np.testing.assert_allclose(ours, loss.item(), rtol=5e-5)
    np.testing.assert_allclose(aux["logits_real"].mean(), real.mean().item(), rtol=1e-4)
    np.testing.assert_allclose(aux["logits_made"].mean(), fake.mean().item(), rtol=1e-4)
    check_gradients(weights.to_diffusers(component(gradients, "critic")), of_torch(critic))


def test_before_its_start_the_critic_changes_nothing(nets, images):
    batch, prefixes = {"image": images}, ("vae.", "loss.")
    without = dataclasses.replace(LDM, critic_weight=0.0)
    want = differentiated(Losses(without, NETWORKS).main, nets[3], batch, draw(3), prefixes)
    have = differentiated(Losses(LDM, NETWORKS).main, nets[3], batch, draw(3), prefixes)
    np.testing.assert_allclose(have[0], want[0], rtol=1e-6)
    assert not np.any(have[1]["adaptive_weight"]) and not np.any(have[1]["generator"])
    for path, value in want[2].items():
        np.testing.assert_allclose(have[2][path], value, rtol=1e-4, atol=1e-4, err_msg=path)
    after = differentiated(Losses(LDM, NETWORKS).main, nets[3], batch, draw(4), prefixes)
    assert np.all(after[1]["adaptive_weight"] > 0)


@pytest.mark.parametrize(
    "share, smaller, phase, prefix",
    [(1.0, 0.0, "main", ("vae.", "loss.")), (0.0, 1.0, "critic", "critic.")],
)
def test_a_changed_batch_has_the_gradient_of_a_run_on_it_alone(
    nets, images, share, smaller, phase, prefix
):
    """By a program that differentiates itself, or by differentiation from outside."""
    config = dataclasses.replace(
        LDM, lpips_weight=0.0, equivariance=share, smaller_pictures=smaller,
        equivariance_scales=(0.5,),
    )  # fmt: skip
    losses = Losses(config, NETWORKS)

    class Direct(Losses):
        def _of_a_variant(self, look, own, weights, key):
            from sdjax.methods.autoencoding import equivariance

            _, turns = equivariance.drawn(key, share, smaller, 1)
            return look(equivariance.variants(share, smaller, (0.5,))[1], turns)(own)

    found = [
        differentiated(getattr(one, phase), nets[3], {"image": images}, draw(), prefix)
        for one in (losses, Direct(config, NETWORKS))
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    check_gradients(found[0][2], found[1][2], 1e-5)
    if phase == "main":
        assert np.any(found[0][2]["vae.encoder.conv_in.kernel"])


def test_the_validation_loss_knows_no_critic(nets, images):
    plain = dataclasses.replace(LDM, critic_weight=0.0, equivariance=0.0)
    changed = dataclasses.replace(LDM, equivariance=1.0)
    found = [
        _jit(Losses(config, NETWORKS).validate)(nets[3], {"image": images}, KEYS, np.zeros(0))
        for config in (plain, changed)
    ]
    assert found[0].shape == (3, 1)
    np.testing.assert_allclose(*found, rtol=1e-6)
    want, _ = Losses(plain, NETWORKS).main(*apart(nets[3]), {}, {"image": images}, draw())
    np.testing.assert_allclose(found[0][:, 0], want, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"loss": "l3"}, "method.loss is 'l3'; expected 'l1' or 'l2'"),
        ({"reduction": "max"}, "method.reduction is 'max'"),
        ({"critic_loss": "w"}, "method.critic_loss is 'w'; expected 'hinge' or 'vanilla'"),
        ({"lpips_weight": -1.0}, "method.lpips_weight is -1.0; expected 0 or more"),
        ({"critic_rate": 0.0}, "method.critic_rate is 0.0; expected more than 0"),
        ({"critic_start": 5}, "critic_loss_start is 0, before critic_start = 5"),
        ({"critic_layers": 0}, "method.critic_layers = 0: expected 1 to 8"),
        ({"equivariance": 2.0}, "method.equivariance is 2.0; expected 0 to 1"),
        ({"equivariance_scales": (1.0,)}, "expected numbers between 0 and 1"),
        ({"equivariance": 0.5, "equivariance_scales": ()}, "scales is empty"),
        ({"equivariance": 0.5, "decoder_only": True}, "method.decoder_only keeps"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        AutoencoderConfig(**fields)


def small(config, **fields):
    """Make of it the recipe of a small autoencoder with these fields of its method."""
    small_autoencoder(config)
    with config.unlocked():
        config.method.update(fields)
    return config


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"lpips_weight": 1.0}, "method.lpips_from is empty; name a file"),
        ({"critic_weight": 1.0, "critic_layers": 3},
         "the smallest pictures are 16 pixels wide; method.critic_layers needs 24"),
        ({"critic_weight": 1.0, "critic_layers": 2, "equivariance": 0.5},
         "the smallest pictures are 4 pixels wide"),
    ],
)  # fmt: skip
def test_what_a_recipe_lacks_is_named(tiny_config, fields, words):
    with pytest.raises(UserError, match=words):
        blank_method(resolve(small(tiny_config, **fields)))


def test_gradients_are_not_accumulated_with_a_critic(tiny_config, tmp_path):
    small(tiny_config, critic_weight=0.5, critic_layers=1)
    tiny_config.train.accumulation = 2
    with pytest.raises(UserError, match=r"train.accumulation is 2.*expected 1: the critic's batch"):
        loop.run(resolve(tiny_config), str(tmp_path))


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    """VGG16 with random weights, as torchvision names them."""
    _, abstract = weights.abstract(LPIPS, LPIPSConfig())
    rng = np.random.default_rng(0)
    trunk = {
        path: (rng.standard_normal(v.shape, np.float32) * np.prod(v.shape[:-1]) ** -0.5)
        for path, v in abstract.items()
        if path.startswith("features.")
    }
    file = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_file(weights.to_diffusers(trunk), file)
    return file


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, shapes_dir, vgg16_file):
    """(recipe, workdir, the VAE it began from) of a decoder's fine-tune with all losses."""
    from tests.conftest import make_tiny_config

    place = tmp_path_factory.mktemp("tuned")
    rng = np.random.default_rng(1)
    c = small(
        make_tiny_config("", shapes_dir), decoder_only=True, loss="l2", lpips_weight=0.1,
        lpips_from=str(vgg16_file), critic_weight=0.5, critic_layers=1, critic_width=4,
    )  # fmt: skip
    model = model_of(resolve(c).model, ("vae",))
    drawn = {p: rng.normal(size=v.shape, scale=0.2) for p, v in bind(model).abstract.items()}
    drawn = {path: value.astype(np.float32) for path, value in drawn.items()}
    write_diffusers(place / "vae", dataclasses.replace(model, params=drawn))
    c.vae_from = str(place / "vae")
    c.model.dtype = "bfloat16"
    c.ema.profiles = ("0.5",)
    c.train.update(steps=3, checkpoint_every=1, export=True)
    assert loop.run(resolve(c), str(place / "run")) == loop.DONE
    return c, place / "run", drawn


def test_a_decoders_fine_tune_keeps_the_encoder_to_the_bit(tuned):
    _, workdir, before = tuned
    after = read_any(workdir / "diffusers").params
    assert after.keys() == before.keys()
    for path, value in before.items():
        kept = path.startswith(("vae.encoder.", "vae.quant_conv."))
        assert np.array_equal(value, after[path]) == kept, path
    trained = restore_params(workdir, "params", 3)
    own = ("vae.decoder.", "vae.post_quant_conv.", "critic.")
    assert trained and all(path.startswith(own) for path in trained)
    config = json.loads((workdir / "diffusers" / "config.json").read_text())
    assert config["scaling_factor"] == 0.18215  # that of the latents, which are the same


def test_lpips_is_referred_to_and_not_copied(tuned, vgg16_file):
    _, workdir, _ = tuned
    references = read_references(workdir)
    assert set(references) == {"lpips", "vae"}
    assert references["lpips"].path == str(vgg16_file)
    assert references["lpips"].field == "method.lpips_from"
    assert references["lpips"].parameters == 14_716_160
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "train/loss" in row][-1]
    assert last["train/phases/main/lpips"] > 0 and last["train/phases/main/generator"] != 0


def test_a_fine_tune_that_broke_off_goes_on_with_vgg16_at_another_place(
    tuned, vgg16_file, tmp_path
):
    config, workdir, _ = tuned
    copy = broken_off(workdir, tmp_path / "copy", 2)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(vgg16_file.read_bytes())
    config = config.copy_and_resolve_references()
    config.method.lpips_from = str(moved)
    assert loop.run(resolve(config), str(copy)) == loop.DONE
    want, have = (restore_params(folder, "params", 3) for folder in (workdir, copy))
    for path, value in want.items():
        np.testing.assert_array_equal(value, have[path], err_msg=path)
    assert read_references(copy)["lpips"].path == str(moved)


def test_another_vgg16_than_at_first_is_refused(tuned, vgg16_file, tmp_path):
    config, workdir, _ = tuned
    copy = broken_off(workdir, tmp_path / "copy", 2)
    tensors = dict(weights.load_file(vgg16_file))
    tensors["features.0.bias"] = tensors["features.0.bias"] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    config = config.copy_and_resolve_references()
    config.method.lpips_from = str(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is not the one that the run in"):
        loop.run(resolve(config), str(copy))


def test_a_decoder_needs_the_encoder_it_belongs_to(tiny_config, tmp_path):
    with pytest.raises(UserError, match="vae_from"):
        loop.run(resolve(small(tiny_config, decoder_only=True)), str(tmp_path))
