"""Win rates with their intervals, and what moved, of pictures whose scores are known."""

import json

import numpy as np
import pytest
import scipy.stats

from sdjax.data.builders import shapes
from sdjax.data.pictures import open_folder
from sdjax.errors import UserError
from sdjax.evaluation.compare import against
from sdjax.evaluation.compare.scores import scores_of
from sdjax.evaluation.compare.wins import drifts, wilson, win_rate, win_rates
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.sampling.grids import save_png
from sdjax.sampling.inputs import write_metadata
from sdjax.system import paths

CAPTIONS = ["a red circle", "a red circle", "a blue square", "a green cross"]


@pytest.mark.parametrize("wins, trials", [(0, 7), (3, 7), (50, 100), (7, 7), (1, 1000)])
def test_the_interval_is_wilsons(wins, trials):
    theirs = scipy.stats.binomtest(wins, trials).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(wins / trials, trials), (theirs.low, theirs.high), atol=1e-12)


def test_the_interval_of_a_win_rate_holds_the_truth():
    rng, inside = np.random.default_rng(0), 0
    prompts = [str(i) for i in range(60)]
    for _ in range(400):
        ours, theirs = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60)
        found = win_rate(ours, theirs, prompts)
        inside += found.low <= scipy.stats.norm.cdf(0.3 / np.sqrt(2)) <= found.high
    assert 0.92 < inside / 400 < 0.98


def test_ties_count_half_and_missing_scores_not_at_all():
    ours = np.array([1.0, 0.0, 1.0, np.nan, 0.5])
    theirs = np.array([0.0, 1.0, 1.0, 0.0, 0.0])
    found = win_rate(ours, theirs, list("abcde"))
    assert found.value == 2.5 / 4 and found.details == {"wins": 2, "ties": 1, "losses": 1}
    less = win_rate(ours, theirs, list("abcde"), less=True)
    assert less.value == 1 - found.value and less.details["wins"] == 1
    assert win_rate(ours * np.nan, theirs, list("abcde")) is None


def test_pictures_of_one_prompt_are_one_trial():
    ours, theirs = np.ones(8), np.zeros(8)
    assert win_rate(ours, theirs, ["a"] * 8).low == wilson(1.0, 1)[0]
    assert win_rate(ours, theirs, list("abcdefgh")).low == wilson(1.0, 8)[0]


def test_drift_of_means_has_the_interval_of_paired_pictures():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, 200)
    scores = {"contrast": theirs + 1 + rng.normal(0, 0.1, 200)}, {"contrast": theirs}
    metrics = {"fid": Estimate(30.0, 25, 35, False), "kid": Estimate(1.0)}, {"fid": Estimate(20.0)}
    prompts = [str(i) for i in range(200)]
    found = drifts(*scores, metrics, prompts, resamples=500, seed=0)
    assert found.keys() == {"contrast", "fid"}
    moved = found["contrast"].difference
    assert 0.95 < moved.low < moved.value < moved.high < 1.05, "the pictures' own spread cancels"
    fid = found["fid"]
    assert (fid.ours, fid.theirs, fid.difference.value, fid.difference.low) == (30, 20, 10, None)


def drawn(width, colour=(200, 0, 0)):
    """A red square on white, so many pixels wide of 64."""
    image = np.full((64, 64, 3), 255, np.uint8)
    start = 32 - width // 2
    image[start : start + width, start : start + width] = colour
    return image


def evaluation(folder, widths, **settings):
    """A folder as an evaluation leaves it, of squares of these widths."""
    folder = paths.to_path(folder)
    names = [f"{i:06d}.png" for i in range(len(widths))]
    for name, width in zip(names, widths, strict=True):
        save_png(folder / "images" / name, drawn(width), {})
    write_metadata(folder / "images", names, ["a red square"] * len(names))
    given = {"prompts": "abc", "per_prompt": 1, "seed": 0, "size": [64, 64], "guidance": 3.0}
    (folder / "images" / "settings.json").write_text(json.dumps({**given, **settings}))
    kid = {"value": 1.0, "low": 0.5, "high": 1.5, "higher_is_better": False, "count": 3}
    content = {"metrics": {"kid": kid}, "num_samples": len(widths)}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def test_scores_of_shapes_are_what_was_drawn(tmp_path):
    folder = evaluation(tmp_path / "a", [16, 24, 40])
    pictures = open_folder(folder / "images")
    found = scores_of(pictures, pictures.captions)
    np.testing.assert_allclose(found["object_width"], np.array([16, 24, 40]) / 64, atol=0.02)
    np.testing.assert_array_equal(found["fidelity_exact"], 1.0)
    assert "fidelity_relation" not in found and "clip_score" not in found
    expected = [1 - (w / 64) ** 2 * (1 - 200 / 255 / 3) for w in (16, 24, 40)]
    np.testing.assert_allclose(found["brightness"], expected, atol=1e-6)
    np.testing.assert_allclose(
        found["saturation"], [(w / 64) ** 2 * 200 / 255 for w in (16, 24, 40)], atol=1e-6
    )
    assert not shapes.parse_caption("a red square")[0].size


def test_larger_shapes_win_and_both_sides_are_told(tmp_path):
    ours = against.read_side(evaluation(tmp_path / "ours", [24, 24, 40]))
    theirs = against.read_side(evaluation(tmp_path / "theirs", [16, 24, 24], guidance=7.5))
    assert against.is_evaluation(tmp_path / "ours") and not against.is_evaluation(tmp_path)
    (found,) = against.compare(ours, [theirs], resamples=50, seed=0)
    assert found.wins["object_width"].details == {"wins": 2, "ties": 1, "losses": 0}
    assert found.wins["fidelity_exact"].value == 0.5
    assert found.drift["object_width"].difference.value == pytest.approx(24 / 64 / 3, abs=0.01)
    assert found.drift["kid"].difference.value == 0.0
    assert found.notes == ("theirs was drawn with guidance 7.5, this with 3.0",)
    against.write(paths.to_path(tmp_path), [found])
    written = json.loads((tmp_path / "comparison.json").read_text())["theirs"]
    assert written["win_rate"]["object_width"]["wins"] == 2
    assert written["drift"]["kid"]["theirs"] == 1.0
    assert len(against.tables([found])) == 2


@pytest.mark.parametrize("widths, settings, words", [
    ([16, 24], {}, "pictures: 2, not 3"),
    ([16, 24, 24], {"seed": 1}, "seed: 1, not 0"),
    ([16, 24, 24], {"prompts": "xyz"}, "prompts: 'xyz', not 'abc'"),
])  # fmt: skip
def test_evaluations_of_other_pictures_are_refused(tmp_path, widths, settings, words):
    ours = against.read_side(evaluation(tmp_path / "ours", [16, 16, 16]))
    theirs = against.read_side(evaluation(tmp_path / "theirs", widths, **settings))
    with pytest.raises(UserError, match=words):
        against.compare(ours, [theirs], resamples=0, seed=0)


def test_scores_that_one_side_lacks_are_no_contest():
    both = {"contrast": np.ones(2)}, {"contrast": np.zeros(2), "clip_score": np.ones(2)}
    assert win_rates(*both, ["a", "b"]).keys() == {"contrast"}
