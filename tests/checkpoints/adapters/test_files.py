"""Files of adapters: there and back, alpha's order of trust, other layouts, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from sdjax.families.family import Model
from sdjax.families.flux import FLUX
from sdjax.families.registry import FAMILIES, model_of
from sdjax.families.sd import SD
from sdjax.families.sd3 import SD3
from sdjax.families.sdxl import SDXL
from sdjax.formats.adapters.layers import AdapterLayer, delta
from sdjax.formats.adapters.peft_metadata import ENTRY
from sdjax.formats.adapters.reading import entrance_inputs, read_adapter
from sdjax.formats.adapters.spellings import modules_of
from sdjax.formats.adapters.writing import write_diffusers_adapter, write_kohya_adapter
from sdjax.formats.folders import ModelError
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.flux.network import FluxConfig
from sdjax.models.mmdit.network import MMDiTConfig
from sdjax.models.unet_config import UNetConfig
from sdjax.models.weights import load_file, read_header, save_file
from tests.checkpoints.adapters import samples

UNET = dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=12,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2)  # fmt: skip
CLIP = dict(vocab_size=60, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8)  # fmt: skip
TINY = Model(SD, {"unet": UNetConfig(**UNET), "text_encoder": CLIPTextConfig(**CLIP)})
XL = dict(addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
          projection_class_embeddings_input_dim=52)  # fmt: skip
TINY_XL = Model(
    SDXL,
    {
        "unet": UNetConfig(**UNET, **XL),
        "text_encoder": CLIPTextConfig(**CLIP),
        "text_encoder_2": CLIPTextConfig(**CLIP | {"hidden_size": 8, "projection_dim": 4}),
    },
)
TINY_FLUX = Model(
    FLUX,
    {
        "transformer": FluxConfig(
            in_channels=16, num_layers=2, num_single_layers=3, joint_attention_dim=24,
            pooled_projection_dim=20, attention_head_dim=6, axes_dims_rope=(2, 2, 2),
            num_attention_heads=2, guidance_embeds=True,
        ),
        "text_encoder": CLIPTextConfig(**CLIP),
    },
)  # fmt: skip
TINY_SD3 = Model(
    SD3,
    {
        "transformer": MMDiTConfig(
            sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
            num_attention_heads=3, joint_attention_dim=24, caption_projection_dim=24,
            pooled_projection_dim=20, pos_embed_max_size=6, qk_norm="rms_norm",
            dual_attention_layers=(0, 1),
        ),
        "text_encoder": CLIPTextConfig(**CLIP | {"projection_dim": 4}),
    },
)  # fmt: skip
MODELS = {"sd": TINY, "sdxl": TINY_XL, "sd3": TINY_SD3, "flux": TINY_FLUX}
ONE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = modules_of(TINY)[ONE].shape  # (16, 16)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def saved(tmp_path, tensors, metadata=None):
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata=metadata)
    return file


def pair(stem=STEM, rank=4, *, up="lora_up.weight", down="lora_down.weight", shape=QUERY):
    return {f"{stem}.{down}": draw(rank, shape[1]), f"{stem}.{up}": draw(shape[0], rank, seed=1)}


# ---- there and back ------------------------------------------------------------------------------


def assert_equal_changes(found, adapter, model, atol=0.0):
    rng = np.random.default_rng(0)
    shapes = {path: module.shape for path, module in modules_of(model).items()}
    assert found.keys() == adapter.keys()
    for path, layer in adapter.items():
        base = rng.standard_normal(shapes[path]).astype(np.float32)
        np.testing.assert_allclose(
            delta(found[path], base), delta(layer, base), atol=atol, err_msg=path
        )


@pytest.mark.parametrize("family", MODELS)
def test_a_kohya_file_of_one_alpha_is_read_back_to_the_bit(family, tmp_path):
    model = MODELS[family]
    adapter = samples.lora_adapter(model, ranks=(4,), scales=(0.5,))
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter)
    found = read_adapter(tmp_path / "a.safetensors", model)
    if family in ("sd", "sdxl"):
        samples.assert_same(found, adapter)
    assert_equal_changes(found, adapter, model, atol=0.0 if family in ("sd", "sdxl") else 1e-6)


@pytest.mark.parametrize("write", [write_kohya_adapter, write_diffusers_adapter])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", MODELS)
def test_mixed_ranks_and_scales_are_the_same_change(family, kind, write, tmp_path):
    """FT-03, FT-04: every key is of one style, and each alpha is right or folded."""
    model = MODELS[family]
    make = samples.lora_adapter if kind == "lora" else samples.dora_adapter
    adapter = make(model, ranks=(4, 2, 3), scales=(1.0, 0.3))
    write(tmp_path / "a.safetensors", model, adapter)
    found = read_adapter(tmp_path / "a.safetensors", model)
    assert_equal_changes(found, adapter, model, atol=2e-6)
    keys = read_header(tmp_path / "a.safetensors")[0]
    styles = {"lora_A" in key for key in keys if ".lora_" in key and "magnitude" not in key}
    assert len(styles) == 1 or write is write_diffusers_adapter


def test_split_ranks_of_fused_modules_come_back_as_they_were(tmp_path):
    adapter = samples.lora_adapter(TINY_FLUX, ranks=(4, 2), scales=(0.5,))
    write_kohya_adapter(tmp_path / "a.safetensors", TINY_FLUX, adapter)
    found = read_adapter(tmp_path / "a.safetensors", TINY_FLUX)
    for path, layer in adapter.items():
        assert found[path].rank == layer.rank, path
    keys = read_header(tmp_path / "a.safetensors")[0]
    block = "transformer.single_transformer_blocks.0."
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    rank = sum(adapter[block + part].rank for part in parts)
    assert keys["lora_unet_single_blocks_0_linear1.lora_down.weight"] == (rank, 12)
    assert keys["lora_unet_single_blocks_0_linear1.lora_up.weight"] == (84, rank)


def test_some_of_the_fused_modules_alone_come_back_alone(tmp_path):
    wanted = ("attn.to_q", "attn.to_v")
    adapter = samples.lora_adapter(TINY_FLUX, wanted=lambda path: path.endswith(wanted))
    write_kohya_adapter(tmp_path / "a.safetensors", TINY_FLUX, adapter)
    found = read_adapter(tmp_path / "a.safetensors", TINY_FLUX)
    assert_equal_changes(found, adapter, TINY_FLUX, atol=1e-6)


def test_a_fused_lora_that_shares_its_ranks_is_split_by_its_rows(tmp_path):
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    down, up = draw(4, 24), draw(72, 4, seed=1)
    file = saved(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                            f"{stem}.alpha": np.float32(2)})  # fmt: skip
    found = read_adapter(file, TINY_SD3)
    block = "transformer.transformer_blocks.0.attn."
    assert list(found) == [block + name for name in ("to_q", "to_k", "to_v")]
    rows = np.concatenate([delta(layer) for layer in found.values()])
    np.testing.assert_allclose(rows, 0.5 * up @ down, atol=1e-6)


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_other_kinds_of_a_fused_module_are_split(kind, tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {
        "loha": {"hada_w1_a": draw(36, 2), "hada_w1_b": draw(2, 12, seed=1),
                 "hada_w2_a": draw(36, 2, seed=2), "hada_w2_b": draw(2, 12, seed=3)},
        "lokr": {"lokr_w1": draw(4, 3), "lokr_w2": draw(9, 4, seed=1)},
        "full": {"diff": draw(36, 12), "diff_b": draw(36, seed=1)},
    }[kind]  # fmt: skip
    file = saved(tmp_path, {f"{stem}.{part}": value for part, value in factors.items()})
    found = read_adapter(file, TINY_FLUX)
    rows = np.concatenate([delta(layer) for layer in found.values()])
    np.testing.assert_allclose(rows, delta(AdapterLayer(kind, factors)), atol=1e-6)
    assert len(found) == 3


def test_the_halves_of_the_last_norm_are_swapped_in_its_outputs_alone(tmp_path):
    """diffusers#13998: the swap was applied to both factors."""
    path = "transformer.norm_out.linear"
    adapter = samples.lora_adapter(TINY_FLUX, wanted=lambda name: name == path)
    write_kohya_adapter(tmp_path / "a.safetensors", TINY_FLUX, adapter)
    tensors = load_file(tmp_path / "a.safetensors")
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    factors = adapter[path].factors
    np.testing.assert_array_equal(tensors[f"{stem}.lora_down.weight"], factors["lora_down"])
    half = len(factors["lora_up"]) // 2
    np.testing.assert_array_equal(tensors[f"{stem}.lora_up.weight"][:half],
                                  factors["lora_up"][half:])  # fmt: skip
    samples.assert_same(read_adapter(tmp_path / "a.safetensors", TINY_FLUX), adapter)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("write", [write_kohya_adapter, write_diffusers_adapter])
