"""Metrics of features against the public implementations, on the same features."""

import importlib
import warnings

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from sdjax.evaluation.metrics import bootstrap, frechet, mmd, neighbours, similarity
from tests.evaluation.pytorch_fid_distance import calculate_frechet_distance

torch = pytest.importorskip("torch")


def features(seed, count, width=24, shift=0.0, scale=1.0):
    """Correlated features with a long tail, as those of networks are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((width, width)) / width**0.5
    return (np.maximum(rng.standard_normal((count, width)) @ mix, 0) * scale + shift).astype(
        np.float32
    )


X, Y = features(0, 120, shift=0.05, scale=1.1), features(1, 150)


def pytorch_fid(x, y):
    arguments = [f(np.float64(z)) for z in (x, y) for f in (lambda z: z.mean(0), covariance)]
    return calculate_frechet_distance(*arguments)


def covariance(z):
    return np.cov(z, rowvar=False)


@pytest.mark.parametrize("count", [120, 20, 5])  # fewer than 24: a singular covariance
def test_frechet_is_pytorch_fids(count):
    x, y = X[:count], Y[:count]
    ours = frechet.distance(frechet.moments(x), frechet.moments(y))
    # pytorch-fid's root of a singular product has an error of the root of the rounding.
    assert ours == pytest.approx(pytorch_fid(x, y), rel=1e-5)


def test_frechet_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 24

        def forward(self, images):
            return images.reshape(len(images), -1)[:, :24].double()

    def images(z):
        return torch.from_numpy(z.reshape(-1, 3, 2, 4))

    theirs = FrechetInceptionDistance(
        feature=Flat(), normalize=True, input_img_size=(3, 2, 4)
    ).set_dtype(torch.float64)
    theirs.update(images(np.float64(Y)), real=True)
    theirs.update(images(np.float64(X)), real=False)
    ours = frechet.distance(frechet.moments(X), frechet.moments(Y))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("count", [120, 40])
def test_influence_is_the_derivative_of_pytorch_fids_distance(count):
    """By weights: a little more of one picture, and less of all."""
    x, y = np.float64(X[:count]), np.float64(Y)
    theirs = y.mean(0), covariance(y)

    def weighted(i, h):
        weights = np.full(count, (1 - h) / count)
        weights[i] += h
        mu = weights @ x
        sigma = (weights[:, None] * (x - mu)).T @ (x - mu) * count / (count - 1)
        return calculate_frechet_distance(mu, sigma, *theirs)

    found = frechet.influence(X[:count], frechet.moments(Y))
    h = 1e-5
    want = [(weighted(i, h) - weighted(i, -h)) / (2 * h) for i in range(5)]
    np.testing.assert_allclose(found[:5], want, rtol=1e-4, atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize("count", [600, 30])
def test_the_interval_of_frechet_is_as_wide_as_other_pictures_say(count):
    """Many more pictures than features, and hardly more. It errs to the safe side."""
    reference = frechet.moments(features(1, 2000))
    others = [frechet.distance(frechet.moments(features(10 + i, count, shift=0.05)), reference)
              for i in range(100)]  # fmt: skip
    true = np.percentile(others, 97.5) - np.percentile(others, 2.5)
    mine = [frechet.frechet(features(500 + i, count, shift=0.05), reference, resamples=300)
            for i in range(10)]  # fmt: skip
    width = np.mean([one.high - one.low for one in mine])
    assert 0.75 * true < width < 1.7 * true
    assert all(one.low < one.value < one.high for one in mine)


def test_kid_is_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    x, y = X[:100].astype(np.float64), Y[:100].astype(np.float64)
    want = float(poly_mmd(torch.from_numpy(y), torch.from_numpy(x)))
    assert mmd.polynomial_mmd(x, y) == pytest.approx(want, rel=1e-9)
    found = mmd.kid(X[:100], Y[:100], resamples=0)
    assert found.value == pytest.approx(want, rel=1e-9) and found.details["subsets"] == 1


def test_kid_over_subsets_is_torchmetrics_on_those_subsets():
    from torchmetrics.image.kid import poly_mmd

    found = mmd.kid(X, Y, subsets=6, subset_size=50, resamples=0, seed=4)
    rng = np.random.default_rng(4)
    values = []
    for _ in range(6):
        pair = [torch.from_numpy(np.float64(z[rng.permutation(len(z))[:50]])) for z in (X, Y)]
        values.append(float(poly_mmd(pair[1], pair[0])))
    assert found.value == pytest.approx(np.mean(values), rel=1e-9)
    assert found.details["std"] == pytest.approx(np.std(values), rel=1e-9)


def published_cmmd(x, y):
    """The formula of google-research/cmmd/distance.py, in torch's float64."""
    x, y = (torch.nn.functional.normalize(torch.from_numpy(np.float64(z))) for z in (x, y))

    def k(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * 10**2)).mean()

    return float(1000 * (k(x, x) + k(y, y) - 2 * k(x, y)))


