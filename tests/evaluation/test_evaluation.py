"""Reference statistics, sets of pictures, and metrics from pictures, with a network of one line."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from sdjax.data.config import DataConfig
from sdjax.data.pictures import open_folder, open_split
from sdjax.errors import UserError
from sdjax.evaluation import choice, reference
from sdjax.evaluation.choice import choose
from sdjax.evaluation.evaluation import Inputs, judge
from sdjax.evaluation.losses import validation
from sdjax.evaluation.metrics import mmd, neighbours
from sdjax.evaluation.metrics.fidelity import fidelity, verdicts
from sdjax.evaluation.reference import PixelTower
from tests.evaluation.pytorch_fid_distance import calculate_frechet_distance


@dataclasses.dataclass
class LineTower:
    """Random directions in the space of pixels."""

    name: str = "inception-v3-2048"
    digest: str = "0123456789abcdef"
    dims: int = 6
    calls: int = 0

    def __call__(self, images):
        self.calls += 1
        pixels = PixelTower(4)(images)
        return np.tanh(pixels @ np.random.default_rng(0).standard_normal((48, self.dims))).astype(
            np.float32
        )


@pytest.fixture(scope="module")
def shapes(shapes_dir):
    return DataConfig(data_dir=str(shapes_dir), resolution=16, shapes_train=40, shapes_test=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures with captions, two of each."""
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    rows = []
    for i in range(20):
        image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(image).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"prompt {i // 2}"})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_in_the_order_of_its_metadata(folder, tmp_path):
    found = open_folder(folder)
    assert found.captions[2:4] == ("prompt 1", "prompt 1") and len(found) == 20
    np.testing.assert_array_equal(found.read(10, 11)[0], Image.open(folder / "10.png"))
    assert open_folder(folder, count=3).captions == found.captions[:3]
    assert open_folder(folder, size=(8, 12)).read(0, 2).shape == (2, 8, 12, 3)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "b.png")
    Image.new("RGB", (40, 10), "blue").save(tmp_path / "c.jpg")
    bare = open_folder(tmp_path)  # no captions, and all of the size of the first
    assert bare.captions == () and bare.read(0, 2).shape == (2, 10, 20, 3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("", b"", ["has no pictures"]),
        ("a.png", b"no picture", ["a.png"]),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n', ["metadata.jsonl", "text"]),
    ],
)
def test_folders_that_are_not_pictures(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert all(word in str(error.value) for word in words)


def test_a_split_is_what_training_sees(shapes):
    split = open_split(shapes, "test", size=(16, 16))
    assert len(split) == 8 and len(split.captions) == 8
    source = split.sources[0]
    want = Image.fromarray(source[3]["image"]).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(split.read(3, 4)[0], want)
    fewer = open_split(shapes, "test", size=(16, 16), count=5)
    assert len(fewer) == 5 and fewer.identity() != split.identity()


def test_pytorch_fid_reads_our_statistics_and_we_read_its(tmp_path):
    torch = pytest.importorskip("torch")
    from pytorch_fid.fid_score import compute_statistics_of_path

    features = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    ours = reference.write(tmp_path / "ours.npz", features, {"tower": "a", "digest": "b"})
    mu, sigma = compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 6, torch)
    np.testing.assert_array_equal(mu, ours.moments.mu)
    np.testing.assert_array_equal(sigma, np.cov(features.astype(np.float64), rowvar=False))

    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)  # as its save_fid_stats
    theirs = reference.read(tmp_path / "theirs.npz", LineTower())
    np.testing.assert_array_equal(theirs.moments.sigma, sigma)
    assert theirs.features is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "inception-v3-64"}, ["tower: 'inception-v3-2048' there, 'inception-v3-64' here"]),
        ({"digest": "f" * 16}, ["digest", "preprocessing"]),
        ({}, ["size: [16, 16] there, [32, 32] here"]),
    ],
)
def test_statistics_of_another_network_or_size_are_refused(tmp_path, changes, words):
    tower = LineTower()
    meta = {"tower": tower.name, "digest": tower.digest, "size": [16, 16]}
    reference.write(tmp_path / "a.npz", np.random.default_rng(0).random((9, 6)), meta)
    reference.read(tmp_path / "a.npz", tower, size=(16, 16))
    size = (16, 16) if changes else (32, 32)
    with pytest.raises(UserError) as error:
        reference.read(tmp_path / "a.npz", dataclasses.replace(tower, **changes), size=size)
    assert all(word in str(error.value) for word in [*words, "a.npz"])