def test_half_precision_is_written_and_read(write, dtype, tmp_path):
    adapter = samples.lora_adapter(TINY)
    write(tmp_path / "a.safetensors", TINY, adapter, dtype=dtype)
    kinds = {value.dtype.name for value in load_file(tmp_path / "a.safetensors").values()}
    assert kinds == {dtype}
    found = read_adapter(tmp_path / "a.safetensors", TINY)
    assert all(v.dtype == np.float32 for layer in found.values() for v in layer.factors.values())
    assert_equal_changes(found, adapter, TINY, atol=2e-2)


def test_a_value_beyond_float16_is_refused(tmp_path):
    layer = samples.lora(np.random.default_rng(0), QUERY, 2, size=1e7)
    with pytest.raises(ModelError, match="beyond float16"):
        write_kohya_adapter(tmp_path / "a.safetensors", TINY, {ONE: layer}, dtype="float16")


# ---- scales --------------------------------------------------------------------------------------


def test_alpha_is_that_of_the_metadata_then_of_the_tensor_then_the_rank(tmp_path):
    """FT-02, FT-08."""
    tensors = pair()
    assert read_adapter(saved(tmp_path, tensors), TINY)[ONE].scale == 1.0
    tensors[f"{STEM}.alpha"] = np.float32(8)
    assert read_adapter(saved(tmp_path, tensors), TINY)[ONE].scale == 2.0
    said = {"unet.r": 4, "unet.lora_alpha": 1}
    for more, scale in (
        ({}, 0.25),
        ({"unet.use_rslora": True}, 0.5),
        ({"unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"unet.alpha_pattern": {"ttn1.to_q": 2}}, 0.25),  # no whole word
        ({"unet.alpha_pattern": {"^attn1.to_q": 2}}, 0.25),  # no whole path
        ({"unet.alpha_pattern": {f"^{ONE.removeprefix('unet.')}": 2}}, 0.5),
        ({"unet.r": 2, "unet.rank_pattern": {"to_q": 4}}, 0.25),
    ):
        file = saved(tmp_path, tensors, {ENTRY: json.dumps({**said, **more})})
        assert read_adapter(file, TINY)[ONE].scale == scale, more
    file = saved(tmp_path, tensors, {ENTRY: json.dumps({"text_encoder.r": 4})})
    assert read_adapter(file, TINY)[ONE].scale == 2.0  # another network's


@pytest.mark.parametrize("alpha, rank, scale", [(0, 4, 1.0), (1, 8, 0.125), (64, 16, 4.0)])
def test_alpha_over_rank_is_the_scale(alpha, rank, scale, tmp_path):
    """FT-08: 0 is the rank; 64 at rank 16 is what LyCORIS saves for rsLoRA of alpha 16."""
    file = saved(tmp_path, {**pair(rank=rank), f"{STEM}.alpha": np.float32(alpha)})
    assert read_adapter(file, TINY)[ONE].scale == scale


@pytest.mark.parametrize(
    "said, words",
    [
        ({"unet.r": 8}, "the rank of its factors is 4"),
        ({"unet.r": 4, "unet.lora_alpha": "x"}, "lora_alpha = 'x'"),
        ({"unet.r": 4, "unet.alpha_pattern": {"(a+)+$": 3}}, "expected a name"),
        ([1], "expected an object"),
    ],
)
def test_metadata_that_contradicts_the_factors_is_refused(said, words, tmp_path):
    file = saved(tmp_path, pair(), {ENTRY: json.dumps(said)})
    with pytest.raises(ModelError, match=words.replace("(", r"\(")):
        read_adapter(file, TINY)


def test_a_lokr_of_whole_factors_has_no_scale(tmp_path):
    """FT-13."""
    tensors = {f"{STEM}.lokr_w1": draw(4, 4), f"{STEM}.lokr_w2": draw(4, 4),
               f"{STEM}.alpha": np.float32(0.5)}  # fmt: skip
    assert read_adapter(saved(tmp_path, tensors), TINY)[ONE].scale == 1.0
    tensors[f"{STEM}.lokr_w2_a"], tensors[f"{STEM}.lokr_w2_b"] = draw(4, 2), draw(2, 4)
    del tensors[f"{STEM}.lokr_w2"]
    assert read_adapter(saved(tmp_path, tensors), TINY)[ONE].scale == 0.25


# ---- other layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem, down, up",
    [
        (ONE, "lora_A.weight", "lora_B.weight"),
        (ONE, "lora_A.default.weight", "lora_B.default.weight"),
        (ONE, "lora.down.weight", "lora.up.weight"),
        (ONE.removeprefix("unet."), "lora.down.weight", "lora.up.weight"),
        (f"base_model.model.{ONE.removeprefix('unet.')}", "lora_A.weight", "lora_B.weight"),
        (ONE.replace("to_q", "processor.to_q_lora"), "down.weight", "up.weight"),
        (STEM, "lora_down.weight", "lora_up.weight"),
        (STEM.replace("lora_unet", "lycoris"), "lora_down.weight", "lora_up.weight"),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
         "lora_down.weight", "lora_up.weight"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
         "lora_down.weight", "lora_up.weight"),
        (ONE.replace("unet.", "lora_unet."), "lora_down.weight", "lora_up.weight"),
    ],
)  # fmt: skip
def test_a_lora_in_other_spellings_is_the_same(stem, down, up, tmp_path):
    found = read_adapter(saved(tmp_path, pair(stem, up=up, down=down)), TINY)
    expected = read_adapter(saved(tmp_path, pair()), TINY)
    samples.assert_same(found, expected)


