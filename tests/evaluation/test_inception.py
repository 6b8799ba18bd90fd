"""InceptionV3 and its preprocessing against pytorch-fid, with random weights."""

import hashlib

import jax
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.evaluation import preprocess
from sdjax.evaluation.features import inception_tower
from sdjax.evaluation.inception import InceptionConfig, InceptionV3
from sdjax.evaluation.towers import (
    INCEPTION_FILE,
    INCEPTION_URL,
    download_inception,
    read_inception,
)
from sdjax.models import weights
from sdjax.models.weights import WeightsError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def state_dict():
    """Random weights for every tensor of pytorch-fid's network, fit for ReLUs."""
    generator = torch.Generator().manual_seed(0)

    def draw(name, shape):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("conv.weight"):
            return noise * (2 / noise[0].numel()) ** 0.5
        if name.endswith("running_var"):
            return 0.5 + noise.abs()
        return 0.2 * noise + float(name.endswith("bn.weight"))

    _, shapes = weights.abstract(InceptionV3, InceptionConfig())
    found = {}
    for path, shape in shapes.items():
        name, size = weights.weight_name(path), shape.shape
        if len(size) == 4:
            size = (size[3], size[2], size[0], size[1])
        found[name] = draw(name, size)
        if name.endswith("running_var"):
            found[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return found | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def reference(state_dict):
    """pytorch-fid's network with all four outputs; it loads the weights above, strictly."""
    inception = pytest.importorskip("pytorch_fid.inception")
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **kw: state_dict)
        return inception.InceptionV3(output_blocks=(0, 1, 2, 3)).eval()


