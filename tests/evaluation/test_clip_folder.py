"""Folders of CLIP: configs and preprocessors of every age, weights, what is missing."""

import json

import numpy as np
import pytest

from sdjax.data.clip_pixels import CLIP_MEAN, CLIP_STD, ClipPreprocess
from sdjax.errors import UserError
from sdjax.evaluation.features import clip_tower
from sdjax.evaluation.towers import CLIP_EXAMPLE, download_clip, read_clip
from sdjax.models import weights
from sdjax.models.clip import CLIPText
from sdjax.models.clip_vision import CLIPVision, CLIPVisionConfig, read_clip_config
from sdjax.models.config import ConfigError
from sdjax.models.weights import WeightsError
from tests.evaluation.clip_folders import CASES, copy, make_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("clip"), **CASES["gelu"])[0]


@pytest.mark.parametrize(
    "data, expected",
    [
        # openai/clip-vit-large-patch14 on the hub
        (
            {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
             "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN),
             "image_std": list(CLIP_STD), "resample": 3, "size": 224},
            ClipPreprocess(),
        ),
        ({}, ClipPreprocess()),
        ({"size": {"height": 30, "width": 30}, "do_center_crop": False, "do_normalize": False},
         ClipPreprocess(size=(30, 30), crop=None, mean=(0.0,), std=(1.0,))),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
          "do_rescale": False, "resample": 2},
         ClipPreprocess(size=256, scale=1.0, resample=2)),
    ],
)  # fmt: skip
def test_preprocessor_configs_of_every_age(data, expected):
    assert ClipPreprocess.from_json(data, "x.json") == expected


@pytest.mark.parametrize(
    "data", [{"size": "large"}, {"size": {"longest_edge": 3}}, {"resample": 17}, {"image_mean": 1}]
)
def test_preprocessor_configs_that_are_none_are_refused(data):
    with pytest.raises(UserError, match="x.json: not a CLIPImageProcessor"):
        ClipPreprocess.from_json(data, "x.json")


def test_folders_that_are_not_whole_say_what_is_missing(folder, tmp_path):
    with pytest.raises(UserError) as caught:
        read_clip(tmp_path / "absent")
    for text in (str(tmp_path / "absent"), "--clip", "--download", CLIP_EXAMPLE):
        assert text in str(caught.value)
    with pytest.raises(UserError, match="config.json: cannot be read"):
        read_clip(copy(folder, tmp_path / "a", config__json=None))
    with pytest.raises(UserError, match="preprocessor_config.json is not there"):
        read_clip(copy(folder, tmp_path / "b", preprocessor_config__json=None))
    with pytest.raises(WeightsError, match="no weights; expected model.safetensors"):
        read_clip(copy(folder, tmp_path / "c", model__safetensors=None))
    with pytest.raises(UserError, match=r"size 24.*do not give the pictures of 32x32"):
        read_clip(copy(folder, tmp_path / "d", preprocessor_config__json={
            "size": 24, "crop_size": 32}))  # fmt: skip