def test_the_output_of_old_attention_processors_is_to_out_0(tmp_path):
    stem = ONE.replace("to_q", "processor.to_out_lora")
    found = read_adapter(saved(tmp_path, pair(stem, up="up.weight", down="down.weight")), TINY)
    assert list(found) == [ONE.replace("to_q", "to_out.0")]


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
        "text_encoder.encoder.layers.1.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te_encoder_layers_1_self_attn_q_proj",
    ],
)
def test_text_encoders_have_names_with_and_without_text_model(stem, tmp_path):
    file = saved(tmp_path, pair(stem, shape=(12, 12)))
    assert list(read_adapter(file, TINY)) == ["text_encoder.encoder.layers.1.self_attn.q_proj"]


def test_both_text_encoders_keep_their_sides(tmp_path):
    """FT-21: the widths differ, and so do the prefixes."""
    adapter = samples.lora_adapter(TINY_XL, wanted=lambda path: path.endswith("self_attn.q_proj"))
    write_kohya_adapter(tmp_path / "a.safetensors", TINY_XL, adapter)
    shapes = read_header(tmp_path / "a.safetensors")[0]
    layer = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    assert shapes[f"lora_te1_{layer}"][1] == 12 and shapes[f"lora_te2_{layer}"][1] == 8
    found = read_adapter(tmp_path / "a.safetensors", TINY_XL)
    assert_equal_changes(found, adapter, TINY_XL, atol=1e-6)


