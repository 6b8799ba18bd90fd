"""CLIP's two towers and their preprocessing against transformers, with random weights."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sdjax.data.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.eval.features import clip_tower, text_image_scores
from sdjax.eval.preprocess import CLIP_MEAN, CLIP_STD, ClipPreprocess
from sdjax.eval.towers import CLIP_EXAMPLE, download_clip, read_clip
from sdjax.models import weights
from sdjax.models.clip import CLIPText
from sdjax.models.clip_vision import CLIPVision, CLIPVisionConfig, read_clip_config
from sdjax.models.config import ConfigError
from sdjax.models.weights import WeightsError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["a red circle", "a photo of a cat", "two blue squares and a green star"]
TEXTS = ["a red circle", "a cat", "", "two blue squares and a green star " * 4]
CASES = {
    "quick_gelu": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-4},
}


def make_folder(folder, hidden_act, layer_norm_eps):
    """A small CLIPModel as the hub has it, every parameter random; (folder, model)."""
    tokenizer = Tokenizer.train(WORDS * 4, 560, context_length=12)
    tokenizer.save(folder)
    same = {
        "hidden_act": hidden_act,
        "layer_norm_eps": layer_norm_eps,
        "num_attention_heads": 3,
        "projection_dim": 7,  # of no use: the one of the whole model counts
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **same,
                "vocab_size": tokenizer.vocab_size,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "max_position_embeddings": 12,
                "eos_token_id": tokenizer.eos_id,
                "bos_token_id": tokenizer.bos_id,
                "pad_token_id": tokenizer.pad_id,
            },
            vision_config={
                **same,
                "hidden_size": 30,
                "intermediate_size": 44,
                "num_hidden_layers": 3,
                "image_size": 32,
                "patch_size": 9,  # 3 x 3 patches, and a rest that nobody looks at
            },
            projection_dim=20,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                parameter.fill_(3.3)
            elif "norm" in name or "layrnorm" in name or name.endswith("bias"):
                parameter.copy_(0.3 * noise + float(name.endswith("weight")))
            elif parameter.ndim > 1 and "embedding.weight" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise)
    model.save_pretrained(folder)
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**processor).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module", params=CASES)
def folder_and_model(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp(request.param), **CASES[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("clip"), **CASES["gelu"])[0]


@pytest.fixture(scope="module")
def images():
    """Random pictures with detail at every scale; not square."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 9, 12, 3)).astype(np.uint8)
    fine = coarse.repeat(6, 1).repeat(6, 2)  # [5, 54, 72, 3]
    return np.clip(fine + rng.integers(-20, 20, fine.shape), 0, 255).astype(np.uint8)


