"""Single-file checkpoints against diffusers' `from_single_file`, and there and back."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.convert import convert
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.families.family import Model
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.folders import ModelError
from sdjax.formats.single_file import Hints, read_single_file
from sdjax.formats.single_file_writer import write_single_file
from sdjax.models import weights
from sdjax.models.clip import CLIPText, CLIPTextConfig
from tests.odd_names import ODD

EMA = "model_ema.diffusion_model"


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


def torch_params(pipeline):
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {
        f"{name}.{key.removeprefix('text_model.')}": value.detach().numpy()
        for name in names
        if getattr(pipeline, name, None) is not None
        for key, value in getattr(pipeline, name).named_parameters()
    }


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name


def hollow(file, extra=(), drop=()):
    """Rewrites a file without its header and some tensors, with others: as another program's."""
    tensors = {k: v for k, v in weights.load_file(file).items() if not k.startswith(tuple(drop))}
    weights.save_file({**tensors, **dict(extra)}, file)
    return tensors


@pytest.fixture(scope="module")
def sd1(pipeline_folder):
    return read_diffusers(pipeline_folder)


@pytest.fixture(scope="module")
def sd2(sd1):
    """OpenCLIP, of which one layer more than is used can be in a file."""
    config = dataclasses.replace(sd1.networks["text_encoder"], hidden_act="gelu")
    rng = np.random.default_rng(0)
    shapes = weights.abstract(CLIPText, config)[1]
    fresh = {f"text_encoder.{p}": rng.normal(size=v.shape) for p, v in shapes.items()}
    params = {**sd1.params, **{k: v.astype(np.float32) for k, v in fresh.items()}}
    networks = {**sd1.networks, "text_encoder": config}
    return dataclasses.replace(
        sd1, networks=networks, params=params, prediction_type="v_prediction"
    )


@pytest.fixture(scope="module")
def sdxl(xl_folder):
    return read_diffusers(xl_folder)


@pytest.fixture
def file(tmp_path, sd1):
    write_single_file(tmp_path / "sd1.safetensors", sd1)
    return tmp_path / "sd1.safetensors"


# ---- against torch -------------------------------------------------------------------------------


def test_diffusers_reads_what_is_written(file, torch_pipeline, pipeline_folder):
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        file, config=str(pipeline_folder), local_files_only=True
    )
    assert_same_bits(torch_params(pipeline), torch_params(torch_pipeline))


def test_diffusers_reads_sdxl(sdxl, torch_xl_pipeline, xl_folder, tmp_path):
    import diffusers

    write_single_file(tmp_path / "xl.safetensors", sdxl)
    pipeline = diffusers.StableDiffusionXLPipeline.from_single_file(
        tmp_path / "xl.safetensors", config=str(xl_folder), local_files_only=True
    )
    assert_same_bits(torch_params(pipeline), torch_params(torch_xl_pipeline))


def test_names_that_other_programs_look_for(sd1, sd2, sdxl, tmp_path):
    """A1111's guess_model_config_from_state_dict, ComfyUI's model_detection, diffusers' keys."""
    wanted = {
        "sd1": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "sd2": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "sdxl": "conditioner.embedders.1.model.ln_final.weight",
    }
    everywhere = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
    )
    for name, pretrained in (("sd1", sd1), ("sd2", sd2), ("sdxl", sdxl)):
        write_single_file(tmp_path / f"{name}.safetensors", pretrained)
        keys = weights.read_header(tmp_path / f"{name}.safetensors")[0]
        assert wanted[name] in keys and set(everywhere) <= set(keys)
        assert "v_pred" not in keys
    zero = dataclasses.replace(sdxl.schedule, zero_terminal_snr=True)
    v = dataclasses.replace(sdxl, prediction_type="v_prediction", schedule=zero)
    write_single_file(tmp_path / "v.safetensors", v)
    assert {"v_pred", "ztsnr"} <= set(weights.read_header(tmp_path / "v.safetensors")[0])


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_there_and_back_gives_the_same_bits(name, request, pipeline_folder, tmp_path):
    pretrained = request.getfixturevalue(name)
    file = tmp_path / "model.safetensors"
    notes = write_single_file(file, pretrained)
    assert any("tokenise with CLIP's 49,408" in note for note in notes)
    hints = Hints(tokenizer=str(pipeline_folder / "tokenizer"))
    again = read_single_file(file, hints=hints)
    assert again.networks == pretrained.networks
    assert again.schedule == pretrained.schedule
    assert again.prediction_type == pretrained.prediction_type
    assert again.settings == pretrained.settings
    assert_same_bits(again.params, pretrained.params)
    if name != "sd1":  # OpenCLIP pads with token 0
        tokenizer = again.tokenizers["tokens_2" if name == "sdxl" else "tokens"]
        assert tokenizer.encode(["a red circle"])[0, -1] == 0


