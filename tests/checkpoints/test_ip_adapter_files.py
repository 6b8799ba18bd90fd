"""Files of IP-Adapters and folders of image towers, there and back, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from sdjax.families.beside.ip_adapter import PART
from sdjax.families.bind import abstract_params
from sdjax.formats.folders import ModelError
from sdjax.formats.image_encoder import read_image_encoder
from sdjax.formats.ip_adapter import read_ip_adapter_file, write_ip_adapter
from sdjax.models import weights
from sdjax.models.clip_vision import CLIPVision
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.weights import load_file, save_file, to_diffusers

CONFIG = IPAdapterConfig(12, 24, 4, (16, 16, 32, 16, 32))


PLUS = dataclasses.replace(CONFIG, tokens=5, resampler_layers=2, resampler_width=64)


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = abstract_params(PART, config)
    return {p: rng.normal(size=v.shape).astype(np.float32) for p, v in shapes.items()}


@pytest.fixture
def params():
    return random_params(CONFIG)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_file_has_the_names_of_the_authors_and_is_read_back(params, tmp_path):
    """FT-54."""
    file = write_ip_adapter(tmp_path / "a [1]", params)
    stored = load_file(file)
    numbers = {int(n.split(".")[1]) for n in stored if n.startswith("ip_adapter.")}
    assert numbers == {1, 3, 5, 7, 9}
    assert stored["image_proj.proj.weight"].shape == (4 * 24, 12)
    assert stored["ip_adapter.5.to_v_ip.weight"].shape == (32, 24)
    config, back = read_ip_adapter_file(file)
    assert config == CONFIG
    assert_equal(back, params)


def test_a_file_of_plus_has_the_names_of_the_authors_and_is_read_back(tmp_path):
    params = random_params(PLUS)
    stored = load_file(write_ip_adapter(tmp_path, params))
    shapes = {n: v.shape for n, v in stored.items() if n.startswith("image_proj.")}
    assert shapes["image_proj.latents"] == (1, 5, 64)
    assert shapes["image_proj.layers.1.0.to_kv.weight"] == (128, 64)
    assert shapes["image_proj.layers.1.1.1.weight"] == (256, 64)
    assert shapes["image_proj.layers.1.1.3.weight"] == (64, 256)
    config, back = read_ip_adapter_file(tmp_path / "ip_adapter.safetensors")
    assert config == PLUS
    assert_equal(back, params)


def test_a_file_of_pytorch_is_read(params, tmp_path):
    torch = pytest.importorskip("torch")
    stored = load_file(write_ip_adapter(tmp_path, params))
    groups = {"image_proj": {}, "ip_adapter": {}}
    for name, value in stored.items():
        part, _, rest = name.partition(".")
        groups[part][rest] = torch.from_numpy(value)
    torch.save(groups, tmp_path / "a.bin")
    config, back = read_ip_adapter_file(tmp_path / "a.bin")
    assert config == CONFIG
    assert_equal(back, params)


def test_files_that_are_no_plain_ip_adapter_are_refused(params, tmp_path):
    stored = load_file(write_ip_adapter(tmp_path, params))
    key = "ip_adapter.3.to_v_ip.weight"
    cases = {
        "no image_proj.latents of 3 axes": {"image_proj.latents": np.zeros(3)},
        "multiple of 64": {
            n: np.zeros((1, 4, 8)) if n.endswith("latents") else v
            for n, v in to_diffusers(random_params(PLUS)).items()
            if not n.startswith("ip_adapter.")
        } | {n: v for n, v in stored.items() if n.startswith("ip_adapter.")},
        "FaceID, with layers": {**stored, "image_proj.proj.0.weight": np.zeros((4, 4))},
        "has no image_proj.proj.weight": {"a": np.zeros(3)},
        f"missing: {key}": {n: v for n, v in stored.items() if n != key},
        "unused: ip_adapter.4.to_v_ip.weight": {
            **stored, "ip_adapter.4.to_v_ip.weight": np.zeros((16, 24))
        },
        "expected N = 1, 3, 5": {n: v for n, v in stored.items() if "ip_adapter.1." not in n},
        f"{key}.*16, 23": {**stored, key: np.zeros((16, 23))},
        "NaN": {**stored, key: np.full((16, 24), np.nan)},
    }  # fmt: skip
    for i, (words, tensors) in enumerate(cases.items()):
        file = tmp_path / f"{i}.safetensors"
        save_file({n: np.asarray(v, np.float32) for n, v in tensors.items()}, file)
        with pytest.raises(ModelError, match=words):
            read_ip_adapter_file(file)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(ModelError, match="expected a .safetensors or .bin"):
        read_ip_adapter_file(tmp_path / "a.pth")
    with pytest.raises(ModelError, match="nowhere"):
        read_ip_adapter_file(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("whole", [False, True], ids=["a tower", "a CLIPModel"])
def test_a_tower_of_transformers_gives_the_same_features(whole, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(**shape, image_size=12, patch_size=4, hidden_act="gelu")
    torch.manual_seed(0)
    if whole:
        text = transformers.CLIPTextConfig(**shape, vocab_size=60)
        made = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision, projection_dim=10,
        ))  # fmt: skip
    else:
        config = transformers.CLIPVisionConfig(**vision, projection_dim=10)
        made = transformers.CLIPVisionModelWithProjection(config)
    made.eval().save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    given = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        want = (
            made.visual_projection(made.vision_model(given).pooler_output)
            if whole
            else made(given).image_embeds
        )
    encoder = read_image_encoder(tmp_path)
    assert encoder.config.projection_dim == 10 and encoder.preprocess.crop == (12, 12)
    assert not read_image_encoder(tmp_path, with_weights=False).params
    graph, _ = weights.abstract(CLIPVision, encoder.config)
    found = weights.merge(graph, encoder.params)(pixels)
    np.testing.assert_allclose(found, want.numpy(), atol=2e-5 * float(want.abs().max()))
    with torch.no_grad():
        vision = made.vision_model(given, output_hidden_states=True)
    want = vision.hidden_states[-2]
    found = weights.merge(graph, encoder.params).patches(pixels)
    np.testing.assert_allclose(found, want.numpy(), atol=2e-5 * float(want.abs().max()))


def test_folders_that_are_no_tower_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder; expected that of a CLIP image tower"):
        read_image_encoder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="config.json"):
        read_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ModelError, match="model_type is 'siglip'; expected 'clip_vision_model'"):
        read_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(ModelError, match="no weights"):
        read_image_encoder(tmp_path)
