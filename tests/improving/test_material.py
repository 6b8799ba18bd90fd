"""What the next run reads: made, given, or weighted; and the recipe of it."""

import dataclasses
import json

import pytest

from sdjax.config import resolve, to_dict
from sdjax.data.builders import shapes
from sdjax.data.config import DataConfig, DataError
from sdjax.data.importance.config import ImportanceConfig
from sdjax.data.mixture import Part
from sdjax.data.pipeline import open_parts
from sdjax.errors import UserError
from sdjax.improving import groups, material, training
from sdjax.improving.groups import Group
from sdjax.improving.proposal import Proposal


def proposal_of(group, examples=6, trained=2):
    return Proposal(Group.parse(group), examples, trained, "why")


@pytest.fixture
def data(shapes_dir):
    return DataConfig(data_dir=str(shapes_dir), shapes_train=40, shapes_test=8, resolution=16,
                      batch_size=4, threads=1)  # fmt: skip


def test_pictures_that_are_made_show_the_group_and_nothing_of_the_test(data, tmp_path):
    wanted = ["colour: red", "colour and shape: blue cross", "relation: above", "objects: 2",
              "position: at the top left", "size: large"]  # fmt: skip
    proposals = [proposal_of(one) for one in wanted]
    made = material.build(
        "synthesise", data, proposals, groups.attributes, tmp_path, more="", cap=3.0
    )
    rows = [json.loads(x) for x in (tmp_path / "more/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 36 and len(list((tmp_path / "more").glob("*.png"))) == 36
    for i, row in enumerate(rows):
        assert Group.parse(wanted[i // 6]) in groups.attributes(row["text"]), row
        parsed = tuple(shapes.parse_caption(row["text"]))
        assert not shapes.is_held_out(parsed), row
    base, added = made.data.mixture
    assert base == Part() and added.name == "image_text_folder"
    # 36 of 76 examples, which is less than half.
    assert added.weight / (1 + added.weight) == pytest.approx(36 / 76, abs=1e-3)
    sources = open_parts(made.data, "train")
    assert len(sources[0]) == 40 and 30 <= len(sources[1]) < 36  # some are the folder's own test
    assert "36 pictures made" in made.note


def test_the_folder_of_what_was_collected_joins_a_mixture(data, tmp_path):
    proposals = [proposal_of("colour: red", examples=5)]
    material.synthesise(proposals, tmp_path / "given", pairs=0.0)
    mixed = dataclasses.replace(
        data, mixture=(Part(end=5), Part(start=5, weight=2.0), Part(start=2, weight=1.0))
    )
    made = material.build("more", mixed, proposals, groups.attributes, tmp_path,
                          more=str(tmp_path / "given"), cap=3.0)  # fmt: skip
    *base, added = made.data.mixture
    assert base == [Part(weight=2.0), Part(weight=1.0)]  # what is there at the end
    assert added.path == str(tmp_path / "given")
    assert added.weight == pytest.approx(3.0 * 0.2 / 0.8)  # a fifth of the batches, at least


def test_weights_make_examples_of_a_group_come_more_often(data, tmp_path):
    proposals = [proposal_of("colour: red", examples=100, trained=2)]
    made = material.build("reweight", data, proposals, groups.attributes, tmp_path, more="",
                          cap=3.0)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "weights.jsonl").read_text().splitlines()]
    texts = open_parts(data, "train")[0].texts()
    assert [row["weight"] for row in rows] == [3.0 if "red" in text else 1.0 for text in texts]
    assert made.data.importance == ImportanceConfig(str(tmp_path / "weights.jsonl"), 3.0, False)
    none = [proposal_of("shape: hexagon")]
    with pytest.raises(UserError, match="no training example is in a group that fails"):
        material.build("reweight", data, none, groups.attributes, tmp_path, more="", cap=3.0)


def test_ways_that_do_not_suit_the_data_are_refused(data):
    folder = dataclasses.replace(data, name="prepared", path="x")
    assert material.choose_how("auto", data, "") == "synthesise"
    assert material.choose_how("auto", folder, "") == "reweight"
    assert material.choose_how("auto", folder, "more") == "more"
    for how, config, more, words in (
        ("synthesise", folder, "", "pictures of captioned_shapes alone can be made"),
        ("more", data, "", "--more=DIR"),
        ("reweight", data, "x", "--more=x is for --how=more, not reweight"),
        ("reweight", dataclasses.replace(data, importance=ImportanceConfig("w")), "", "already"),
    ):
        with pytest.raises(UserError, match=words):
            material.choose_how(how, config, more)


def test_the_recipe_begins_from_the_checkpoint_and_reads_the_mixture(tiny_config, tmp_path):
    tiny_config.sample.fidelity = 16
    base = resolve(tiny_config)
    data = dataclasses.replace(base.data, mixture=(Part(), Part(name="prepared", path="/x")))
    made = training.next_config(base, data, workdir=str(tmp_path), step=4, steps=20, rate=0.5)
    training.write_recipe(tmp_path, made, "About.")
    scope = {}
    exec((tmp_path / "recipe.py").read_text(), scope)
    found = resolve(scope["get_config"]())
    assert to_dict(found) == to_dict(made)
    assert found.init_from == f"{tmp_path}/checkpoints/4" and found.vae_from == ""
    assert found.optim.learning_rate == 0.5 * base.optim.learning_rate
    assert (found.train.steps, found.sample.fidelity, found.seed) == (20, 0, base.seed + 1)


def test_rare_words_are_rare_in_training_alone():
    with pytest.raises(ValueError, match="'red=2'; expected WORD=SHARE"):
        shapes.parse_rare(("red=2",))
    rare = shapes.parse_rare(("red=0.1", "at the top=0"))
    captions = [shapes.make_example(0, "train", i, rare=rare)[1] for i in range(400)]
    scenes = [shapes.make_example(0, "train", i, rare=rare)[2] for i in range(400)]
    red = sum(any(o.colour == "red" for o in scene.objects) for scene in scenes)
    assert 0 < red < 25 and not any(
        o.position == "at the top" for scene in scenes for o in scene.objects
    )
    assert len(captions) == 400
    plain = [shapes.make_example(0, "test", i)[1] for i in range(20)]
    assert plain == [shapes.make_example(0, "test", i, rare=rare)[1] for i in range(20)]
    from sdjax.data.pipeline import open_source

    with pytest.raises(DataError, match=r"data.shapes_rare has 'pink=0.1'"):
        open_source(DataConfig(shapes_rare=("pink=0.1",)), "train")
