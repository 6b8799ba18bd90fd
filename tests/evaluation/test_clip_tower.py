"""CLIP's two towers and their preprocessing against transformers, with random weights."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.evaluation.features import clip_tower, text_image_scores
from sdjax.evaluation.towers import read_clip
from tests.conftest import XLA_FLAGS
from tests.evaluation.clip_folders import CASES, copy, make_folder, pillow_pixels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["a red circle", "a cat", "", "two blue squares and a green star " * 4]


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


def test_features_that_are_not_finite_are_an_error(folder, images, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.visual_projection.weight.fill_(3e38)  # finite, but not what comes out
    other = copy(folder, tmp_path / "large")
    model.save_pretrained(other)
    with pytest.raises(UserError, match="features of 5 of 5 are not finite"):
        clip_tower(other, batch_size=8).images(images)


# Run with 8 virtual devices: features over them all, and of one device of them.
DEVICES = """
import sys
import jax, numpy as np
from sdjax.evaluation.features import clip_tower
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
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
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