def test_a_dora_of_peft_has_magnitudes_of_outputs(tmp_path):
    conv = "unet.down_blocks.0.resnets.0.conv1"
    shape = modules_of(TINY)[conv].shape  # (8, 8, 3, 3): square, so the key has to tell
    tensors = {
        f"{conv}.lora_A.weight": draw(2, *shape[1:]),
        f"{conv}.lora_B.weight": draw(shape[0], 2, 1, 1),
        f"{conv}.lora_magnitude_vector": 1 + np.abs(draw(1, shape[0], 1, 1)),
    }
    layer = read_adapter(saved(tmp_path, tensors), TINY)[conv]
    assert layer.kind == "dora" and layer.factors["dora_scale"].shape == (8, 1, 1, 1)


def test_a_bias_of_peft_takes_the_scale(tmp_path):
    module = ONE.replace("to_q", "to_out.0")
    tensors = pair(module, up="lora_B.weight", down="lora_A.weight")
    tensors[f"{module}.lora_B.bias"] = np.ones(16, np.float32)
    said = {"unet.r": 4, "unet.lora_alpha": 2}
    layer = read_adapter(saved(tmp_path, tensors, {ENTRY: json.dumps(said)}), TINY)[module]
    np.testing.assert_array_equal(layer.factors["diff_b"], np.full(16, 0.5, np.float32))


