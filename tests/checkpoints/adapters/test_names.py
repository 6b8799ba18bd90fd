"""Names of modules in files, at the full size of releases: ours there and back, and diffusers'."""

import functools

import numpy as np
import pytest

from sdjax.families.registry import FAMILIES, model_of
from sdjax.formats.adapters.layers import AdapterLayer
from sdjax.formats.adapters.reading import read_adapter
from sdjax.formats.adapters.recognition import release_of
from sdjax.formats.adapters.spellings import modules_of, native_targets, spellings
from sdjax.formats.adapters.writing import write_diffusers_adapter, write_kohya_adapter
from sdjax.models.weights import load_file
from tests.checkpoints.adapters import samples

# Linear and Conv of the denoiser: docs of the sizes are in finetuning.md, FT-05 and FT-15.
RELEASES = {
    ("sd", "base"): 282,
    ("sd", "sd2"): 282,
    ("sdxl", "base"): 794,
    ("sd3", "sd35_medium"): 393,
    ("flux", "dev"): 504,
}


@functools.cache
def release(family, preset):
    return model_of(FAMILIES[family].presets[preset])


def thin(shape):
    """A LoRA of rank 1 that takes no memory for its outputs."""
    ones = (1,) * (len(shape) - 2)
    down = np.broadcast_to(np.float32(1), (1, *shape[1:]))
    return AdapterLayer(
        "lora", {"lora_down": down, "lora_up": np.ones((shape[0], 1, *ones), np.float32)}
    )


def thin_adapter(model):
    return {path: thin(shape) for path, shape in samples.matrices(model).items()}


@pytest.mark.parametrize("family, preset", RELEASES)
def test_every_name_of_a_release_is_read_back(family, preset):
    model, count = release(family, preset), RELEASES[family, preset]
    modules = modules_of(model)
    matrices = samples.matrices(model)
    assert sum(path.startswith(model.family.denoiser) for path in matrices) == count
    spelled = spellings(model, modules)
    assert {path for path in matrices if spelled[path].parts != (path,)} == set()


@pytest.mark.parametrize("family, preset", RELEASES)
def test_no_two_modules_share_a_name(family, preset):
    """Underscores for dots could make two names of different modules one."""
    model = release(family, preset)
    modules = modules_of(model)
    flat = [path.replace(".", "_") for path in modules]
    assert len(set(flat)) == len(flat)
    native = native_targets(model, modules)
    names = [stem.replace(".", "_") for stem in native]
    assert len(set(names)) == len(names)
    parts = [path for target in native.values() for path in target.parts]
    assert sorted(parts) == sorted(p for p in modules if p.startswith(model.family.denoiser))


@pytest.mark.parametrize("write", [write_diffusers_adapter, write_kohya_adapter])
@pytest.mark.parametrize("family, preset", [("sd", "base"), ("sdxl", "base")])
def test_a_file_of_every_module_is_read_whole(family, preset, write, tmp_path):
    model = release(family, preset)
    adapter = thin_adapter(model)
    write(tmp_path / "a.safetensors", model, adapter)
    found = read_adapter(tmp_path / "a.safetensors", model)
    assert found.keys() == adapter.keys()
    assert release_of(tmp_path / "a.safetensors").family is model.family


def unet_of_diffusers(model):
    import diffusers
    import torch

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(model.networks["unet"].to_json())


