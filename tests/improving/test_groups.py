"""Groups of prompts, which of them fail, what is proposed, and before against after."""

import json

import numpy as np
import pytest
import scipy.stats

from sdjax.data.builders import shapes
from sdjax.errors import UserError
from sdjax.improving import comparison, groups, judging, proposal
from sdjax.improving.groups import Group
from sdjax.improving.proposal import Share, Verdict


def test_a_caption_of_shapes_is_in_the_groups_of_its_attributes():
    found = groups.attributes("a large red circle above a small blue square")
    assert {str(g) for g in found} == {
        "objects: 2", "colour: red", "colour: blue", "shape: circle", "shape: square",
        "colour and shape: red circle", "colour and shape: blue square", "size: large",
        "size: small", "relation: above",
    }  # fmt: skip
    assert Group.parse("colour and shape: red circle") == Group(groups.PAIR, "red circle")


def test_groups_follow_from_the_captions():
    of_shapes = ["a small red circle on the left", "a drawing of a blue cross"]
    kind, of = groups.choose("auto", of_shapes)
    assert kind == "attributes" and of("a dog") == frozenset()
    tagged = ["1girl, solo, red hair", "cat, sitting, window, night"]
    kind, of = groups.choose("auto", tagged)
    assert kind == "tags" and Group("tag", "red hair") in of(tagged[0])
    kind, of = groups.choose("auto", ["A photo of a Dog on the grass", "two cats"])
    assert kind == "words"
    assert {g.value for g in of("A photo of a Dog on the grass")} == {"dog", "grass"}
    with pytest.raises(UserError, match="'a dog' is no caption of captioned_shapes"):
        groups.choose("attributes", ["a dog"])