@pytest.fixture(scope="module")
def file(state_dict, tmp_path_factory):
    """The weights in the old format of torch.save, which the published file has."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def tower(file):
    return inception_tower(file, batch_size=2)


def pictures(count, height=40, width=56, seed=0):
    """Smooth random pictures, so that the resize matters and does not alias."""
    coarse = np.random.default_rng(seed).random((count, 5, 7, 3)).astype(np.float32)
    fine = jax.image.resize(coarse, (count, height, width, 3), "cubic")
    return (np.clip(fine, 0, 1) * 255).round().astype(np.uint8)


def outputs(reference, images):
    """Features of each block, averaged over positions as fid_score.py does."""
    with torch.no_grad():
        blocks = reference(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    return [block.mean((2, 3)).numpy() for block in blocks]


def test_features_match_pytorch_fid_at_every_width(tower, reference):
    """Picture to feature, resize included, in batches of 2 and one that is filled up."""
    images = pictures(3)
    *early, pool3 = outputs(reference, images)
    ours = tower(images)
    assert ours.dtype == np.float32 and ours.shape == (3, 2048)
    # float32 sums in another order, through 48 layers
    np.testing.assert_allclose(ours, pool3, rtol=0, atol=2e-5 * np.abs(pool3).max())
    assert np.abs(pool3 - pool3[0]).max() > 1e-2 * pool3.max(), "the pictures must differ"

    pixels = preprocess.inception_pixels(images)
    for dims, theirs in zip((64, 192), early[:2], strict=True):
        graph, _ = weights.abstract(InceptionV3, InceptionConfig(dims))
        found = jax.jit(lambda p, x, g=graph: weights.merge(g, p)(x))(tower.params, pixels)
        assert found.shape == (3, dims)
        np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_features_before_the_auxiliary_head_match_pytorch_fid(file, reference):
    images = pictures(3, seed=1)
    theirs = outputs(reference, images)[2]
    ours = inception_tower(file, dims=768, batch_size=3)(images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_features_do_not_depend_on_the_company(tower):
    images = pictures(3)
    np.testing.assert_array_equal(tower(images)[2:], tower(images[2:]))
    assert tower(images[:0]).shape == (0, 2048)


@pytest.mark.parametrize("size", [(299, 299), (64, 48), (17, 500), (1, 1)])
def test_resize_is_torchs_bilinear_without_antialias(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    )
    theirs = 2 * theirs.permute(0, 2, 3, 1).numpy() - 1
    # Positions are float32 numbers of up to 500, whose last bit is 3e-5 of the way to a neighbour.
    np.testing.assert_allclose(preprocess.inception_pixels(images), theirs, rtol=0, atol=1e-5)


def test_digest_is_of_the_weights_and_not_of_the_file(tower, file, state_dict, tmp_path):
    kept = {n: v for n, v in state_dict.items() if "fc." not in n and "num_b" not in n}
    weights.save_file({n: v.numpy() for n, v in kept.items()}, tmp_path / "same.safetensors")
    assert inception_tower(tmp_path / "same.safetensors").digest == tower.digest
    assert inception_tower(file, dims=64).digest != tower.digest
    kept["Mixed_7c.branch_pool.bn.bias"] = kept["Mixed_7c.branch_pool.bn.bias"] + 1
    torch.save(kept, tmp_path / "other.pth")
    assert inception_tower(tmp_path / "other.pth").digest != tower.digest


def test_weights_that_do_not_fit_are_named(state_dict, tmp_path):
    wrong = dict(state_dict)
    del wrong["Mixed_5b.branch1x1.conv.weight"]
    wrong["Mixed_5b.branch1x1.bn.bias"] = torch.zeros(3)
    wrong["AuxLogits.fc.weight"] = torch.zeros(2, 2)
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError) as caught:
        read_inception(tmp_path / "wrong.pth")
    for text in ("wrong.pth", "missing: Mixed_5b.branch1x1.conv.weight", "unused: AuxLogits.fc",
                 "mis-shaped: Mixed_5b.branch1x1.bn.bias is (3,)"):  # fmt: skip
        assert text in str(caught.value)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="and 371 more$"):
        read_inception(tmp_path / "other.pth")


def test_statistics_that_are_not_finite_are_named(state_dict, monkeypatch):
    arrays = {name: np.array(value) for name, value in state_dict.items()}
    name = "Mixed_7c.branch_pool.bn.running_var"
    arrays[name][3], arrays["fc.bias"][0] = np.nan, np.nan
    monkeypatch.setattr("sdjax.evaluation.towers.read_tensors", lambda path: arrays)
    with pytest.raises(WeightsError) as caught:
        read_inception(__file__)
    assert str(caught.value).splitlines()[1:] == [f"  {name}: 1 NaN among 192 values"]


def test_weights_that_are_not_there_are_named_with_their_source(tmp_path):
    with pytest.raises(WeightsError) as caught:
        inception_tower(tmp_path / INCEPTION_FILE)
    for text in (str(tmp_path / INCEPTION_FILE), INCEPTION_URL, "--inception", "--download"):
        assert text in str(caught.value)


def test_other_widths_and_pictures_are_refused(tower, file):
    with pytest.raises(UserError, match="dims = 100: expected 64, 192, 768, 2048"):
        inception_tower(file, dims=100)
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\], got float32"):
        tower(np.zeros((2, 8, 8, 3), np.float32))


def test_download_checks_the_digest_in_the_name(tmp_path):
    content = b"weights"
    good = tmp_path / "x-9a3dd9bd.pth"  # not the digest of the content
    good.write_bytes(content)
    with pytest.raises(UserError, match="digest of what came is .* not 9a3dd9bd"):
        download_inception(tmp_path / "a" / "w.pth", url=good.as_uri())
    right = tmp_path / f"x-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    right.write_bytes(content)
    target = download_inception(tmp_path / "a" / "w.pth", url=right.as_uri())
    assert target.read_bytes() == content
    right.unlink()
    assert download_inception(target, url=right.as_uri()) == target  # it is there: nothing fetched
    with pytest.raises(UserError, match="cannot be fetched.*by hand"):
        download_inception(tmp_path / "b.pth", url=right.as_uri())
