"""What single files hold besides plain weights: averages, left-overs, float8, scales, NaN."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from sdjax.convert import main
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.folders import ModelError
from sdjax.formats.single_file import Hints, read_single_file
from sdjax.formats.single_file_writer import write_single_file
from sdjax.models import weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model."
COUNTERS = {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones((), np.int32)}


@pytest.fixture(scope="module")
def sd1(pipeline_folder):
    return read_diffusers(pipeline_folder)


@pytest.fixture(scope="module")
def tensors(sd1, tmp_path_factory):
    """Those of `sd1` as a single file; do not change them."""
    file = tmp_path_factory.mktemp("single") / "sd1.safetensors"
    write_single_file(file, sd1)
    return weights.load_file(file)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def averages(tensors):
    """LDM's average of the UNet, larger by 1."""
    start = "model_ema.diffusion_model"
    return {
        start + key.removeprefix(UNET).replace(".", ""): value + 1
        for key, value in tensors.items()
        if key.startswith(UNET)
    }


@pytest.fixture
def read(file, sd1):
    """`read(tensors)` writes a file without a header, as other programs do, and reads it."""

    def written(tensors, **kw):
        weights.save_file(tensors, file)
        return read_single_file(file, **{"hints": Hints(like=sd1), **kw})

    return written


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name


def only(network, pretrained):
    return {k: v for k, v in pretrained.params.items() if k.split(".")[0] == network}


# ---- averages --------------------------------------------------------------------------------