def test_cmmd_is_the_published_formula(monkeypatch):
    want = published_cmmd(X, Y)
    assert mmd.cmmd(X, Y, resamples=0).value == pytest.approx(want, rel=1e-6)
    monkeypatch.setattr(mmd, "BLOCK", 32)  # blocks and their rest give the same
    assert mmd.cmmd(X, Y, resamples=0).value == pytest.approx(want, rel=1e-6)


def test_replicates_of_the_discrepancies_are_those_of_resampled_features(monkeypatch):
    monkeypatch.setattr(mmd, "BLOCK", 32)
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, len(X), len(X)) for _ in range(6)]
    want = np.array([published_cmmd(X[rows], Y) for rows in drawn])
    found = mmd.cmmd(X, Y, resamples=6, seed=5)
    low, high = np.percentile(want - want.mean(), [2.5, 97.5]) + published_cmmd(X, Y)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-5)

    x, y = np.float64(X), np.float64(Y)
    want = []
    for rows in drawn:  # all pairs of different pictures, and of these alone
        different = rows[:, None] != rows
        off = ~np.eye(len(y), dtype=bool)
        want.append(
            mmd.cubic(x[rows], x[rows])[different].mean()
            + mmd.cubic(y, y)[off].mean()
            - 2 * mmd.cubic(x[rows], y).mean()
        )
    found = mmd.kid(X, Y, resamples=6, seed=5)
    low, high = np.percentile(np.array(want) - np.mean(want), [2.5, 97.5]) + found.value
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)


def prdc(real, fake, k):
    """`compute_prdc` of the package of that name, by its definitions, with scipy's distances."""
    real, fake = np.float64(real), np.float64(fake)
    cdist = scipy.spatial.distance.cdist
    own = [np.sort(cdist(z, z), axis=1)[:, k] for z in (real, fake)]
    between = cdist(real, fake)
    inside = between < own[0][:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between < own[1]).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": (between.min(1) < own[0]).mean(),
    }


