"""Ratings: the log that survives kills, and the datasets that follow from it."""

import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sdjax import prepare
from sdjax.data import ratings
from sdjax.data.config import DataConfig
from sdjax.data.named_images import NamedImage
from sdjax.data.pipeline import make_iterator
from sdjax.data.ratings import Pair, Rating, Ratings
from sdjax.errors import UserError
from sdjax.families.conditioning import BlankTokenizer
from sdjax.system import paths


def picture(folder, number):
    """The name and the file of a picture of one grey."""
    file = folder / "a.png"
    Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(file)
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest(), data


def rate(folder, number, rating, prompt):
    """Rate a picture of one grey; return its name."""
    name, data = picture(folder, number)
    row = {"picture": name, "rating": rating, "prompt": prompt}
    ratings.append(paths.to_path(folder), row, {name: data})
    return name


def prefer(folder, better, worse, prompt):
    """Say that one picture of one grey is better than another."""
    both = [picture(folder, number) for number in (better, worse)]
    row = {"better": both[0][0], "worse": both[1][0], "prompt": prompt}
    ratings.append(paths.to_path(folder), row, dict(both))
    return Pair(both[0][0], both[1][0], prompt)


def test_the_last_word_about_two_pictures_counts(tmp_path):
    prefer(tmp_path, 1, 2, "a")
    second = prefer(tmp_path, 3, 2, "a")
    first = prefer(tmp_path, 2, 1, "a")  # the other way round, and later
    found = ratings.read(paths.to_path(tmp_path))
    assert found == Ratings((), 0, (second, first))
    assert len(list((tmp_path / "pictures").iterdir())) == 3


def test_pairs_become_pairs_and_grades():
    found = Ratings(
        (Rating("9", -1, "a"),), 0, (Pair("1", "2", "a"), Pair("1", "3", "a"), Pair("3", "2", "a"),
                                     Pair("9", "2", "a")),
    )  # fmt: skip
    pairs = ratings.rows(found, "pairs", beta=1)
    assert [(row["picture"], row["rejected"]) for row in pairs] == [
        ("1", "2"), ("1", "3"), ("3", "2"), ("9", "2"),
    ]  # fmt: skip
    grades = {name: grade for name, _, grade in ratings.graded(found)}
    assert grades == {"9": -1.0, "1": 1.0, "2": -1.0, "3": 0.0}  # a rating of its own counts first
    assert [row["picture"] for row in ratings.rows(found, "good", beta=1)] == ["1"]
    weights = {row["picture"]: row["weight"] for row in ratings.rows(found, "weights", beta=1)}
    shares = np.exp([-1.0, 1.0, -1.0, 0.0])
    np.testing.assert_allclose([weights[name] for name in "9123"], 4 * shares / shares.sum())


def test_the_last_rating_of_a_picture_counts(tmp_path):
    first = rate(tmp_path, 1, 1, "a")
    second = rate(tmp_path, 2, 1, "a")
    rate(tmp_path, 1, -1, "a")
    found = ratings.read(paths.to_path(tmp_path))
    assert found.each == (Rating(second, 1, "a"), Rating(first, -1, "a"))
    assert found.damaged == 0


@pytest.mark.parametrize("keep", range(1, 90, 8))
def test_half_a_line_of_a_killed_server_costs_that_rating_alone(tmp_path, keep):
    rate(tmp_path, 1, 1, "a")
    log = tmp_path / "ratings.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:keep])
    rate(tmp_path, 2, -1, "a")
    found = ratings.read(paths.to_path(tmp_path))
    assert [each.rating for each in found.each] == [1, -1] and found.damaged == 1