def test_average_of_half_of_the_unet_is_refused_and_raw_goes_on(tensors, averages, read, sd1):
    kept = dict(list(averages.items())[: len(averages) // 2])
    message = rf"has {len(kept)} of the {len(averages)} weights of the unet, without model_ema\."
    with pytest.raises(ModelError, match=message + r"\w+; .*--weights=raw"):
        read({**tensors, **kept, **COUNTERS})
    raw = read({**tensors, **kept, **COUNTERS}, weights="raw", components=("unet",))
    assert_same_bits(raw.params, only("unet", sd1))
    assert f"model_ema.* ({len(kept)} tensors)" in raw.ignored
    assert read({**tensors, **kept}, components=("text_encoder",)).text_encoders


def test_average_with_weights_of_another_model_is_refused(tensors, averages, read):
    other = {**averages, "model_ema.diffusion_modelinput_blocks990weight": np.ones(2, np.float32)}
    count = len(averages)
    with pytest.raises(ModelError, match=rf"has {count} of the {count} .*and 1 that are none"):
        read({**tensors, **other})


def test_counters_of_an_average_alone_are_no_average(tensors, read, sd1):
    found = read({**tensors, **COUNTERS}, components=("unet",))
    assert_same_bits(found.params, only("unet", sd1))
    assert set(COUNTERS) <= set(found.ignored)
    assert not any("their average" in line for line in found.ignored)


def test_average_of_an_autoencoder_alone_is_taken_whole_or_not_at_all(tensors, read, sd1):
    own = {key.removeprefix(VAE): value for key, value in tensors.items() if key.startswith(VAE)}
    loss = {"loss.logvar": np.zeros((), np.float32)}
    flat = {"model_ema." + key.replace(".", ""): value + 1 for key, value in (own | loss).items()}
    read_vae = {"components": ("vae",)}
    found = read({**own, **loss, **flat, **COUNTERS}, **read_vae)
    for path, value in found.params.items():
        np.testing.assert_array_equal(value, sd1.params[path] + np.float32(1))
    assert "the VAE's parameters: the file has their average, which was taken" in found.ignored
    raw = read({**own, **loss, **flat}, weights="raw", **read_vae)
    assert_same_bits(raw.params, only("vae", sd1))
    flat.pop("model_ema.encoderconv_inweight")
    with pytest.raises(ModelError, match="weights of the vae, without model_ema.encoderconv"):
        read({**own, **flat}, **read_vae)
    lost = read({**own, "model_ema.losslogvar": loss["loss.logvar"]}, **read_vae)
    assert_same_bits(lost.params, raw.params)


# ---- left-overs ------------------------------------------------------------------------------


LEFTOVERS = (
    "epoch", "global_step", "betas", "denoiser.sigmas", "lvlb_weights", f"{CLIP}logit_scale",
    f"{CLIP}transformer.logit_scale", f"{CLIP}text_projection", f"{CLIP}text_projection.weight",
    f"{CLIP}transformer.text_projection", f"{CLIP}transformer.text_projection.weight",
)  # fmt: skip


def test_harmless_leftovers_are_ignored_and_listed_by_their_names(tensors, read, sd1):
    nan = np.full((24, 24), np.nan, np.float32)  # whatever it is, it is not looked at
    found = read({**tensors, **dict.fromkeys(LEFTOVERS, nan)})
    assert_same_bits(found.params, dict(sd1.params))
    assert sorted(found.ignored) == sorted(LEFTOVERS)


@pytest.mark.parametrize("name", ["epochs", "betas.0", "cond_stage_model.logit_scale.x", "loss.a"])
def test_name_like_that_of_a_leftover_is_refused(name, tensors, read):
    with pytest.raises(ModelError, match=f"sdjax does not know {name}, which may belong"):
        read({**tensors, name: np.ones(1, np.float32)})


def test_losses_of_the_autoencoder_are_ignored_and_counted(tensors, read, sd1):
    extra = {f"{VAE}loss.logvar": np.ones(()), f"{VAE}loss.discriminator.main.0.bias": np.ones(3)}
    extra[f"{VAE}model_ema.encoderconv_inbias"] = np.ones(3)
    found = read({**tensors, **extra}, components=("vae",))
    assert_same_bits(found.params, only("vae", sd1))
    expected = {f"{VAE}loss.* (2 tensors)", f"{VAE}model_ema.* (1 tensors)"}
    assert set(found.ignored) == expected


def test_heads_of_sdxl_are_told_apart(xl_folder, read, tmp_path):
    sdxl = read_diffusers(xl_folder)
    write_single_file(tmp_path / "xl.safetensors", sdxl)
    own = weights.load_file(tmp_path / "xl.safetensors")
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    extra = {
        f"{first}logit_scale": np.ones(()),
        f"{first}text_projection": np.ones((24, 24), np.float32),
        f"{second}model.logit_scale": np.ones(()),
        f"{second}model.attn_mask": np.ones((16, 16), np.float32),
    }
    encoders = ("text_encoder", "text_encoder_2")
    found = read({**own, **extra}, components=encoders, hints=Hints(like=sdxl))
    assert_same_bits(found.params, only("text_encoder", sdxl) | only("text_encoder_2", sdxl))
    assert set(found.ignored) == set(extra)
    own.pop(f"{second}model.text_projection")
    with pytest.raises(ModelError, match=rf"missing: {second}model.text_projection"):
        read({**own, **extra}, components=encoders, hints=Hints(like=sdxl))


# ---- kinds of numbers ------------------------------------------------------------------------


def test_file_in_float8_is_read_to_the_bit(tensors, read, sd1):
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    table = make_schedule(ScheduleConfig()).alphas_cumprod
    small = {k: v.astype(dtype) for k, v in {**tensors, "alphas_cumprod": table}.items()}
    found = read(small)
    rounded = {path: value.astype(dtype).astype(np.float32) for path, value in sd1.params.items()}
    assert_same_bits(found.params, rounded)
    assert found.schedule == sd1.schedule


def test_scaled_float8_is_refused_where_it_is_to_be_read(tensors, read, sd1):
    name = f"{UNET}out.2.weight"
    scaled = {
        **tensors,
        name: tensors[name].astype(ml_dtypes.float8_e4m3fn),
        f"{UNET}out.2.scale_weight": np.ones((), np.float32),
        f"{UNET}scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn),
    }
    message = r"model.safetensors: its weights are quantised .*out.2.scale_weight, .*float16"
    with pytest.raises(ModelError, match=message):
        read(scaled)
    vae = read(scaled, components=("vae",)).params
    assert_same_bits(vae, only("vae", sd1))
    with pytest.raises(ModelError, match=r"quantised .* beside them \(scaled_fp8\); sdjax"):
        read({**tensors, "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)})


def test_integers_are_refused(tensors, read):
    name = f"{VAE}quant_conv.weight"
    with pytest.raises(ModelError, match=f"vae: (?s:.)*no floats: {name} is int8; sdjax"):
        read({**tensors, name: np.ones(tensors[name].shape, np.int8)}, components=("vae",))


# ---- NaN and Inf -----------------------------------------------------------------------------


@pytest.mark.parametrize("network, name, value", [
    ("unet", f"{UNET}input_blocks.0.0.weight", np.nan),
    ("vae", f"{VAE}encoder.mid.attn_1.q.weight", -np.inf),
    ("text_encoder", f"{CLIP}transformer.text_model.encoder.layers.1.mlp.fc1.bias", np.inf),
])  # fmt: skip
def test_weight_that_is_not_finite_is_named_as_in_the_file(network, name, value, tensors, read):
    bad = tensors[name].copy()
    bad.flat[3] = value
    found = f"1 {'NaN' if np.isnan(value) else 'Inf'} among {bad.size:,} values"
    with pytest.raises(ModelError) as caught:
        read({**tensors, name: bad}, components=(network,))
    assert f"model.safetensors: {network}: 1 of " in str(caught.value)
    assert str(caught.value).splitlines()[1:] == [f"  {name}: {found}"]


def test_average_that_is_not_finite_is_named_and_raw_goes_on(tensors, averages, read, sd1):
    name = "model_ema.diffusion_modelout2bias"
    bad = {**averages, name: np.full_like(averages[name], np.inf)}
    with pytest.raises(ModelError, match=rf"\n  {name}: 4 Inf among 4 values"):
        read({**tensors, **bad}, components=("unet",))
    raw = read({**tensors, **bad}, weights="raw", components=("unet",))
    assert_same_bits(raw.params, only("unet", sd1))


def test_parts_of_a_fused_weight_are_named_as_the_whole(sd1, file):
    """OpenCLIP keeps query, key and value in one."""
    encoder = dataclasses.replace(sd1.networks["text_encoder"], hidden_act="gelu")
    params = {path: value.copy() for path, value in sd1.params.items()}
    params["text_encoder.encoder.layers.0.self_attn.k_proj.bias"][2] = np.nan
    sd2 = dataclasses.replace(
        sd1, networks={**sd1.networks, "text_encoder": encoder}, params=params
    )
    write_single_file(file, sd2)
    name = f"{CLIP}model.transformer.resblocks.0.attn.in_proj_bias"
    with pytest.raises(ModelError, match=rf"\n  {name}: 1 NaN among 24 values"):
        read_single_file(file, components=("text_encoder",), hints=Hints(like=sd2))


def test_convert_refuses_what_is_not_finite(tensors, file, pipeline_folder, tmp_path, capsys):
    name = f"{UNET}out.2.bias"
    weights.save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, file)
    out = tmp_path / "out"
    code = main([f"--input={file}", f"--output={out}", f"--config_from={pipeline_folder}"])
    error = capsys.readouterr().err
    assert code == 2 and f"{name}: 4 NaN" in error and "Traceback" not in error
    assert not out.exists()