@pytest.mark.parametrize("block", [1024, 32])
def test_neighbour_metrics_are_prdcs(monkeypatch, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    for k in (3, 5):
        found = neighbours.precision_recall(X, Y, k=k, resamples=0)
        found |= neighbours.density_coverage(X, Y, k=k, resamples=0)
        want = prdc(Y, X, k)
        assert all(0 < value < 2 for value in want.values())
        assert {name: e.value for name, e in found.items()} == pytest.approx(want, rel=1e-12)


def test_too_few_pictures_for_neighbours_are_named():
    with pytest.raises(ValueError, match="3 pictures have no 5-th neighbour"):
        neighbours.density_coverage(X, Y[:3])


def test_nearest_is_scipys():
    where, distances = neighbours.nearest(X, Y)
    between = scipy.spatial.distance.cdist(np.float64(X), np.float64(Y))
    assert (where == between.argmin(1)).all()
    np.testing.assert_allclose(distances, between.min(1), rtol=1e-12)


def test_pictures_learned_by_heart_are_found():
    train, held_out = features(2, 200), features(3, 100)
    fresh = features(4, 100)
    copied = np.concatenate([train[[7, 50]] + 1e-7, fresh[:18]])
    found = neighbours.memorisation(copied, train, held_out, pairs=3, resamples=50)
    assert [pair[:2] for pair in found.pairs[:2]] in ([(0, 7), (1, 50)], [(1, 50), (0, 7)])
    assert found.pairs[0][2] < 1e-5 < found.pairs[2][2]
    share = found.memorised
    assert 0.1 <= share.value <= 0.3 and share.low < share.value < share.high
    assert share.details["expected"] == 0.05
    # Held-out pictures judged by themselves: the percentile, by its definition.
    same = neighbours.memorisation(held_out, train, held_out, resamples=0)
    assert same.memorised.value == pytest.approx(0.05)


def test_clip_score_is_torchmetrics_maths():
    """CLIPScore.update: 100 (a . b) of normalised features, averaged; positive cosines here."""
    reference = importlib.import_module("torchmetrics.functional.multimodal.clip_score")

    class Clip:
        class config:  # noqa: N801
            class text_config:  # noqa: N801
                max_position_embeddings = 77

        def to(self, device):
            return self

        def get_image_features(self, given):
            return given

        def get_text_features(self, given, mask):
            return given

    class Processor:
        def __call__(self, text=None, images=None, **_):
            if images is not None:
                return {"pixel_values": torch.from_numpy(X[:4])}
            return {"input_ids": torch.from_numpy(Y[:4]), "attention_mask": torch.ones(4, 1)}

    image = list(torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    scores, count = reference._clip_score_update(image, ["a"] * 4, Clip(), Processor())
    assert count == 4
    ours = similarity.clip_scores(X[:4], Y[:4])
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-5)
    estimate = similarity.clip_score(X[:4], Y[:4], prompts=np.arange(4), resamples=0)
    assert estimate.value == pytest.approx(float(scores.mean()), rel=1e-5)
    assert similarity.clip_scores(-X[:4], Y[:4]).max() == 0


def test_diversity_is_scipys_cosine_distance():
    prompts = np.array([0, 0, 0, 1, 1, 2])
    found = similarity.diversity(X[:6], prompts, resamples=0)
    want = [
        scipy.spatial.distance.pdist(np.float64(X[rows]), "cosine").mean()
        for rows in ([0, 1, 2], [3, 4])
    ]
    assert found.value == pytest.approx(np.mean(want), rel=1e-9) and found.count == 2
    same = similarity.diversity(np.repeat(X[:1], 4, 0), np.zeros(4), resamples=0)
    assert same.value == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="no prompt has two"):
        similarity.diversity(X[:3], np.arange(3))


def test_intervals_are_scipys():
    values = np.float64(X[:, 0])
    found = bootstrap.mean(values, resamples=500, seed=11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=500, method="percentile",
            rng=np.random.default_rng(11), vectorized=False,
        ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(want), rel=1e-12)


def test_groups_are_resampled_whole():
    values = np.repeat([0.0, 1.0], 50)
    alone = bootstrap.mean(values, resamples=200)
    grouped = bootstrap.mean(values, groups=values, resamples=200)
    assert alone.value == grouped.value == 0.5
    assert alone.high - alone.low < 0.3 and (grouped.low, grouped.high) == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_none_or_all_has_an_interval_too(value):
    found = bootstrap.mean(np.full(40, value), share=True)
    want = scipy.stats.binomtest(int(40 * value), 40).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx(tuple(want)) and found.high - found.low > 0.05
    few = bootstrap.mean(np.full(40, value), share=True, groups=np.arange(40) // 8)
    assert few.high - few.low > 0.3  # five prompts


def test_an_interval_covers_what_it_should():
    """Of many samples about 95 % of intervals hold the true mean, and not all of them."""
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        found = bootstrap.mean(rng.exponential(size=60), resamples=200, seed=i)
        inside += found.low <= 1.0 <= found.high
    assert 170 <= inside <= 198