def test_refiner_there_and_back(sdxl, tmp_path):
    kept = {k: v for k, v in sdxl.params.items() if not k.startswith("text_encoder.")}
    refiner = dataclasses.replace(
        sdxl,
        networks={name: c for name, c in sdxl.networks.items() if name != "text_encoder"},
        tokenizers={"tokens_2": sdxl.tokenizers["tokens_2"]},
        params=kept,
        settings={"zero_empty_prompt": False},
    )
    file = tmp_path / "refiner.safetensors"
    write_single_file(file, refiner)
    assert "conditioner.embedders.0.model.text_projection" in weights.read_header(file)[0]
    again = read_single_file(file, hints=Hints(like=refiner))
    assert "text_encoder" not in again.networks and again.settings["zero_empty_prompt"] is False
    assert_same_bits(again.params, refiner.params)


def test_half_precision(sd1, tmp_path):
    file = tmp_path / "half.safetensors"
    write_single_file(file, sd1, dtype="bfloat16")
    assert {str(v.dtype) for v in weights.load_file(file).values()} == {"bfloat16"}
    once = read_single_file(file, hints=Hints(like=sd1))
    assert all(value.dtype == np.float32 for value in once.params.values())
    write_single_file(tmp_path / "again.safetensors", once, dtype="bfloat16")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_autoencoder_alone(sd1, tmp_path):
    vae = {k: v for k, v in sd1.params.items() if k.startswith("vae.")}
    alone = Model(sd1.family, {"vae": sd1.vae}, params=vae)
    file = tmp_path / "vae.safetensors"
    write_single_file(file, alone)
    assert "encoder.mid.attn_1.q.weight" in weights.read_header(file)[0]
    assert_same_bits(read_any(file, components=("vae",)).params, vae)
    hollow(file, {"loss.logvar": np.zeros((), np.float32)})
    with pytest.raises(ModelError, match="--scaling_factor, 0.18215 for SD1.*0.13025"):
        read_any(file, components=("vae",))
    like = read_any(file, hints=Hints(like=alone))
    assert_same_bits(like.params, vae)
    assert like.ignored == ("loss.* (1 tensors)",)


# ---- files of other programs ---------------------------------------------------------------------


def test_averages_are_taken_unless_raw_is_asked_for(file, sd1):
    raw = weights.load_file(file)
    prefix = "model.diffusion_model."
    averages = {
        EMA + key[len(prefix) :].replace(".", ""): value + 1
        for key, value in raw.items()
        if key.startswith(prefix)
    }
    table = make_schedule(ScheduleConfig()).alphas_cumprod.astype(np.float16)
    extra = {"model_ema.decay": np.ones(()), "alphas_cumprod": table, "betas": np.ones(1000)}
    hollow(file, {**averages, **extra})
    read = read_single_file(file, hints=Hints(like=sd1))
    plain = read_single_file(file, weights="raw", hints=Hints(like=sd1))
    assert_same_bits(plain.params, dict(sd1.params))
    for path, value in sd1.params.items():
        expected = value + np.float32(1) if path.startswith("unet.") else value
        np.testing.assert_array_equal(read.params[path], expected, err_msg=path)
    assert "the UNet's parameters: the file has their average, which was taken" in read.ignored
    assert {"betas", "alphas_cumprod", "model_ema.decay"} <= set(read.ignored)
    assert f"model_ema.* ({len(averages)} tensors)" in plain.ignored
    assert not any("model_ema.*" in line for line in read.ignored)
    with pytest.raises(ModelError, match="weights is '0.9'; a single file has ema and raw"):
        read_single_file(file, weights="0.9", hints=Hints(like=sd1))


def test_old_and_new_spellings_of_the_text_encoder_are_read(file, sd1):
    start = "cond_stage_model.transformer."
    tensors = weights.load_file(file)
    renamed = {key.replace(f"{start}text_model.", start): v for key, v in tensors.items()}
    renamed[f"{start}embeddings.position_ids"] = np.arange(16)[None]
    weights.save_file(renamed, file)
    assert_same_bits(read_single_file(file, hints=Hints(like=sd1)).params, dict(sd1.params))


