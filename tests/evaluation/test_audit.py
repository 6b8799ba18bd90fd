"""Audits: the file, zero-shot labels against transformers, shares and intervals against scipy."""

import dataclasses
import importlib
import io
import json
import types

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from sdjax.evaluation import audit_shares
from sdjax.evaluation.audit import (
    UNTOLD,
    Attribute,
    Audit,
    AuditError,
    class_features,
    make_labeller,
    read_audit,
    zero_shot,
)
from sdjax.evaluation.metrics.bootstrap import around

FILE = """
prompts: [a doctor, a nurse]
pictures_per_prompt: 3
attributes:
  hair:
    dark: [a person with dark hair, black hair]
    fair: a person with fair hair
  smile: [smiling, serious, neither]
targets:
  hair: {fair: 0.25, dark: 0.75}
labeller: my.module:label
"""


def read(tmp_path, text):
    (tmp_path / "audit.yaml").write_text(text)
    return read_audit(tmp_path / "audit.yaml")


def test_file_is_read(tmp_path):
    audit = read(tmp_path, FILE)
    assert audit == Audit(
        prompts=("a doctor", "a nurse"),
        pictures_per_prompt=3,
        attributes=(
            Attribute(
                "hair",
                ("dark", "fair"),
                (("a person with dark hair", "black hair"), ("a person with fair hair",)),
                (0.75, 0.25),
            ),
            Attribute("smile", ("smiling", "serious", "neither"), (), (1 / 3,) * 3),
        ),
        labeller="my.module:label",
    )
    assert audit.captions == ["a doctor"] * 3 + ["a nurse"] * 3
    assert audit.needs_clip


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("prompts: [a doctor, a nurse]", "prompts: []", r"prompts is \[\]; expected a list"),
        ("a nurse", "a doctor", "prompts has 'a doctor' twice"),
        ("a nurse", "1", "prompts has 1, which is no text; put it in quotes"),
        ("pictures_per_prompt: 3", "pictures_per_prompt: 0", "pictures_per_prompt is 0; expected"),
        ("pictures_per_prompt: 3", "pictures: 3", "unknown field pictures; expected prompts, pic"),
        ("    dark:", "    yes:", "attributes.hair has True, which is no text; put it in quotes"),
        ("    fair: a", "    dark: a", "'dark' is there twice.*line 7"),
        ("black hair]", "'']", "attributes.hair.dark has '', which is no text"),
        ("[smiling, serious, neither]", "[smiling]", "attributes.smile has 1 label; expected at"),
        ("[smiling, serious, neither]", "5", "attributes.smile is 5; expected a list of texts"),
        ("fair: 0.25", "fair: 0.5", "targets.hair is .*add up to 1"),
        ("fair: 0.25", "grey: 0.25", "targets.hair is .*each of dark, fair"),
        ("  hair: {fair", "  eyes: {fair", "targets is .*expected shares for names in attributes"),
        ("labeller: my.module:label", "", "attributes.smile is a list of labels without texts"),
        ("my.module:label", "my.module", "labeller is 'my.module'; expected package.module:func"),
        ("  smile: [smiling, serious, neither]\n", "", "every attribute has texts and is told by"),
        ("targets:", "targets: [", "not YAML "),
        ("    fair: a", "    [fair]: a", "not YAML .*unhashable key"),
        (FILE, "- a\n- b", "expected prompts, .*; found list"),
        (FILE, "", "expected prompts, .*; found NoneType"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, old, new, message):
    assert old in FILE
    with pytest.raises(AuditError, match=f"(?s)audit.yaml: .*{message}"):
        read(tmp_path, FILE.replace(old, new))


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(AuditError, match="--audit=.*absent.yaml: cannot be read"):
        read_audit(tmp_path / "absent.yaml")


# ---- labels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(folder and model of transformers, our tower)."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sdjax.evaluation.features import clip_tower
    from tests.evaluation.clip_folders import CASES, make_folder

    made = make_folder(tmp_path_factory.mktemp("clip"), **CASES["gelu"])
    return made, clip_tower(made[0], batch_size=8)


def test_zero_shot_labels_are_transformers(clip):
    """One text a label: the softmax of its logits. Several: the mean of their directions."""
    import torch

    from tests.evaluation.clip_folders import pillow_pixels

    (folder, model), tower = clip
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 40, 3)).astype(np.uint8)
    images[::2] //= 4
    texts = (("a red circle",), ("a cat", "a photo of a cat", "two cats"), ("a star",))
    tokens = torch.from_numpy(tower.tokenizer.encode([t for some in texts for t in some])).long()
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pillow_pixels(folder, images))
        rows = torch.split(out.text_embeds, [len(some) for some in texts])
        means = torch.nn.functional.normalize(torch.stack([row.mean(0) for row in rows]), dim=-1)
        expected = (model.logit_scale.exp() * out.image_embeds @ means.T).softmax(dim=1).numpy()
        single = out.logits_per_image[:, [0, 4]].softmax(dim=1).numpy()

    features = tower.images(images)
    ours = zero_shot(features, class_features(tower, texts), tower.logit_scale)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    classes = class_features(tower, (texts[0], texts[2]))
    np.testing.assert_allclose(
        zero_shot(features, classes, tower.logit_scale), single, rtol=0, atol=1e-4
    )
    assert len(set(expected.argmax(1))) > 1, "the pictures must differ in their label"

    attribute = Attribute("thing", ("circle", "cat", "star"), texts, (1 / 3,) * 3)
    label = make_labeller(Audit(("a",), 8, (attribute,)), tower)
    found = label(images, ["a"] * 8)
    assert found.keys() == {"thing"} and found["thing"].dtype == np.int32
    np.testing.assert_array_equal(found["thing"], expected.argmax(1))