@pytest.mark.parametrize("family, preset", [("sd", "base"), ("sd", "sd2"), ("sdxl", "base")])
@pytest.mark.parametrize("write", [write_diffusers_adapter, write_kohya_adapter])
def test_diffusers_finds_every_module_of_the_unet(family, preset, write, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    model = release(family, preset)
    adapter = {p: layer for p, layer in thin_adapter(model).items() if p.startswith("unet.")}
    write(tmp_path / "a.safetensors", model, adapter)
    tensors = {k: torch.tensor(v) for k, v in load_file(tmp_path / "a.safetensors").items()}
    unet = unet_of_diffusers(model)
    mixin = StableDiffusionXLLoraLoaderMixin if family == "sdxl" else StableDiffusionLoraLoaderMixin
    state, alphas = mixin.lora_state_dict(tensors, unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="a")
    wanted = {name for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    assert wanted == {path.removeprefix("unet.") for path in adapter}
    loaded = {name for name, p in unet.named_parameters() if "lora_" in name and not p.is_meta}
    assert len(loaded) in (0, 2 * len(adapter))


ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
JOINT = (*ATTENTION, ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")


@pytest.mark.parametrize(
    "family, preset, ends, without, modules, parameters",
    [
        ("sd", "base", ATTENTION, (), 128, 3_188_736),
        ("sd", "sd2", ATTENTION, (), 128, 3_319_808),
        ("sdxl", "base", ATTENTION, (), 560, 23_224_320),
        ("sd", "base", "", (), 282, 16_931_456),
        ("sd", "sd2", "", (), 282, 17_062_528),
        ("sdxl", "base", "", (), 794, 49_412_736),
        ("sd3", "sd35_medium", JOINT, (".attn2.",), 191, 9_388_032),
        ("sd3", "sd35_large", JOINT, (), 303, 23_580_672),
        ("flux", "dev", JOINT, (), 266, 26_148_864),
    ],
)
def test_as_many_parameters_as_peft_has(family, preset, ends, without, modules, parameters):
    """FT-15: at rank 16; counted with PEFT on diffusers' networks."""
    model = release(family, preset)
    shapes = [
        shape
        for path, shape in samples.matrices(model).items()
        if path.startswith(model.family.denoiser)
        and path.endswith(ends)
        and not any(part in path for part in without)
    ]
    assert len(shapes) == modules
    assert sum(16 * (np.prod(shape[1:]) + shape[0]) for shape in shapes) == parameters


def test_a_file_is_as_large_as_its_parameters(tmp_path):
    """FT-15: SD1.5's attention at rank 16, in float16."""
    model = release("sd", "base")
    adapter = samples.lora_adapter(
        model, ranks=(16,), wanted=lambda p: p.startswith("unet.") and p.endswith(ATTENTION)
    )
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter, dtype="float16")
    assert (tmp_path / "a.safetensors").stat().st_size == pytest.approx(2 * 3_188_736, rel=0.01)


ROWS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip


def test_sdxl_is_written_under_the_names_of_sgm(tmp_path):
    model = release("sdxl", "base")
    adapter = thin_adapter(model)
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter)
    keys = load_file(tmp_path / "a.safetensors", wanted=lambda name: name.endswith("alpha"))
    stems = {key.removesuffix(".alpha") for key in keys}
    assert {f"lora_unet_{name}" for name in ROWS.values()} <= stems
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in stems
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1" in stems
    assert "lora_te2_text_projection" in stems
    assert len(stems) == len(adapter)


def test_sd_is_written_under_the_names_of_diffusers_and_read_under_those_of_ldm(tmp_path):
    model = release("sd", "base")
    adapter = {"unet.down_blocks.0.downsamplers.0.conv": thin((320, 320, 3, 3))}
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter)
    keys = load_file(tmp_path / "a.safetensors")
    assert set(keys) == {
        f"lora_unet_down_blocks_0_downsamplers_0_conv.{part}"
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    spelled = spellings(model, modules_of(model))
    (path,) = adapter
    for name in (
        "lora_unet_input_blocks_3_0_op",
        "diffusion_model.input_blocks.3.0.op",
        "model.diffusion_model.input_blocks.3.0.op",
        "lycoris_down_blocks_0_downsamplers_0_conv",
        "down_blocks.0.downsamplers.0.conv",
        "unet.down_blocks.0.downsamplers.0.conv",
        "lora_unet.down_blocks.0.downsamplers.0.conv",
    ):
        assert spelled[name].parts == (path,), name
    # The two that clash in readers that match beginnings.
    for number, block in ((1, 0), (10, 3)):
        (path,) = spelled[f"lora_unet_input_blocks_{number}_0_in_layers_2"].parts
        assert path.startswith(f"unet.down_blocks.{block}.")


def test_the_transformers_fused_names(tmp_path):
    flux, sd3 = release("flux", "dev"), release("sd3", "sd35_medium")
    found = spellings(flux, modules_of(flux))["lora_unet_single_blocks_37_linear1"].parts
    block = "transformer.single_transformer_blocks.37"
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    assert found == tuple(f"{block}.{name}" for name in names)
    found = spellings(sd3, modules_of(sd3))
    block = "transformer.transformer_blocks.0.attn"
    assert found["lora_unet_joint_blocks_0_context_block_attn_qkv"].parts == tuple(
        f"{block}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")
    )
    assert found["lora_te3_encoder_block_0_layer_0_SelfAttention_q"].parts == (
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    )
    assert found["lora_te2_text_model_encoder_layers_0_mlp_fc1"].parts == (
        "text_encoder_2.encoder.layers.0.mlp.fc1",
    )
