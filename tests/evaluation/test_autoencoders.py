"""An autoencoder judged: PSNR and SSIM against torchmetrics, latents against NumPy, the verb."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import evaluate
from sdjax.evaluation.autoencoders import Latents
from sdjax.evaluation.metrics import frechet, reconstruction
from sdjax.evaluation.reference import PixelTower
from sdjax.families.bind import bind
from sdjax.families.registry import model_of
from sdjax.families.sd import SDConfig
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.models import weights
from sdjax.models.lpips.network import LPIPS, LPIPSConfig
from sdjax.models.vae import VAEConfig

OPTIONS = ("--dataset=captioned_shapes", "--num_samples=6", "--batch_size=4", "--resamples=50")


def pair(seed=0):
    """A picture and a like one, uint8 values in float32 [2, 24, 32, 3]."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 255, (2, 6, 8, 3)).repeat(4, 1).repeat(4, 2)
    b = np.clip(a + rng.normal(size=a.shape) * 20, 0, 255)
    return np.round(a).astype(np.float32), np.round(b).astype(np.float32)


def test_psnr_and_ssim_equal_torchmetrics():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair()
    theirs = [torch.tensor(x.transpose(0, 3, 1, 2)).double() / 255 for x in (a, b)]
    options = {"reduction": "none", "data_range": 1.0}
    psnr = functional.peak_signal_noise_ratio(*theirs, dim=(1, 2, 3), **options)
    np.testing.assert_allclose(jax.jit(reconstruction.psnr)(a, b), psnr, rtol=1e-6)
    # It pads pictures by reflection and judges the border too; the authors, and scikit-image, only
    # where whole windows lie.
    options |= {"return_full_image": True}
    _, whole = functional.structural_similarity_index_measure(*theirs, **options)
    want = whole[..., 5:-5, 5:-5].mean((1, 2, 3))
    np.testing.assert_allclose(jax.jit(reconstruction.ssim)(a, b), want, rtol=1e-4)


def test_equal_pictures_are_the_best():
    a, _ = pair()
    np.testing.assert_array_equal(reconstruction.psnr(a, a), 100)
    np.testing.assert_allclose(reconstruction.ssim(a, a), 1, rtol=1e-6)


def test_latents_imply_the_factors_of_published_models():
    """SD3's: after (z - shift) * scale they have mean 0 and deviation 1 over all channels."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(100_000, 2)) * (0.5, 0.8) + (0.3, -0.1)
    found = Latents(z.mean(0), z.std(0)).about(VAEConfig())
    np.testing.assert_allclose(found["scaling_factor"], 1 / z.std(), rtol=1e-4)
    np.testing.assert_allclose(found["shift_factor"], z.mean(), rtol=1e-4)
    assert found["own"] == {"scaling_factor": 0.18215, "shift_factor": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(the folder of a VAE with random weights, the networks and their parameters)."""
    vae = VAEConfig(
        block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = model_of(dataclasses.replace(SDConfig(), vae=vae), ("vae",))
    networks, rng = bind(model), np.random.default_rng(1)
    drawn = {p: rng.normal(size=v.shape, scale=0.2) for p, v in networks.abstract.items()}
    params = {path: value.astype(np.float32) for path, value in drawn.items()}
    place = tmp_path_factory.mktemp("vae") / "model"
    write_diffusers(place, dataclasses.replace(model, params=params))
    return place, networks, params


def verb(folder, output, shapes_dir, *options):
    return evaluate.main([f"--model={folder}", f"--output={output}", f"--data_dir={shapes_dir}",
                          "--split=test", *OPTIONS, *options])  # fmt: skip


def test_what_the_verb_finds_is_what_the_autoencoder_makes(folder, shapes_dir, tmp_path, capsys):
    place, networks, params = folder
    assert verb(place, tmp_path, shapes_dir, "--features=pixels", "--height=16", "--width=16") == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["num_samples"] == 6 and found["size"] == [16, 16]
    assert any("lpips" in line and "--lpips=FILE" in line for line in found["warnings"])
    from sdjax.data.config import DataConfig
    from sdjax.data.pictures import open_split

    data = DataConfig(data_dir=str(shapes_dir))
    real = open_split(data, "test", size=(16, 16), count=6).read(0, 6)
    vae = networks.module("vae", params)
    moments = np.asarray(jax.jit(vae.encode)(real / np.float32(127.5) - 1))
    made = np.asarray(jax.jit(vae.decode)(jnp.asarray(moments[..., :4])))
    made = np.round(np.clip((made + 1) * 127.5, 0, 255))
    metrics = {name: one["value"] for name, one in found["metrics"].items()}
    assert list(metrics) == ["psnr", "ssim", "rfid"]
    error = np.square(made - real).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["psnr"], np.mean(10 * np.log10(255**2 / error)), rtol=1e-3)
    pixels = PixelTower()
    want = frechet.distance(
        frechet.moments(pixels(made.astype(np.uint8))), frechet.moments(pixels(real))
    )
    np.testing.assert_allclose(metrics["rfid"], want, rtol=1e-2)
    noise = np.random.default_rng(0).normal(size=(400, *moments.shape[:-1], 4))
    z = moments[..., :4] + np.exp(moments[..., 4:] / 2) * noise
    np.testing.assert_allclose(found["latents"]["std"], z.std((0, 1, 2, 3)), rtol=0.01)
    np.testing.assert_allclose(
        found["latents"]["mean"], moments[..., :4].mean((0, 1, 2)), atol=1e-4
    )
    np.testing.assert_allclose(found["latents"]["scaling_factor"], 1 / z.std(), rtol=0.01)
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "metrics.png").is_file()
    shown = capsys.readouterr().out
    assert "scaling_factor" in shown and "psnr" in shown
    again = tmp_path / "again"  # batches of another size
    options = ("--features=pixels", "--height=16", "--width=16", "--batch_size=3")
    assert verb(place, again, shapes_dir, *options) == 0
    same = json.loads((again / "metrics.json").read_text())["metrics"]
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name]["value"], value, rtol=1e-3)