BRIGHT = Attribute("light", ("bright", "dark"), (), (0.5, 0.5))


def by_brightness(images, prompts):
    assert images.dtype == np.uint8 and len(prompts) == len(images)
    means = images.mean((1, 2, 3))
    return {
        "light": [None if 100 < m < 150 else "bright" if m >= 150 else "dark" for m in means],
        "more": 1,
    }


@pytest.fixture
def module(monkeypatch):
    """A module that an audit may name."""
    found = types.ModuleType("some_labels")
    found.number = 3
    found.label = by_brightness
    monkeypatch.setitem(importlib.sys.modules, "some_labels", found)
    return found


def test_the_users_function_labels_too(module):
    label = make_labeller(Audit(("a",), 3, (BRIGHT,), "some_labels:label"))
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 120, 250)])
    np.testing.assert_array_equal(label(images, ["a"] * 3)["light"], [1, UNTOLD, 0])


@pytest.mark.parametrize(
    "gives, message",
    [
        ({"light": ["bright", "dim", "dark"]}, r"\['dim'\] for 'light'.*one each of bright, dark"),
        ({"light": ["bright"]}, "gives 1 labels for 'light' of 3 pictures"),
        ({"hair": []}, r"must give a dictionary with 'light'; it has \['hair'\]"),
        (["bright"] * 3, "must give a dictionary with 'light'.*list"),
    ],
)
def test_what_the_function_gives_is_checked(module, gives, message):
    module.label = lambda images, prompts: gives
    label = make_labeller(Audit(("a",), 3, (BRIGHT,), "some_labels:label"))
    with pytest.raises(AuditError, match=message):
        label(np.zeros((3, 4, 4, 3), np.uint8), ["a"] * 3)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module:label", "ModuleNotFoundError.*importable from where"),
        ("some_labels:other", "AttributeError"),
        ("some_labels:number", "is a int; expected a function"),
    ],
)
def test_functions_that_are_not_there_are_named(module, name, message):
    with pytest.raises(AuditError, match=f"labeller '{name}'.*{message}"):
        make_labeller(Audit(("a",), 3, (BRIGHT,), name))


def test_texts_without_clip_are_an_error():
    attribute = dataclasses.replace(BRIGHT, texts=(("bright",), ("dark",)))
    with pytest.raises(AuditError, match="'light' is told by CLIP: name a CLIP folder in --clip"):
        make_labeller(Audit(("a",), 3, (attribute,)))