@pytest.mark.parametrize("line", [
    b"[]", b"{}", b'{"picture": "../x", "rating": 1, "prompt": "a"}', b"\xff", b"[" * 10_000,
    b'{"picture": "%s", "rating": true, "prompt": "a"}' % (b"0" * 64),
    b'{"picture": "%s", "rating": 2, "prompt": "a"}' % (b"0" * 64),
    b'{"picture": "%s", "rating": 1, "prompt": 3}' % (b"0" * 64),
    b'{"picture": "%s", "rating": 1, "prompt": "\\ud800"}' % (b"0" * 64),
    b'{"picture": "%s", "rating": 1, "prompt": "%s"}' % (b"0" * 64, b"x" * 200_000),
    b'{"picture": "%s", "rating": %s, "prompt": "a"}' % (b"0" * 64, b"9" * 5000),
    b'{"prompt": "a", "more": [%s]}' % (b"[]," * 1_500_000),
    b'{"better": "%s", "worse": "../x", "prompt": "a"}' % (b"0" * 64),
    b'{"better": "%s", "worse": "%s", "prompt": "a"}' % (b"0" * 64, b"0" * 64),
    b'{"better": "%s", "prompt": "a"}' % (b"0" * 64),
])  # fmt: skip
def test_lines_of_strangers_are_counted_and_passed_over(tmp_path, line):
    rate(tmp_path, 1, 1, "a")
    log = tmp_path / "ratings.jsonl"
    log.write_bytes(line + b"\n" + log.read_bytes())
    found = ratings.read(paths.to_path(tmp_path))
    assert len(found.each) == 1 and found.damaged == 1


def made(*given):
    each = [Rating(str(i), rating, prompt) for i, (rating, prompt) in enumerate(given)]
    return Ratings(tuple(each), 0)


