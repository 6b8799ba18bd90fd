"""Captions: alternatives, tags, and the share each is chosen with."""

import collections

import numpy as np
import pytest

from sdjax.data.caption_choice import Caption, CaptionConfig, choose, graded, replaced, vary_tags
from sdjax.errors import UserError


class NoChance:
    """A generator that must not be asked."""

    def __getattr__(self, name):
        raise AssertionError("randomness was drawn where there is no choice")


def test_without_a_choice_nothing_is_drawn():
    assert choose(Caption("a, b"), CaptionConfig(), NoChance()) == "a, b"


def test_shares_of_main_and_others():
    rng = np.random.default_rng(0)
    caption = Caption("m", ("x", "y"), 0.6)
    found = collections.Counter(choose(caption, CaptionConfig(), rng) for _ in range(5000))
    assert abs(found["m"] - 3000) < 150 and abs(found["x"] - 1000) < 120
    assert found["m"] + found["x"] + found["y"] == 5000


def test_texts_take_the_place_of_captions_equally_often():
    rng = np.random.default_rng(0)
    caption = replaced(Caption("red", ("other",), 0.1), ("<cat>", "a {} <cat>", "{}, {}"))
    assert caption.main == "<cat>" and caption.others == ("a red <cat>", "red, red")
    found = collections.Counter(choose(caption, CaptionConfig(), rng) for _ in range(3000))
    assert all(abs(count - 1000) < 120 for count in found.values()) and len(found) == 3
    assert replaced(Caption("red"), ("<cat>",)) == Caption("<cat>", (), 1.0)


def test_tags_keep_their_front_and_lose_their_share():
    rng = np.random.default_rng(0)
    config = CaptionConfig(shuffle_tags=True, keep_tags=2, tag_dropout=0.25)
    text = "one girl,  garden , a,b,, c, d"
    made = [vary_tags(text, config, rng).split(", ") for _ in range(2000)]
    assert all(tags[:2] == ["one girl", "garden"] for tags in made)
    assert all(set(tags[2:]) <= set("abcd") and len(set(tags)) == len(tags) for tags in made)
    dropped = 1 - sum(len(tags) - 2 for tags in made) / (4 * 2000)
    assert abs(dropped - 0.25) < 0.02
    whole = collections.Counter(tuple(tags[2:]) for tags in made if len(tags) == 6)
    assert len(whole) == 24  # every order comes
    assert max(whole.values()) < 3 * min(whole.values())


def test_the_separator_is_what_is_split_at_and_joined_with():
    config = CaptionConfig(separator=" | ", tag_dropout=1.0, keep_tags=2)
    assert vary_tags("a, b| c |d", config, np.random.default_rng(0)) == "a, b | c"
    shuffle = CaptionConfig(separator=" | ", shuffle_tags=True)
    assert sorted(vary_tags("a|b", shuffle, np.random.default_rng(0)).split(" | ")) == ["a", "b"]


def test_all_tags_may_drop():
    assert vary_tags("a, b", CaptionConfig(tag_dropout=1.0), np.random.default_rng(0)) == ""


QUALITY = ((7.0, "masterpiece, best quality"), (0.0, "low quality"))


@pytest.mark.parametrize(
    "score, first, expected",
    [
        (8, True, "masterpiece, best quality, 1girl, hat, sky"),
        (7, True, "masterpiece, best quality, 1girl, hat, sky"),
        (6.9, False, "1girl, low quality, hat, sky"),
        (-1, True, "1girl,hat ,sky"),
        (float("nan"), True, "1girl,hat ,sky"),
    ],
)
def test_quality_tags_follow_the_score(score, first, expected):
    config = CaptionConfig(quality_tags=QUALITY[::-1], quality_first=first, keep_tags=1)
    caption = graded(Caption("1girl,hat ,sky", ("", "hat"), 0.5), score, config)
    assert caption.main == expected and caption.main_share == 0.5
    assert caption.others[0] == ""
    assert choose(Caption(caption.main), config, NoChance()) == expected


@pytest.mark.parametrize("first", [True, False])
def test_quality_tags_are_neither_shuffled_nor_dropped(first):
    rng = np.random.default_rng(0)
    varied = {"shuffle_tags": True, "tag_dropout": 0.5, "keep_tags": 1, "quality_first": first}
    config = CaptionConfig(quality_tags=QUALITY, **varied)
    caption = graded(Caption("1girl, a, b, c"), 9, config)
    made = [choose(caption, config, rng).split(", ") for _ in range(200)]
    front = ["masterpiece", "best quality", "1girl"]
    assert all(tags[:3] == (front if first else [front[2], *front[:2]]) for tags in made)
    assert {tuple(sorted(tags[3:])) for tags in made} == {
        (), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{"main_share": 1.5}, {"tag_dropout": -0.1}, {"keep_tags": -1}, {"separator": " "},
     {"empty": "drop"}, {"templates": ("a photo",)}, {"quality_tags": ((float("nan"), "a"),)},
     {"quality_tags": ((1.0, " , "),)}],
)  # fmt: skip
def test_wrong_fields_are_named(fields):
    with pytest.raises(UserError, match=f"data.captions.{next(iter(fields))}"):
        CaptionConfig(**fields)