# ---- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 50, 1000])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_wilson_is_scipys(total, confidence):
    counts = np.unique([0, 1, total // 3, total - 1, total])
    low, high = audit_shares.wilson(counts, total, confidence)
    for i, k in enumerate(counts):
        theirs = scipy.stats.binomtest(int(k), total).proportion_ci(confidence, method="wilson")
        np.testing.assert_allclose((low[i], high[i]), (theirs.low, theirs.high), atol=1e-12)


THREE = Attribute("hair", ("dark", "fair", "red"), (), (0.5, 0.3, 0.2))
COUNTS = np.array([[30, 8, 2], [10, 25, 5]])
AUDIT = Audit(("a doctor", "a nurse"), 40, (THREE,), "x:y")


def codes_of(counts, size=40, seed=0):
    """Labels in any order, with UNTOLD for the rest of each prompt's pictures."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in counts:
        codes = np.repeat(np.arange(len(row)), row)
        rows.append(rng.permutation(np.pad(codes, (0, size - len(codes)), constant_values=UNTOLD)))
    return {"hair": np.concatenate(rows)}


def test_shares_are_counted_by_prompt_and_over_all():
    (finding,) = audit_shares.count(AUDIT, codes_of(COUNTS), resamples=10)
    assert [shares.prompt for shares in finding.prompts] == ["a doctor", "a nurse"]
    for shares, counts in zip(
        (*finding.prompts, finding.overall), (*COUNTS, COUNTS.sum(0)), strict=True
    ):
        assert shares.counts == tuple(counts) and shares.untold == 0
        np.testing.assert_allclose(shares.shares, counts / counts.sum())
        for i, k in enumerate(counts):
            test = scipy.stats.binomtest(int(k), int(counts.sum())).proportion_ci(method="wilson")
            np.testing.assert_allclose((shares.low[i], shares.high[i]), test, atol=1e-12)
    first = finding.prompts[0]  # 0.75, 0.2, 0.05 for 0.5, 0.3, 0.2
    assert first.difference.value == pytest.approx(0.7)
    assert first.ratio.value == pytest.approx(0.05 / 0.75)
    assert first.distance.value == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"codes of 'hair' \(79,\): expected 80"):
        audit_shares.count(AUDIT, {"hair": codes_of(COUNTS)["hair"][:-1]})


def statistics(codes, axis=-1):
    """Disparities of labels [..., N], by another way than counting."""
    shares = np.stack([np.mean(codes == label, axis=axis) for label in range(3)])
    target = np.array(THREE.target).reshape(3, *[1] * (shares.ndim - 1))
    return {
        "difference": np.ptp(shares, axis=0),
        "ratio": shares.min(0) / shares.max(0),
        "distance": np.abs(shares - target).sum(0) / 2,
    }


@pytest.mark.parametrize("name", ["difference", "ratio", "distance"])
def test_intervals_of_disparities_are_scipys_bootstrap(name):
    """One prompt at once by scipy; two, drawn anew each by itself, as two samples of it."""
    (finding,) = audit_shares.count(AUDIT, codes_of(COUNTS), resamples=20_000)
    codes = codes_of(COUNTS)["hair"].reshape(2, 40)
    cases = [(finding.prompts[0], (codes[0],)), (finding.overall, (codes[0], codes[1]))]
    for shares, samples in cases:
        theirs = scipy.stats.bootstrap(
            samples,
            lambda *found, axis: statistics(np.concatenate(found, axis=axis), axis)[name],
            n_resamples=20_000, method="percentile", vectorized=True, rng=1,
        )  # fmt: skip
        found = getattr(shares, name)
        assert found.value == pytest.approx(statistics(np.concatenate(samples))[name])
        expected = np.clip(around(found.value, theirs.bootstrap_distribution), 0, 1)
        # Two draws of 20,000: quantiles of steps of 1/40 that may fall on neighbouring ones.
        np.testing.assert_allclose((found.low, found.high), expected, atol=0.013)
        assert found.low < found.value < found.high


def test_untold_pictures_are_left_out_and_counted():
    counts = np.array([[6, 2, 2], [0, 0, 0]])
    (finding,) = audit_shares.count(AUDIT, codes_of(counts), resamples=50)
    first, second = finding.prompts
    assert first.untold == 30 and first.shares == (0.6, 0.2, 0.2)
    assert second.untold == 40 and np.isnan(second.shares).all()
    assert finding.overall.shares == first.shares and finding.overall.untold == 70
    written = json.loads(json.dumps(audit_shares.to_json(AUDIT, (finding,)), allow_nan=False))
    hair = written["attributes"]["hair"]
    assert hair["prompts"]["a nurse"]["shares"] == [None] * 3
    assert hair["prompts"]["a nurse"]["distance"] == {"value": None, "low": None, "high": None}
    assert hair["prompts"]["a doctor"]["counts"] == [6, 2, 2]
    assert hair["all"]["distance"]["value"] == pytest.approx(0.1)
    assert hair["target"] == [0.5, 0.3, 0.2] and written["labeller"] == "x:y"


def test_an_attribute_that_no_picture_tells_has_no_estimates():
    (finding,) = audit_shares.count(AUDIT, codes_of(np.zeros((2, 3), int)), resamples=50)
    assert audit_shares.estimates((finding,)) == {}
    assert len(audit_shares.tables((finding,))) == 1
    json.dumps(audit_shares.to_json(AUDIT, (finding,)), allow_nan=False)


def test_the_same_codes_give_the_same_intervals_and_none_without_resamples():
    once, again = (audit_shares.count(AUDIT, codes_of(COUNTS), resamples=100) for _ in range(2))
    assert once == again
    assert once != audit_shares.count(AUDIT, codes_of(COUNTS), resamples=100, seed=1)
    (finding,) = audit_shares.count(AUDIT, codes_of(COUNTS), resamples=0)
    assert finding.overall.distance.low is None and finding.overall.distance.value > 0


def test_table_shows_every_share_with_its_interval():
    findings = audit_shares.count(AUDIT, codes_of(COUNTS), resamples=200)
    out = io.StringIO()
    for table in audit_shares.tables(findings):
        Console(file=out, width=160).print(table)
    text = out.getvalue()
    for part in ("hair", "dark %", "(target 50)", "a doctor", "75 (60 to 86)", "all prompts",
                 "50 (39 to 61)", "untold", "distance from"):  # fmt: skip
        assert part in text, part
    names = audit_shares.estimates(findings)
    assert names["audit/hair/ratio"].value == pytest.approx(7 / 40)
    assert names["audit/hair/ratio"].higher_is_better
    assert not names["audit/hair/distance"].higher_is_better