def test_unused_layer_of_sd2_is_dropped(sd2, tmp_path):
    file = tmp_path / "sd2.safetensors"
    write_single_file(file, sd2)
    prefix = "cond_stage_model.model."
    last = {k: v for k, v in weights.load_file(file).items() if ".resblocks.1." in k}
    extra = {key.replace(".resblocks.1.", ".resblocks.2."): v + 1 for key, v in last.items()}
    extra |= {
        f"{prefix}text_projection": np.ones((24, 24), np.float32),
        f"{prefix}logit_scale": np.ones((), np.float32),
    }
    hollow(file, extra)
    read = read_single_file(file, hints=Hints(like=sd2))
    assert_same_bits(read.params, sd2.params)
    assert {f"{prefix}text_projection", f"{prefix}logit_scale"} <= set(read.ignored)
    assert f"{prefix}transformer.resblocks.2.* ({len(last)} tensors)" in read.ignored


def test_zero_terminal_snr_is_seen_in_the_files_own_table(file, sd1, pipeline_folder):
    schedule = dataclasses.replace(sd1.schedule, zero_terminal_snr=True)
    hints = Hints(tokenizer=str(pipeline_folder / "tokenizer"), like=sd1)
    hollow(file, {"alphas_cumprod": make_schedule(schedule).alphas_cumprod.astype(np.float32)})
    assert read_single_file(file, hints=hints).schedule == schedule
    hollow(file, {"alphas_cumprod": np.linspace(1, 0, 1000, dtype=np.float32)})
    with pytest.raises(ModelError, match="alphas_cumprod .* is not the noise schedule"):
        read_single_file(file, hints=hints)


# ---- what is wrong -------------------------------------------------------------------------------


def test_what_a_file_does_not_say_is_asked_for(file, sd2, tmp_path):
    with pytest.raises(ModelError, match="no tokenizer; .* in sdjax.convert by --tokenizer"):
        read_any(file)
    two = tmp_path / "two.safetensors"
    write_single_file(two, sd2)
    hollow(two)
    with pytest.raises(ModelError, match="2 file does not say .*--prediction_type, epsilon"):
        read_any(two)


def test_misfits_are_named_with_the_file(file, sd1):
    name = "model.diffusion_model.out.2.bias"
    hollow(file, {name: np.ones(3, np.float32), "model.diffusion_model.odd": np.ones(1)},
           drop=["first_stage_model.quant_conv.bias"])  # fmt: skip
    with pytest.raises(ModelError) as caught:
        read_single_file(file, hints=Hints(like=sd1))
    message = str(caught.value)
    assert f"{file}: unet: " in message
    assert f"mis-shaped: {name} is (3,)" in message
    assert "unused: model.diffusion_model.odd (1,)" in message


@pytest.mark.parametrize(
    "extra, message",
    [
        (["control_model.zero.bias", "control_model.a.weight", "control_model.b.weight"],
         r"know control_model.a.weight \(and 2 more under control_model.\), which may"),
        (["edm_mean", "betas.shadow", "model_embedding"],
         "does not know betas.shadow, edm_mean, model_embedding, which may"),
    ],
)  # fmt: skip
def test_other_kinds_of_models_are_refused(file, sd1, extra, message):
    hollow(file, dict.fromkeys(extra, np.ones(1, np.float32)))
    with pytest.raises(ModelError, match=message):
        read_single_file(file, hints=Hints(like=sd1))


@pytest.mark.parametrize("header", ["{", '{"schedule": {"kind": "linear", "newer": 1}}'])
def test_header_of_another_version_is_named(file, sd1, header):
    weights.save_file(weights.load_file(file), file, metadata={"sdjax": header})
    with pytest.raises(ModelError, match="sd1.safetensors: the header has a part of sdjax"):
        read_single_file(file, hints=Hints(like=sd1))


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    file = tmp_path / "lora.safetensors"
    weights.save_file({"lora_unet_down.weight": np.ones(1)}, file)
    with pytest.raises(ModelError, match="no network that sdjax knows.*lora_unet_down"):
        read_any(file)
    file.write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot be read as a whole safetensors file"):
        read_any(file)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        read_any(tmp_path / "model.ckpt")


def test_what_has_no_place_in_a_single_file_is_refused(file, sd1, tmp_path):
    other = tmp_path / "other.safetensors"
    with pytest.raises(ModelError, match="sd1.safetensors is there already.*--force"):
        write_single_file(file, sd1)
    with pytest.raises(ModelError, match="prediction_type is 'flow'"):
        write_single_file(other, dataclasses.replace(sd1, prediction_type="flow"))
    with pytest.raises(ModelError, match="a VAE or a whole pipeline; schedule missing"):
        write_single_file(other, dataclasses.replace(sd1, schedule=None))
    with pytest.raises(ModelError, match="ends in .safetensors"):
        write_single_file(tmp_path / "model.ckpt", sd1)
    big = {**sd1.params, "unet.conv_in.bias": sd1.params["unet.conv_in.bias"] + 7e4}
    with pytest.raises(ModelError, match=r"unet: conv_in.bias reaches 7e\+04.*bfloat16"):
        write_single_file(other, dataclasses.replace(sd1, params=big), dtype="float16")
    assert list(tmp_path.iterdir()) == [file]