def test_norms_of_lycoris_are_whole_differences(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_norm"
    file = saved(tmp_path, {f"{stem}.w_norm": draw(16), f"{stem}.b_norm": draw(16)})
    found = read_adapter(file, TINY)
    assert found["unet.mid_block.attentions.0.norm"].kind == "full"
    write_kohya_adapter(tmp_path / "b.safetensors", TINY, found)
    assert read_header(tmp_path / "b.safetensors")[0].keys() == {f"{stem}.w_norm", f"{stem}.b_norm"}


def test_a_peft_folder_says_alpha_in_its_config(tmp_path):
    stem = f"base_model.model.{ONE.removeprefix('unet.')}"
    tensors = pair(stem, up="lora_B.weight", down="lora_A.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 6, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(tmp_path, TINY)[ONE].scale == 1.5


def test_xlabs_names_of_flux(tmp_path):
    tensors = {
        "double_blocks.0.processor.qkv_lora1.down.weight": draw(2, 12),
        "double_blocks.0.processor.qkv_lora1.up.weight": draw(36, 2),
        "double_blocks.1.processor.proj_lora2.down.weight": draw(2, 12),
        "double_blocks.1.processor.proj_lora2.up.weight": draw(12, 2),
        "single_blocks.2.processor.qkv_lora.down.weight": draw(2, 12),
        "single_blocks.2.processor.qkv_lora.up.weight": draw(36, 2, seed=3),
        "single_blocks.2.processor.proj_lora.down.weight": draw(2, 60),
        "single_blocks.2.processor.proj_lora.up.weight": draw(12, 2),
    }
    found = read_adapter(saved(tmp_path, tensors), TINY_FLUX)
    assert {path.removeprefix("transformer.") for path in found} == {
        *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        "transformer_blocks.1.attn.to_add_out",
        *(f"single_transformer_blocks.2.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        "single_transformer_blocks.2.proj_out",
    }
    up = tensors["single_blocks.2.processor.qkv_lora.up.weight"]
    key = found["transformer.single_transformer_blocks.2.attn.to_k"]
    np.testing.assert_array_equal(key.factors["lora_up"], up[12:24])


def test_a_control_lora_of_black_forest_labs(tmp_path):
    """Biases of the factors, and whole scales of norms in the place of the base's."""
    norm = "transformer.transformer_blocks.0.attn.norm_q"
    tensors = {
        "double_blocks.0.img_attn.qkv.lora_A.weight": draw(2, 12),
        "double_blocks.0.img_attn.qkv.lora_B.weight": draw(36, 2),
        "double_blocks.0.img_attn.qkv.lora_B.bias": draw(36, seed=1),
        "double_blocks.0.img_attn.norm.query_norm.scale": draw(6, seed=2),
    }
    found = read_adapter(saved(tmp_path, tensors), TINY_FLUX)
    attn = "transformer.transformer_blocks.0.attn."
    assert set(found) == {norm, *(attn + name for name in ("to_q", "to_k", "to_v"))}
    bias = tensors["double_blocks.0.img_attn.qkv.lora_B.bias"]
    np.testing.assert_array_equal(found[attn + "to_k"].factors["diff_b"], bias[12:24])
    base = draw(6, seed=3)
    np.testing.assert_allclose(
        base + delta(found[norm], base),
        tensors["double_blocks.0.img_attn.norm.query_norm.scale"],
        atol=1e-6,
    )
    write_kohya_adapter(tmp_path / "b.safetensors", TINY_FLUX, found)
    keys = read_header(tmp_path / "b.safetensors")[0]
    assert "lora_unet_double_blocks_0_img_attn_norm_query_norm.set_weight" in keys
    again = read_adapter(tmp_path / "b.safetensors", TINY_FLUX)
    samples.assert_same({norm: again[norm]}, {norm: found[norm]})
    np.testing.assert_array_equal(again[attn + "to_k"].factors["diff_b"], bias[12:24])


def test_a_four_channel_lora_of_conv_in_leaves_further_inputs(tmp_path):
    """FT-57: on a model of inpainting, with nine channels."""
    nine = Model(SD, {"unet": UNetConfig(**UNET, in_channels=9)})
    adapter = {"unet.conv_in": samples.lora(np.random.default_rng(0), (8, 4, 3, 3), 2)}
    write_kohya_adapter(tmp_path / "a.safetensors", TINY, adapter)
    found = delta(read_adapter(tmp_path / "a.safetensors", nine)["unet.conv_in"])
    assert found.shape == (8, 9, 3, 3) and not found[:, 4:].any()
    np.testing.assert_array_equal(found[:, :4], delta(adapter["unet.conv_in"]))
    own = {"unet.conv_in": samples.lora(np.random.default_rng(1), (8, 9, 3, 3), 2)}
    write_kohya_adapter(tmp_path / "b.safetensors", nine, own)
    samples.assert_same(read_adapter(tmp_path / "b.safetensors", nine), own)


def test_a_lora_of_flux_dev_leaves_the_inputs_of_a_model_that_reads_a_picture(tmp_path):
    """x_embedder of FLUX.1-Canny, -Depth and -Fill has the tokens' channels first."""
    wide = FLUX.widened(TINY_FLUX.denoiser, 4)
    model = Model(FLUX, {**TINY_FLUX.networks, "transformer": wide})
    adapter = {"transformer.x_embedder": samples.lora(np.random.default_rng(0), (12, 16), 2)}
    write_diffusers_adapter(tmp_path, TINY_FLUX, adapter)
    found = delta(read_adapter(tmp_path, model)["transformer.x_embedder"])
    assert found.shape == (12, 32) and not found[:, 16:].any()
    np.testing.assert_array_equal(found[:, :16], delta(adapter["transformer.x_embedder"]))
    assert entrance_inputs(tmp_path, TINY_FLUX) == 16


@pytest.mark.parametrize("kind", ["tucker", "loha", "loha_tucker", "lokr", "full"])
def test_other_changes_of_conv_in_leave_further_inputs_too(kind, tmp_path):
    nine = Model(SD, {"unet": UNetConfig(**UNET, in_channels=9)})
    factors = {
        "tucker": {"lora_down": draw(2, 4, 1, 1), "lora_mid": draw(2, 2, 3, 3),
                   "lora_up": draw(8, 2, 1, 1)},
        "loha": {"hada_w1_a": draw(8, 2), "hada_w1_b": draw(2, 36), "hada_w2_a": draw(8, 2),
                 "hada_w2_b": draw(2, 36)},
        "loha_tucker": {"hada_w1_a": draw(2, 8), "hada_w1_b": draw(2, 4), "hada_w2_a": draw(2, 8),
                        "hada_w2_b": draw(2, 4), "hada_t1": draw(2, 2, 3, 3),
                        "hada_t2": draw(2, 2, 3, 3)},
        "lokr": {"lokr_w1": draw(2, 2), "lokr_w2": draw(4, 2, 3, 3)},
        "full": {"diff": draw(8, 4, 3, 3), "diff_b": draw(8)},
    }[kind]  # fmt: skip
    layer = AdapterLayer({"tucker": "lora"}.get(kind, kind.partition("_")[0]), factors)
    write_kohya_adapter(tmp_path / "a.safetensors", TINY, {"unet.conv_in": layer})
    found = read_adapter(tmp_path / "a.safetensors", nine)["unet.conv_in"]
    change = delta(found)
    assert change.shape == (8, 9, 3, 3) and not change[:, 4:].any()
    expected = delta(layer).reshape(8, 4, 3, 3)
    np.testing.assert_allclose(change[:, :4], expected, rtol=1e-6, atol=1e-6)
    assert ("diff_b" in found.factors) == (kind == "full")


def test_a_dora_of_four_channels_does_not_fit_nine(tmp_path):
    nine = Model(SD, {"unet": UNetConfig(**UNET, in_channels=9)})
    layer = samples.lora(np.random.default_rng(0), (8, 4, 3, 3), 2)
    layer = AdapterLayer("dora", {**layer.factors, "dora_scale": np.ones((8, 1, 1, 1), np.float32)})
    write_kohya_adapter(tmp_path / "a.safetensors", TINY, {"unet.conv_in": layer})
    with pytest.raises(ModelError, match="lora_down is .2, 4, 3, 3."):
        read_adapter(tmp_path / "a.safetensors", nine)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lora_unet_nothing.alpha": np.float32(1)}, "unknown: lora_unet_nothing.alpha"),
        ({"some.tensor": np.ones(3, np.float32)}, "unknown: some.tensor"),
        ({f"{STEM}.lora_up.weight": None}, f"{STEM}: has no lora_up beside lora_down"),
        ({f"{STEM}.lora_down.weight": draw(3, 16)}, r"lora_down is \(3, 16\), lora_up is"),
        ({f"{STEM}.lora_down.weight": draw(4, 9)}, r"lora_down is \(4, 9\)"),
        ({f"{STEM}.alpha": draw(2)}, r"alpha is \(2,\)"),
        ({f"{STEM}.alpha": np.float32(np.nan)}, "1 NaN"),
        ({f"{STEM}.lora_up.weight": np.full((16, 4), np.inf, np.float32)}, "64 Inf"),
        ({f"{STEM}.lora_up.weight": np.ones((16, 4), np.int32)}, "no floats"),
        ({f"{STEM}.lokr_w1": draw(2, 2)}, "expected one kind of adapter"),
        ({f"{ONE}.lora_A.weight": draw(4, 16), f"{ONE}.lora_B.weight": draw(16, 4)}, "other name"),
        ({f"{STEM}.diff_b": draw(16)}, "does not have"),
        ({f"{STEM}.lora_magnitude_vector": draw(9)}, "dora_scale"),
        ({f"{STEM}.lora_down.weight": None, f"{STEM}.lora_up.weight": None,
          f"{STEM}.alpha": np.float32(1)}, "without the factors"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, words, tmp_path):
    """FT-06."""
    tensors = {key: value for key, value in {**pair(), **change}.items() if value is not None}
    with pytest.raises(ModelError, match=words.replace("other name", "another name")):
        read_adapter(saved(tmp_path, tensors), TINY)


def test_an_adapter_of_another_family_is_named(tmp_path):
    """FT-06: of SD1 for SDXL, and the other way round."""
    sd, sdxl = (model_of(FAMILIES[name].presets["base"]) for name in ("sd", "sdxl"))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    for mine, other, width in ((sd, sdxl, 768), (sdxl, sd, 2048)):
        layer = samples.lora(np.random.default_rng(0), (640, width), 2)
        write_kohya_adapter(tmp_path / "a.safetensors", mine, {f"unet.{name}": layer})
        with pytest.raises(ModelError) as error:
            read_adapter(tmp_path / "a.safetensors", other)
        assert f"an adapter of {mine.family.title}" in str(error.value)
        assert f"the model is {other.family.title}" in str(error.value)


def test_a_folder_without_an_adapter_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(ModelError, match="expected pytorch_lora_weights.safetensors or one"):
        read_adapter(tmp_path, TINY)
    (tmp_path / "lora.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="expected a .safetensors file of an adapter"):
        read_adapter(tmp_path / "lora.pt", TINY)


# ---- what is written -----------------------------------------------------------------------------


def test_diffusers_gets_the_least_metadata_that_loads(tmp_path):
    """FT-20: a field that a reader's LoraConfig lacks is a TypeError there."""
    adapter = samples.lora_adapter(TINY, ranks=(4, 4, 2))
    write_diffusers_adapter(tmp_path / "a.safetensors", TINY, adapter)
    said = json.loads(read_header(tmp_path / "a.safetensors")[1][ENTRY])
    fields = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora",
              "use_rslora", "lora_bias"}  # fmt: skip
    assert {key.rpartition(".")[2] for key in said} == fields
    assert {key.rpartition(".")[0] for key in said} == {"unet", "text_encoder"}
    assert said["unet.r"] == said["unet.lora_alpha"] == 4
    assert said["unet.rank_pattern"] == said["unet.alpha_pattern"]
    assert set(said["unet.rank_pattern"].values()) == {2}
    keys = read_header(tmp_path / "a.safetensors")[0]
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in keys


@pytest.mark.parametrize(
    "layer, words",
    [
        (AdapterLayer("lokr", {"lokr_w1": draw(4, 4), "lokr_w2": draw(4, 4)}), "a LoKr"),
        (AdapterLayer("full", {"diff": draw(16, 16)}), "a whole difference"),
        (AdapterLayer("dora", {"lora_down": draw(2, 16), "lora_up": draw(16, 2),
                               "dora_scale": draw(1, 16)}), "magnitudes of inputs"),
    ],
)  # fmt: skip
def test_what_diffusers_does_not_read_is_refused_with_the_remedy(layer, words, tmp_path):
    with pytest.raises(ModelError, match=f"{words}.*--format=kohya, or merge"):
        write_diffusers_adapter(tmp_path / "a.safetensors", TINY, {ONE: layer})
    write_kohya_adapter(tmp_path / "a.safetensors", TINY, {ONE: layer})
    assert_equal_changes(
        read_adapter(tmp_path / "a.safetensors", TINY), {ONE: layer}, TINY, atol=1e-6
    )


def test_tuckers_form_is_written_for_kohya_alone(tmp_path):
    conv = "unet.down_blocks.0.resnets.0.conv1"
    factors = {"lora_down": draw(3, 8, 1, 1), "lora_mid": draw(2, 3, 3, 3),
               "lora_up": draw(8, 2, 1, 1)}  # fmt: skip
    adapter = {conv: AdapterLayer("lora", factors)}
    with pytest.raises(ModelError, match="Tucker's form"):
        write_diffusers_adapter(tmp_path / "a.safetensors", TINY, adapter)
    write_kohya_adapter(tmp_path / "a.safetensors", TINY, adapter)
    samples.assert_same(read_adapter(tmp_path / "a.safetensors", TINY), adapter)
    assert read_header(tmp_path / "a.safetensors")[1]["ss_network_module"] == "lycoris.kohya"


def test_a_dora_has_its_magnitudes_in_either_file_and_a_note_on_readers(tmp_path):
    """FT-11, FT-12."""
    adapter = samples.dora_adapter(TINY)
    notes = write_kohya_adapter(tmp_path / "a.safetensors", TINY, adapter)
    assert any("ComfyUI" in note and "diffusers" in note for note in notes)
    shapes = read_header(tmp_path / "a.safetensors")[0]
    assert shapes[f"{STEM}.dora_scale"] == (16, 1)
    assert shapes["lora_unet_conv_in.dora_scale"] == (8, 1, 1, 1)
    assert write_diffusers_adapter(tmp_path / "b.safetensors", TINY, adapter) == []
    shapes = read_header(tmp_path / "b.safetensors")[0]
    assert shapes[f"{ONE}.lora_magnitude_vector"] == (16,)
    assert shapes["unet.conv_in.lora_magnitude_vector"] == (1, 8, 1, 1)


def test_a_text_encoder_without_out_proj_has_a_note(tmp_path):
    """FT-21."""
    adapter = samples.lora_adapter(TINY, wanted=lambda path: path.endswith(("q_proj", "fc1")))
    (note,) = write_kohya_adapter(tmp_path / "a.safetensors", TINY, adapter)
    assert "out_proj" in note
    whole = samples.lora_adapter(TINY, wanted=lambda path: path.startswith("text_encoder."))
    assert write_kohya_adapter(tmp_path / "a.safetensors", TINY, whole) == []


@pytest.mark.parametrize(
    "family, preset, prediction, expected",
    [
        ("sd", "base", "epsilon", ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon")),
        ("sd", "sd2_v", "v_prediction",
         ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v")),
        ("sd", "sd2", "epsilon", ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon")),
        ("sdxl", "base", "epsilon",
         ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon")),
        ("flux", "dev", "flow", ("flux1", "False", "flux-1-dev/lora", None)),
        ("sd3", "sd35_large", "flow",
         ("5-large", "False", "stable-diffusion-3-5-large/lora", None)),
    ],
)  # fmt: skip
def test_metadata_says_the_base_as_web_interfaces_read_it(
    family, preset, prediction, expected, tmp_path
):
    """FT-20."""
    model = model_of(FAMILIES[family].presets[preset], prediction_type=prediction)
    path, module = next(
        (p, m) for p, m in modules_of(model).items() if p.endswith(("to_out.0", "proj_out"))
    )
    adapter = {path: samples.lora(np.random.default_rng(0), module.shape, 2, scale=0.5)}
    own = {"ss_output_name": "mine", "ss_tag_frequency": {"a": {"b": 1}}, "ss_steps": 10,
           "ss_min_snr_gamma": None}  # fmt: skip
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter, own)
    said = read_header(tmp_path / "a.safetensors")[1]
    assert all(isinstance(value, str) for value in said.values())
    found = tuple(said.get(key) for key in ("ss_base_model_version", "ss_v2",
                  "modelspec.architecture", "modelspec.prediction_type"))  # fmt: skip
    assert found == expected
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "1.0")
    assert said["ss_network_module"] == "networks.lora" and said["ss_network_args"] == "{}"
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert json.loads(said["ss_tag_frequency"]) == {"a": {"b": 1}} and said["ss_steps"] == "10"
    assert said["ss_min_snr_gamma"] == "None"


def test_bfloat16_files_are_read_in_float32(tmp_path):
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in pair().items()}
    layer = read_adapter(saved(tmp_path, tensors), TINY)[ONE]
    assert layer.factors["lora_up"].dtype == np.float32