@pytest.mark.parametrize("passed, total", [(0, 12), (5, 9), (12, 12), (1, 400)])
def test_intervals_are_wilsons(passed, total):
    ours = Share(passed, total).interval
    theirs = scipy.stats.binomtest(passed, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def verdicts(rates, each=20):
    """So many prompts of each colour and shape, of which a share of the colour's is right."""
    found = []
    for colour, rate in rates.items():
        for shape in shapes.SHAPES:
            for i in range(each):
                text = f"a large {colour} {shape} at the top"
                found.append(Verdict(f"{colour}{shape}{i}", text, i < round(rate * each)))
    return found


def test_the_rare_colour_fails_alone_and_is_to_be_collected():
    seen = verdicts({"red": 0.1, "blue": 0.9, "green": 0.95, "black": 0.9})
    trained = {Group("colour", c): n for c, n in
               (("red", 11), ("blue", 500), ("green", 520), ("black", 480))}  # fmt: skip
    findings = proposal.find(seen, groups.attributes, trained, least=8, target=None)
    assert [str(one.group) for one in findings if one.fails] == ["colour: red"]
    blamed = {str(one.group): one.blamed for one in findings if one.blamed}
    assert blamed == dict.fromkeys(
        (f"colour and shape: red {shape}" for shape in shapes.SHAPES), "colour: red"
    )
    (one,) = proposal.propose(findings, most=2000)
    assert (one.examples, one.trained) == (489, 11)  # to the median of the others, 500
    assert "8 of 80 prompts right" in one.why and "the median of groups like it is 500" in one.why
    assert proposal.propose(findings, most=100)[0].examples == 100
    text = proposal.as_text("runs/base", findings, [one])
    assert "- **colour: red**: 489 more." in text and "| by colour: red |" in text
    assert json.loads(proposal.as_lines([one]))["group"] == "colour: red"


def test_a_group_that_is_not_rare_is_looked_at_first():
    seen = verdicts({"red": 0.1, "blue": 0.9, "green": 0.95})
    trained = {Group("colour", c): 500 for c in ("red", "blue", "green")}
    findings = proposal.find(seen, groups.attributes, trained, least=8, target=None)
    (one,) = proposal.propose(findings, most=2000)
    assert one.examples == 500 and "It is not rare" in one.why


def test_even_groups_do_not_fail_but_miss_a_target():
    seen = verdicts({"red": 0.6, "blue": 0.6})
    assert not any(
        one.fails for one in proposal.find(seen, groups.attributes, {}, least=8, target=None)
    )
    missed = proposal.find(seen, groups.attributes, {}, least=8, target=0.9)
    assert {str(one.group) for one in missed if one.fails} >= {"colour: red", "colour: blue"}
    few = proposal.find(seen[:7], groups.attributes, {}, least=8, target=0.9)
    assert few == []
    assert "No group fails" in proposal.as_text("x", few, [])


def test_chance_alone_rarely_makes_a_group_fail():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        seen = [
            Verdict(str(i), f"a large {c} circle", bool(rng.random() < 0.8))
            for i, c in enumerate(list(shapes.PALETTE) * 16)
        ]
        found = proposal.find(seen, groups.attributes, {}, least=8, target=None)
        wrong += any(one.fails for one in found)
    assert wrong <= 8  # of 40 rounds with eight even groups of 16 prompts


def test_halves_are_disjoint_and_do_not_depend_on_the_order():
    captions = [f"a large {c} {s} at the top" for c in shapes.PALETTE for s in shapes.SHAPES]
    one, two = judging.halves(captions, 100), judging.halves(captions[::-1], 100)
    assert one == two and not set(one["find"]) & set(one["judge"])
    assert set(one["find"]) | set(one["judge"]) == set(captions)
    assert len(judging.halves(captions, 5)["judge"]) == 5
    with pytest.raises(UserError, match="has 1 different captions, too few"):
        judging.halves(captions[:1] * 3, 5)


def test_before_and_after_are_paired_by_prompt():
    before = verdicts({"red": 0.1, "blue": 0.9, "green": 0.9})
    after = verdicts({"red": 0.8, "blue": 0.9, "green": 0.5})
    failed = [Group("colour", "red")]
    found = comparison.compare(before, after, groups.attributes, failed, least=8)
    assert found.failed.before == Share(8, 80) and found.failed.after == Share(64, 80)
    assert found.failed.better and found.failed.difference.value == pytest.approx(0.7)
    assert [str(one.group) for one in found.losses if one.group.kind == "colour"] == [
        "colour: green"
    ]
    assert found.verdict == "mixed" and "colour: green" in found.sentence()
    assert str(found.groups[0].group) == "colour: red" and found.groups[0].failed
    blue = next(one for one in found.groups if str(one.group) == "colour: blue")
    assert not blue.better and not blue.worse and blue.difference.low == blue.difference.high == 0
    good = verdicts({"red": 0.8, "blue": 0.9, "green": 0.9})
    verdict = lambda a, b: comparison.compare(a, b, groups.attributes, failed, least=8).verdict  # noqa: E731
    assert verdict(before, good) == "better"
    assert verdict(good, before) == "worse" and verdict(good, good) == "undecided"
    with pytest.raises(ValueError, match="about other prompts"):
        comparison.compare(before, after[1:], groups.attributes, failed, least=8)


def test_clip_has_to_find_the_caption_of_a_picture():
    texts = ["a", "b", "c"]
    features = np.eye(3)
    images = np.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0.8, 0.6]])
    assert judging.found_first(images, features, texts, ["a", "b", "c"]) == [True, True, False]


def test_losses_pass_below_what_a_quarter_exceeded_before():
    from sdjax.evaluation.losses import Example

    before = [Example(str(i), 0, i, (8, 8), f"text {i}", loss=i / 10, score=0.0) for i in range(9)]
    seen, limit = judging.by_loss(before[::-1], None)
    assert limit == pytest.approx(0.6) and [v.passed for v in seen] == [True] * 7 + [False] * 2
    assert judging.by_loss(before[7:], 0.75)[0][0].passed