def test_lpips_is_computed_with_a_file_of_vgg16(folder, shapes_dir, tmp_path):
    place, networks, params = folder
    _, abstract = weights.abstract(LPIPS, LPIPSConfig())
    rng = np.random.default_rng(0)
    trunk = {
        path: rng.standard_normal(v.shape, np.float32) * np.prod(v.shape[:-1]) ** -0.5
        for path, v in abstract.items()
        if path.startswith("features.")
    }
    weights.save_file(weights.to_diffusers(trunk), tmp_path / "vgg16.safetensors")
    options = (f"--lpips={tmp_path / 'vgg16.safetensors'}", "--metrics=lpips")
    assert verb(place, tmp_path / "out", shapes_dir, *options) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert list(found) == ["lpips"] and found["lpips"]["value"] > 0
    assert not found["lpips"]["higher_is_better"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--metrics=fid",), "--metrics has fid; expected some of psnr, ssim, lpips, rfid"),
        (("--metrics=lpips",), "--metrics=lpips: this takes the weights of VGG16"),
        (("--metrics=rfid",), "--metrics=rfid: this takes a network that makes features"),
        (("--lora=x",), "x"),
        (("--height=17", "--width=16"), "expected multiples of 2"),
        (("--height=8", "--width=8"), "pictures of 8 x 8 pixels; expected 11 or more"),
        (("--ema_lengths=0.1:0.2:2",), "--ema_lengths is for a model that draws"),
        (("--lpips=/nowhere", "--metrics=lpips"), "/nowhere: no such file; expected the weights"),
        (("--num_samples=1",), "1 pictures to judge; expected 2 or more"),
    ],
)
def test_options_that_do_not_suit_an_autoencoder(
    folder, shapes_dir, tmp_path, options, words, capsys
):
    assert verb(folder[0], tmp_path, shapes_dir, *options) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_draws_has_no_metrics_of_autoencoders(pipeline_folder, tmp_path, capsys):
    options = [f"--model={pipeline_folder}", f"--output={tmp_path}", "--dataset=captioned_shapes"]
    assert evaluate.main([*options, "--metrics=psnr"]) == 2
    assert "--metrics has psnr; expected some of fid" in capsys.readouterr().err
    assert evaluate.main([*options, "--lpips=x"]) == 2
    assert "--lpips=x judges autoencoders" in capsys.readouterr().err