def test_weights_in_a_torch_file_and_under_wrong_names(folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder)
    state = {f"{name}": tensor for name, tensor in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]  # as files once had
    other = copy(folder, tmp_path / "bin", model__safetensors=None)
    torch.save(state, other / "pytorch_model.bin")
    again, tower = clip_tower(other, batch_size=5), clip_tower(folder, batch_size=5)
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3)).astype(np.uint8)
    np.testing.assert_array_equal(again.images(images), tower.images(images))
    assert again.digest == tower.digest and again.images.digest == tower.images.digest
    assert tower.digest != tower.images.digest

    broken = dict(state)
    del broken["visual_projection.weight"]
    torch.save(broken, other / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"(?s)\(vision\).*missing: visual_projection.weight"):
        read_clip(other)
    torch.save(state | {"head.weight": torch.zeros(2)}, other / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="unused: head.weight"):
        read_clip(other)
    torch.save(state | {"logit_scale": torch.tensor(float("nan"))}, other / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin: logit_scale is NaN or Inf"):
        read_clip(other)
    nan = {"visual_projection.weight": state["visual_projection.weight"] * float("inf")}
    torch.save(state | nan, other / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"\(vision\): 1 of (?s:.)*visual_projection.weight: "):
        read_clip(other)
    del state["logit_scale"]
    torch.save(state, other / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="logit_scale, which is missing"):
        read_clip(other)


def test_weights_in_several_files(folder, tmp_path):
    other = copy(folder, tmp_path / "shards", model__safetensors=None)
    transformers.CLIPModel.from_pretrained(folder).save_pretrained(other, max_shard_size="30KB")
    assert (other / "model.safetensors.index.json").is_file()
    assert clip_tower(other).digest == clip_tower(folder).digest


def test_another_preprocessing_has_another_digest(folder, tmp_path):
    other = copy(folder, tmp_path / "other", preprocessor_config__json={
        "size": 40, "crop_size": 32})  # fmt: skip
    assert clip_tower(other).images.digest != clip_tower(folder).images.digest


# In the manner of config.json of openai/clip-vit-large-patch14 on the hub: transformers 4.21 wrote
# all the fields of every config, those of generation too, and some twice.
PUBLISHED = {
    "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
    "model_type": "clip", "projection_dim": 768,
    "text_config": {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None,
        "attention_dropout": 0.0, "bad_words_ids": None, "bos_token_id": 0,
        "chunk_size_feed_forward": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
        "hidden_size": 768, "id2label": {"0": "LABEL_0"}, "intermediate_size": 3072,
        "is_decoder": False, "layer_norm_eps": 1e-05, "length_penalty": 1.0,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_beams": 1, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
        "pruned_heads": {}, "torch_dtype": None, "vocab_size": 49408,
    },
    "text_config_dict": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "projection_dim": 768,
    },
    "vision_config": {
        "_name_or_path": "", "architectures": None, "bos_token_id": None, "dropout": 0.0,
        "hidden_act": "quick_gelu", "hidden_size": 512, "image_size": 224,
        "intermediate_size": 4096, "layer_norm_eps": 1e-05, "max_length": 20,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "tie_word_embeddings": True, "top_k": 50,
    },
    "vision_config_dict": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip


@pytest.mark.parametrize("left_out", ["none", "_dict", "all but _dict"])
def test_published_config_is_read_as_transformers_reads_it(left_out):
    data = json.loads(json.dumps(PUBLISHED))
    if left_out == "_dict":
        del data["text_config_dict"], data["vision_config_dict"]
        data["vision_config"]["hidden_size"] = 1024
    elif left_out == "all but _dict":
        del data["text_config"], data["vision_config"]
    text, vision = read_clip_config(json.loads(json.dumps(data)))
    reference = transformers.CLIPConfig.from_dict(data)
    for name, value in vars(vision).items():
        assert value == getattr(reference.vision_config, name), name
    for name, value in vars(text).items():
        assert value == getattr(reference.text_config, name), name
    assert vision.hidden_size == 1024 and vision.projection_dim == text.projection_dim == 768


def test_defaults_are_transformers():
    reference = transformers.CLIPVisionConfig()
    for name, value in vars(CLIPVisionConfig()).items():
        assert value == getattr(reference, name), name


def test_full_size_has_the_weights_of_transformers():
    """Every name and shape of OpenAI's ViT-L/14, without memory for them."""
    text, vision = read_clip_config(PUBLISHED)
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(dict(PUBLISHED)))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    del theirs["logit_scale"]
    ours = {}
    for prefix, (cls, config) in {"text": (CLIPText, text), "vision": (CLIPVision, vision)}.items():
        _, shapes = weights.abstract(cls, config)
        for path, value in shapes.items():
            head = path.startswith(("text_projection", "visual_projection"))
            order = {2: (1, 0), 4: (3, 2, 0, 1)} if path.endswith(".kernel") else {}
            axes = order.get(len(value.shape), range(len(value.shape)))
            name = ("" if head else f"{prefix}_model.") + weights.weight_name(path)
            ours[name] = tuple(value.shape[i] for i in axes)
    assert ours == theirs
    assert sum(np.prod(shape) for shape in ours.values()) == 427_616_512


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "siglip"}, "model_type is 'siglip'.*a CLIPModel"),
        ({"vision_config": {"frobnicate": 3}}, "vision_config.*frobnicate = 3"),
        ({"vision_config": {"hidden_act": "relu"}}, "relu.*quick_gelu or gelu"),
        ({"vision_config": {"patch_size": 300}}, "patch_size = 300"),
        ({"vision_config": {"num_attention_heads": 7}}, "a divisor"),
        ({"text_config": {"frobnicate": 3}}, "text_config.*frobnicate = 3"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    alone = {k: v for k, v in PUBLISHED.items() if not k.endswith("_dict")}
    with pytest.raises(ConfigError, match=f"(?s)config.json.*{message}"):
        read_clip_config(alone | change)


def test_download_fetches_one_set_of_weights_and_only_once(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    monkeypatch.setattr(hub, "list_repo_files", lambda name: files)
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **kw: calls.append((name, kw["allow_patterns"]))
    )
    target = download_clip("a/b", tmp_path / "clip")
    assert calls == [("a/b", ["*.json", "merges.txt", "vocab.json", "model.safetensors"])]
    target.mkdir()
    (target / "config.json").write_text("{}")
    download_clip("a/b", target)
    assert len(calls) == 2, "the weights are not there yet: it broke off"
    (target / "model.safetensors").write_bytes(b"")
    download_clip("a/b", target)
    assert len(calls) == 2

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(hub, "list_repo_files", fail)
    with pytest.raises(UserError, match="a/b cannot be fetched from huggingface.co.*no network"):
        download_clip("a/b", tmp_path / "new")