def pillow_pixels(folder, images):
    """[B, 3, H, W] of transformers' CLIPImageProcessor on Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    return processor([*images], return_tensors="pt").pixel_values


def test_features_logits_and_scores_match_transformers(folder_and_model, images):
    folder, model = folder_and_model
    tower = clip_tower(folder, batch_size=3)
    ours_images, ours_texts = tower.images(images), tower.texts(TEXTS)
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(
            input_ids=tokens.input_ids,  # padding is not masked: CLIP was trained so
            pixel_values=pillow_pixels(folder, images),
        )
    assert ours_images.shape == (5, 20) and ours_texts.shape == (4, 20) and tower.dims == 20
    # float32 rounding of features of length 1
    np.testing.assert_allclose(ours_images, out.image_embeds.numpy(), rtol=0, atol=3e-6)
    np.testing.assert_allclose(ours_texts, out.text_embeds.numpy(), rtol=0, atol=3e-6)
    assert np.abs(ours_images - ours_images[0]).max() > 0.05, "the pictures must differ"
    assert tower.logit_scale == pytest.approx(float(np.exp(np.float32(3.3))), rel=1e-6)
    logits = tower.logit_scale * ours_images @ ours_texts.T
    np.testing.assert_allclose(logits, out.logits_per_image.numpy(), rtol=0, atol=3e-4)

    scores = text_image_scores(ours_images[:4], ours_texts)
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds[:4], out.text_embeds)
    np.testing.assert_allclose(scores, 100 * cosines.numpy(), rtol=0, atol=5e-4)
    with pytest.raises(ValueError, match="expected one text each"):
        text_image_scores(ours_images, ours_texts)


class OlderModel(transformers.CLIPModel):
    """Its features are tensors, as in transformers 4, which torchmetrics wants."""

    def get_image_features(self, *args, **kw):
        return super().get_image_features(*args, **kw).pooler_output

    def get_text_features(self, *args, **kw):
        return super().get_text_features(*args, **kw).pooler_output


def test_clip_scores_are_torchmetrics(folder_and_model, images):
    """Picture by picture, before the mean: of random weights that is often cut off at 0."""
    module = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, _ = folder_and_model
    tower = clip_tower(folder, batch_size=4)
    texts = ["a red circle", "a cat", "a photo", "two squares", "a star"]
    processor = transformers.CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        theirs, _ = module._clip_score_update(
            [torch.from_numpy(image).permute(2, 0, 1) for image in images],
            texts,
            OlderModel.from_pretrained(folder),
            processor,
        )
    ours = text_image_scores(tower.images(images), tower.texts(texts))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=5e-4)


@pytest.mark.parametrize("shape", [(54, 72), (72, 50), (32, 32), (20, 31), (33, 150)])
def test_preprocessing_is_transformers(folder, shape):
    images = np.random.default_rng(1).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    theirs = pillow_pixels(folder, images).permute(0, 2, 3, 1).numpy()
    ours = read_clip(folder).preprocess.pixels(images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


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


def copy(folder, target, **changes):
    """The folder again, with other content for some of its files; None leaves a file out."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, content in changes.items():
        file = target / name.replace("__", ".")
        file.unlink() if content is None else file.write_text(json.dumps(content))
    return target


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


def test_weights_in_a_torch_file_and_under_wrong_names(folder, images, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder)
    state = {f"{name}": tensor for name, tensor in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]  # as files once had
    other = copy(folder, tmp_path / "bin", model__safetensors=None)
    torch.save(state, other / "pytorch_model.bin")
    again, tower = clip_tower(other, batch_size=5), clip_tower(folder, batch_size=5)
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


def test_features_that_are_not_finite_are_an_error(folder, images, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("nan")
    other = copy(folder, tmp_path / "nan")
    model.save_pretrained(other)
    with pytest.raises(UserError, match="features of 5 of 5 are not finite"):
        clip_tower(other, batch_size=8).images(images)


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


# Run with 8 virtual devices: features over them all, and of one device of them.
DEVICES = """
import sys
import jax, numpy as np
from sdjax.eval.features import clip_tower
from sdjax.parallel.mesh import MeshConfig, make_mesh
folder, out = sys.argv[1:]
images = np.random.default_rng(0).integers(0, 256, (21, 40, 44, 3)).astype(np.uint8)
texts = [f"a cat {i}" for i in range(3)]
found = {}
for name, mesh in {
    "all": None,
    "fsdp": make_mesh(MeshConfig(data=2, fsdp=4)),
    "one": make_mesh(MeshConfig(), jax.devices()[:1]),
}.items():
    tower = clip_tower(folder, batch_size=9, mesh=mesh)
    found[f"{name}_batch"] = tower.batch_size
    found[f"{name}_images"], found[f"{name}_texts"] = tower.images(images), tower.texts(texts)
np.savez(out, devices=len(jax.devices()), **found)
"""


def test_features_are_the_same_on_eight_devices(folder, tmp_path):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DEVICES, str(folder), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, env=environment)
    found = np.load(tmp_path / "out.npz")
    assert found["devices"] == 8
    assert [found[f"{name}_batch"] for name in ("all", "fsdp", "one")] == [16, 16, 9]
    for name in ("all", "fsdp"):
        for half in ("images", "texts"):
            # one device sums 9 rows at once and eight 2 each, in another order
            expected = found[f"one_{half}"]
            np.testing.assert_allclose(found[f"{name}_{half}"], expected, rtol=0, atol=1e-6)
    assert found["one_images"].shape == (21, 20) and found["one_texts"].shape == (3, 20)
