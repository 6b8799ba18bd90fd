"""Files of ControlNets: the folder of diffusers, LDM's names in one file, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from sdjax.families.beside.controlnet import MARK, PART, PREFIX, config_of_file, places
from sdjax.families.bind import abstract_params
from sdjax.families.single_file import to_file
from sdjax.formats.controlnet import read_controlnet_files, write_controlnet
from sdjax.formats.folders import ModelError
from sdjax.models.config import ConfigError
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.weights import from_diffusers, load_file, save_file, tensor_shapes, to_diffusers

CROSS, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
SD1 = ControlNetConfig(
    block_out_channels=(32, 64),
    down_block_types=(CROSS, DOWN),
    layers_per_block=1,
    cross_attention_dim=24,
    conditioning_embedding_out_channels=(4, 6, 8, 10),
)
XL = dataclasses.replace(
    SD1,
    block_out_channels=(64, 128),
    down_block_types=(DOWN, CROSS),
    layers_per_block=2,
    attention_head_dim=(1, 2),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=10 + 6 * 256,
)
CONFIGS = {"sd1": SD1, "xl": XL}


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = abstract_params(PART, config)
    return {p: rng.normal(size=v.shape).astype(np.float32) for p, v in shapes.items()}


def ldm_file(file, config, params, prefix=PREFIX, **more):
    tensors = to_file(to_diffusers(params), places(config))
    save_file({prefix + name: value for name, value in tensors.items()} | more, file)
    return file


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("case", CONFIGS)
def test_folders_go_to_diffusers_and_back(case, tmp_path):
    """FT-53."""
    diffusers = pytest.importorskip("diffusers")
    config, params = CONFIGS[case], random_params(CONFIGS[case])
    write_controlnet(tmp_path / "ours", config, params)
    model, info = diffusers.ControlNetModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "theirs")
    found, back = read_controlnet_files(tmp_path / "theirs")
    assert found == config
    assert_equal(back, params)


@pytest.mark.parametrize("case", CONFIGS)
def test_files_of_ldm_are_what_diffusers_converts(case, tmp_path):
    """FT-53: the names are those that diffusers reads such files by."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config, params = CONFIGS[case], random_params(CONFIGS[case])
    file = ldm_file(tmp_path / "a [1].safetensors", config, params)
    stored = load_file(file)
    assert PREFIX + "input_hint_block.14.weight" in stored
    assert PREFIX + "zero_convs.0.0.weight" in stored
    theirs = convert_controlnet_checkpoint(stored, config.to_json())
    # diffusers 0.42.1 leaves out the embedding of SDXL's numbers, which lies where the UNet's does.
    left_out = {n: v for n, v in to_diffusers(params).items() if n.startswith("add_embedding.")}
    assert bool(left_out) == (case == "xl") and not theirs.keys() & left_out.keys()
    assert_equal(from_diffusers({**theirs, **left_out}, abstract_params(PART, config)), params)
    for prefix in (PREFIX, ""):
        file = ldm_file(tmp_path / "b.safetensors", config, params, prefix)
        found, back = read_controlnet_files(file)
        assert (found.unet.heads(0), found.unet.heads(1)) == (
            config.unet.heads(0), config.unet.heads(1),
        )  # fmt: skip
        assert abstract_params(PART, found).keys() == params.keys()
        assert_equal(back, params)


def test_a_file_that_holds_a_whole_model_as_well_is_read(tmp_path):
    params = random_params(SD1)
    more = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros(3, np.float32)}
    file = ldm_file(tmp_path / "a.safetensors", SD1, params, **more)
    assert_equal(read_controlnet_files(file)[1], params)


def test_files_that_are_no_controlnet_are_refused(tmp_path):
    params = random_params(SD1)
    good = ldm_file(tmp_path / "good.safetensors", SD1, params)
    stored = load_file(good)
    nan = {**stored, PREFIX + MARK: np.full_like(stored[PREFIX + MARK], np.nan)}
    missing = {k: v for k, v in stored.items() if "zero_convs.1.0.bias" not in k}
    cases = {
        "no control_model.input_hint_block": {"a": np.zeros(3, np.float32)},
        "is a Control-LoRA": {**stored, "lora_controlnet": np.zeros(1, np.float32)},
        "give the folder with its config.json": to_diffusers(params),
        "NaN": nan,
        "missing: control_model.zero_convs.1.0.bias": missing,
        "unused: control_model.extra": {**stored, PREFIX + "extra": np.zeros(3, np.float32)},
    }
    for i, (words, tensors) in enumerate(cases.items()):
        file = tmp_path / f"{i}.safetensors"
        save_file(tensors, file)
        with pytest.raises(ModelError, match=words):
            read_controlnet_files(file)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        read_controlnet_files(tmp_path / "a.pth")
    (tmp_path / "a").mkdir()
    with pytest.raises(ModelError, match="config.json"):
        read_controlnet_files(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ModelError, match="of a 'AutoencoderKL'; expected a ControlNetModel"):
        read_controlnet_files(tmp_path / "a")


def test_shapes_that_no_controlnet_has_are_refused():
    places_of = places(SD1)
    shapes = {
        places_of(name).name: shape
        for name, shape in tensor_shapes(abstract_params(PART, SD1)).items()
    }
    assert config_of_file(shapes).conditioning_embedding_out_channels == (4, 6, 8, 10)
    for name, words in (
        ("middle_block.1.proj_in.weight", "no middle_block.1.proj_in.weight"),
        ("input_blocks.0.0.weight", "no input_blocks.0.0.weight"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of_file({k: v for k, v in shapes.items() if k != name})
    with pytest.raises(ConfigError, match="1 to 4,096"):
        config_of_file({**shapes, "input_hint_block.2.weight": (10**6, 4, 3, 3),
                        "input_hint_block.4.weight": (10**6, 4, 3, 3)})  # fmt: skip