def test_files_that_are_no_statistics(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 broken")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "d.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    for name, word in (("a", "cannot be read"), ("b", "sigma"), ("c", "[2, 2]"), ("d", "makes 6")):
        with pytest.raises(UserError, match=f"{name}.npz") as error:
            reference.read(tmp_path / f"{name}.npz", LineTower())
        assert word in str(error.value)


def test_statistics_are_made_once(shapes, tmp_path):
    split, tower = open_split(shapes, "test", size=(16, 16)), LineTower()
    first = reference.cached(tmp_path, tower, split, split.identity())
    assert tower.calls == 1 and len(list(tmp_path.glob("*.npz"))) == 1
    again = reference.cached(tmp_path, tower, split, split.identity())
    assert tower.calls == 1
    np.testing.assert_array_equal(first.features, again.features)
    other = dataclasses.replace(tower, digest="e" * 16)
    reference.cached(tmp_path, other, split, split.identity())
    fewer = open_split(shapes, "test", size=(16, 16), count=5)
    reference.cached(tmp_path, tower, fewer, fewer.identity())
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_pixel_features_are_means_of_squares():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    want = images.reshape(3, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(PixelTower()(images), want.reshape(3, -1), rtol=1e-6)
    assert PixelTower()(images[:, :20, :9]).shape == (3, PixelTower().dims)  # any size


def everything(folder, shapes, cache, **changes):
    pictures = open_folder(folder)
    given = {
        "captions": pictures.captions,
        "pictures": pictures,
        "inception": LineTower(),
        "reference": open_split(shapes, "test", size=(16, 16)),
        "train": open_split(shapes, "train", size=(16, 16)),
        "cache": cache,
    }
    return Inputs(**(given | changes))


def test_metrics_of_pictures_are_those_of_their_features(folder, shapes, tmp_path):
    inputs = everything(folder, shapes, tmp_path)
    names, left_out = choose(None, inputs)
    assert names == ["fid", "kid", "precision", "recall", "density", "coverage", "diversity",
                     "memorised"]  # fmt: skip
    assert [line.split(":")[0] for line in left_out] == [
        "left out, cmmd, clip_score",
        "left out, fidelity",
        "left out, inside_error, outside_error",
        "left out, validation_loss",
    ]
    found = judge(inputs, names, resamples=20)
    tower = LineTower()
    x = tower(inputs.pictures.read(0, 20))
    y, train = tower(inputs.reference.read(0, 8)), tower(inputs.train.read(0, 40))
    values = {name: one.value for name, one in found.metrics.items()}
    torch = pytest.importorskip("torch")
    from torchmetrics.image.kid import poly_mmd

    moments = [f(np.float64(z)) for z in (x, y) for f in (lambda z: z.mean(0), covariance)]
    assert values["fid"] == pytest.approx(calculate_frechet_distance(*moments), rel=1e-5)
    assert values["kid"] == mmd.kid(x, y, resamples=0).value
    half = torch.from_numpy(np.float64(x[:8])), torch.from_numpy(np.float64(y))
    fewer = dataclasses.replace(inputs, pictures=open_folder(folder, count=8))
    kid = judge(fewer, ["kid"], resamples=0).metrics["kid"].value
    assert kid == pytest.approx(float(poly_mmd(half[1], half[0])), rel=1e-6)
    assert found.nearest.pairs == neighbours.memorisation(x, train, y, resamples=0).pairs
    for one in found.metrics.values():
        assert one.low <= one.high
    assert any("FID of 20 pictures" in warning for warning in found.warnings)


def covariance(z):
    return np.cov(z, rowvar=False)


def test_statistics_from_a_file_take_the_place_of_pictures(folder, shapes, tmp_path):
    inputs = everything(folder, shapes, tmp_path)
    want = judge(inputs, ["fid", "precision"], resamples=0).metrics
    (file,) = tmp_path.glob("*.npz")
    given = dataclasses.replace(
        inputs, reference=None, train=None, statistics=reference.read(file, LineTower())
    )
    found = judge(given, ["fid", "precision"], resamples=0).metrics
    assert found == want
    bare = dataclasses.replace(given.statistics, features=None)
    names, _ = choose(None, dataclasses.replace(given, statistics=bare))
    assert "fid" in names and not {"kid", "precision", "memorised"} & set(names)
    with pytest.raises(UserError, match="pytorch-fid's has no features"):
        choose(["kid"], dataclasses.replace(given, statistics=bare))


def test_without_networks_only_copies_are_looked_for(folder, shapes, tmp_path):
    names, _ = choose(None, everything(folder, shapes, tmp_path, inception=None))
    assert names == ["memorised"]
    names, _ = choose(None, everything(folder, shapes, tmp_path, inception=None, features="pixels"))
    assert names == ["precision", "recall", "density", "coverage", "diversity", "memorised"]


def test_every_need_of_a_metric_has_words():
    assert {need for needs in choice.METRICS.values() for need in needs} == set(choice.NEEDS)


def test_real_pictures_of_shapes_are_right(shapes):
    """The pictures of the dataset show what their captions say; of other captions they do not."""
    large = dataclasses.replace(shapes, resolution=64)
    split = open_split(large, "test", size=(64, 64))
    found = fidelity(split, resamples=50)
    for name in ("colour", "shape", "number", "exact"):
        assert found[f"fidelity_{name}"].value == 1 and found[f"fidelity_{name}"].count == 8
    counted = found["fidelity_position"].count + found["fidelity_relation"].count
    assert 0 < counted <= 8
    image = split.read(0, 1)[0]
    wrong = verdicts("a large black cross above a small cyan circle", image)
    assert not wrong["exact"] and wrong.keys() >= {"relation", "size"}
    alone = verdicts("a black cross", image)
    assert set(alone) == {"colour", "shape", "number", "exact"}


def test_the_curve_of_the_loss_is_its_means():
    losses = np.random.default_rng(0).random((30, 4)).astype(np.float32)
    whole, curve = validation(losses, np.array([62.0, 187.0, 312.0, 437.0]))
    assert whole.value == pytest.approx(losses.mean(), rel=1e-6)
    np.testing.assert_allclose(curve["y"], losses.mean(0), rtol=1e-6)
    assert all(a < b < c for a, b, c in zip(curve["low"], curve["y"], curve["high"], strict=True))
    assert curve["x"] == [62, 187, 312, 437] and not whole.higher_is_better