# ---- the verb ------------------------------------------------------------------------------------


def test_the_verb_goes_all_ways(sd1, pipeline_folder, tmp_path):
    file, tokenizer = tmp_path / "model.safetensors", str(pipeline_folder / "tokenizer")
    convert(pipeline_folder, file)
    convert(file, tmp_path / "workdir", tokenizer=tokenizer)
    assert_same_bits(read_any(tmp_path / "workdir").params, dict(sd1.params))
    convert(file, tmp_path / "folder", to="diffusers", config_from=str(pipeline_folder))
    assert_same_bits(read_diffusers(tmp_path / "folder").params, dict(sd1.params))
    convert(tmp_path / "workdir", tmp_path / "again.safetensors")
    assert_same_bits(weights.load_file(tmp_path / "again.safetensors"), weights.load_file(file))
    convert(pipeline_folder, tmp_path / "shards", to="diffusers", max_shard_size="40KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 2


def test_options_for_another_kind_are_refused(file, pipeline_folder, tmp_path):
    for options, message in (
        ({"tokenizer": "x"}, "--tokenizer=x is for a single_file as --input"),
        ({"step": 3}, "--step=3 is for a workdir"),
        ({"max_shard_size": "5GB"}, "--max_shard_size=5GB is for a diffusers folder to write"),
        ({"to": "single_file"}, "expected a name that ends in .safetensors"),
    ):
        with pytest.raises(ModelError, match=message):
            convert(pipeline_folder, tmp_path / "out", **options)
    with pytest.raises(ModelError, match="--variant=fp16 is for a diffusers"):
        convert(file, tmp_path / "out", variant="fp16")
    with pytest.raises(ModelError, match="is the name of a file, but a workdir is a folder"):
        convert(pipeline_folder, tmp_path / "out.safetensors", to="workdir")
    assert list(tmp_path.iterdir()) == [file]


def test_the_command(file, pipeline_folder, tmp_path):
    command = [sys.executable, "-m", "sdjax.convert", f"--input={file}"]
    failed = subprocess.run(
        [*command, f"--output={tmp_path / 'out'}"], capture_output=True, text=True
    )
    assert failed.returncode == 2 and "--tokenizer" in failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "out").exists()
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'out'}", f"--tokenizer={pipeline_folder / 'tokenizer'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["method"] == {
        "name": "denoise"
    }


def test_a_release_is_recognised_by_its_shapes(tmp_path):
    """No header and no hints: a UNet of SD1's kind, narrow, with the heads of the family."""
    from sdjax.models.unet import UNet, UNetConfig
    from sdjax.models.vae import VAE, VAEConfig

    configs = {
        "unet": (UNet, UNetConfig(block_out_channels=(32, 32, 64, 64))),
        "vae": (VAE, VAEConfig(block_out_channels=(32, 32, 32, 32))),
        "text_encoder": (CLIPText, CLIPTextConfig(vocab_size=560, num_hidden_layers=1)),
    }
    params = {
        f"{name}.{path}": np.zeros(leaf.shape, np.float32)
        for name, (cls, config) in configs.items()
        for path, leaf in weights.abstract(cls, config)[1].items()
    }
    from sdjax.data.text.tokenizer import Tokenizer
    from sdjax.families.sd import SD

    tokenizer = Tokenizer.train(["a red circle"], 560)
    tokenizer.save(tmp_path / "tokenizer")
    networks = {name: config for name, (_, config) in configs.items()}
    whole = Model(
        SD, networks, schedule=ScheduleConfig(), params=params, tokenizers={"tokens": tokenizer}
    )
    write_single_file(tmp_path / "m.safetensors", whole)
    hollow(tmp_path / "m.safetensors")
    read = read_single_file(
        tmp_path / "m.safetensors", hints=Hints(tokenizer=str(tmp_path / "tokenizer"))
    )
    assert read.networks == networks and read.schedule == ScheduleConfig()
    assert read.prediction_type == "epsilon" and read.params.keys() == params.keys()
    save_workdir(tmp_path / "workdir", read)