def test_pairs_are_of_one_prompt_and_use_every_picture():
    rows = ratings.rows(made((1, "a"), (-1, "a"), (-1, "a"), (1, "b"), (-1, "c")), "pairs", beta=1)
    assert [(row["picture"], row["rejected"], row["text"]) for row in rows] == [
        ("0", "1", "a"), ("0", "2", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("beta", [0.001, 0.2, 1.0, 1e6])
def test_weights_have_the_mean_one_within_a_prompt(beta):
    rows = ratings.rows(
        made((1, "a"), (-1, "a"), (-1, "a"), (1, "b"), (1, "b")), "weights", beta=beta
    )
    of_a = np.array([row["weight"] for row in rows if row["text"] == "a"])
    shares = np.exp(np.array([0.0, -2.0, -2.0]) / beta)
    np.testing.assert_allclose(of_a, 3 * shares / shares.sum(), rtol=1e-12)
    assert [row["weight"] for row in rows if row["text"] == "b"] == [1.0, 1.0]  # as without


def test_weights_of_bad_pictures_alone_are_one():
    rows = ratings.rows(made((-1, "a"), (-1, "a")), "weights", beta=1e-4)
    assert [row["weight"] for row in rows] == [1.0, 1.0]


def test_prompts_are_held_out_whole_and_for_ever():
    held = [prompt for prompt in map(str, range(2000)) if ratings.is_test(prompt, 0.1)]
    assert 150 < len(held) < 250
    assert set(held) <= {p for p in map(str, range(2000)) if ratings.is_test(p, 0.2)}


def run(*options):
    return prepare.main(["prepare", *map(str, options)])


@pytest.fixture
def flags():
    """Flags as they are at the start of a process, afterwards too."""
    prepare.FLAGS.unparse_flags()
    yield
    for name in ("from_ratings", "ratings_as", "beta", "test_share", "output", "input"):
        prepare.FLAGS[name].unparse()


def test_the_pairs_are_what_dpo_reads(tmp_path, flags, capsys):
    folder, output = tmp_path / "ratings", tmp_path / "data"
    folder.mkdir()
    for i, prompt in enumerate(("a circle", "a square")):
        rate(folder, 10 * i + 1, 1, prompt)
        rate(folder, 10 * i + 2, -1, prompt)
    assert run(f"--from_ratings={folder}", f"--output={output}", "--test_share=0") == 0
    assert "2 examples to train on, 0 held out" in capsys.readouterr().out
    data = DataConfig(
        name="image_text_folder", path=str(output), resolution=16, batch_size=2, eval_split="train",
        images=(NamedImage("rejected"),), data_dir=str(tmp_path / "tfds"),
    )  # fmt: skip
    batches = make_iterator(data, {"tokens": BlankTokenizer(4)}, split="train", seed=0)
    batch = next(batches)
    batches.close()
    grey = lambda x: np.round((np.asarray(x)[:, 0, 0, 0] + 1) * 127.5).astype(int)  # noqa: E731
    pairs = sorted(zip(grey(batch["image"]), grey(batch["rejected"]), strict=True))
    assert pairs == [(1, 2), (11, 12)]


def test_weights_stand_in_the_metadata(tmp_path, flags):
    folder, output = tmp_path / "ratings", tmp_path / "data"
    folder.mkdir()
    rate(folder, 1, 1, "a")
    rate(folder, 2, -1, "a")
    options = (f"--from_ratings={folder}", f"--output={output}", "--test_share=0")
    assert run(*options, "--ratings_as=weights", "--beta=1") == 0
    lines = (output / "train" / "metadata.jsonl").read_text().splitlines()
    weights = [json.loads(line)["weight"] for line in lines]
    np.testing.assert_allclose(weights, [2 / (1 + np.exp(-2)), 2 * np.exp(-2) / (1 + np.exp(-2))])


@pytest.mark.parametrize("options, words", [
    (["--from_ratings=NOWHERE", "--output=OUT"], "cannot be read"),
    (["--from_ratings=HERE", "--output=OUT"], "pairs take a pair, or a good and a bad picture"),
    (["--from_ratings=HERE"], "takes --output=DIR"),
    (["--from_ratings=HERE", "--output=HERE"], "is not empty"),
    (["--from_ratings=HERE", "--output=OUT", "--beta=0"], "--beta=0"),
])  # fmt: skip
def test_what_makes_no_dataset_is_said(tmp_path, flags, capsys, options, words):
    here = tmp_path / "here"
    here.mkdir()
    rate(here, 1, 1, "a")
    places = {"NOWHERE": tmp_path / "nowhere", "HERE": here, "OUT": tmp_path / "out"}
    given = []
    for option in options:
        name, _, value = option.partition("=")
        given.append(f"{name}={places.get(value, value)}")
    assert run(*given) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("put", ["link out", "device", "pipe", "folder", "other"])
def test_a_file_that_is_not_the_rated_picture_is_not_copied(tmp_path, flags, capsys, put):
    folder, output = tmp_path / "ratings", tmp_path / "data"
    folder.mkdir()
    names = [rate(folder, i, 1, "a") for i in range(2)]
    secret = tmp_path / "secret.png"
    secret.write_bytes((folder / "pictures" / f"{names[0]}.png").read_bytes() + b"secret")
    file = folder / "pictures" / f"{names[1]}.png"
    file.unlink()
    act = {
        "link out": lambda: file.symlink_to(secret), "device": lambda: file.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(file), "folder": file.mkdir,
        "other": lambda: file.write_bytes(secret.read_bytes()),
    }  # fmt: skip
    act[put]()
    assert run(f"--from_ratings={folder}", f"--output={output}", "--test_share=0",
               "--ratings_as=good") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "1 examples to train on" in said and "1 pictures are missing or others" in said
    assert len(list((output / "train").glob("*.png"))) == 1


def test_a_log_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "ratings.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        ratings.read(paths.to_path(tmp_path))


def test_a_log_of_empty_lines_takes_little_memory(tmp_path):
    (tmp_path / "ratings.jsonl").write_bytes(b"\n" * (4 << 20))
    tracemalloc.start()
    found = ratings.read(paths.to_path(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not found.each and peak < 16 << 20


def test_a_file_of_other_lines_is_no_log(tmp_path):
    (tmp_path / "ratings.jsonl").write_bytes(b"{}\n" * 200_000)
    with pytest.raises(UserError, match="over 100,000 lines that are none"):
        ratings.read(paths.to_path(tmp_path))
