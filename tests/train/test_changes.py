"""Differences between the configuration of a saved run and the one at hand."""

import fnmatch

from sdjax.train.changes import BREAKING, MISSING, compare_configs


def test_differences_of_configurations():
    saved = {
        "seed": 1,
        "model": {"unet": {"channels": [32, 64]}, "dtype": "float32"},
        "optim": {"name": "adamw", "learning_rate": 1e-4},
        "train": {"steps": 100},
        "gone": 1,
    }
    current = {
        "seed": 1,
        "model": {"unet": {"channels": (32, 128)}, "dtype": "bfloat16"},
        "optim": {"name": "lion", "learning_rate": 1e-4},
        "train": {"steps": 200, "log_every": 5},
    }
    found = compare_configs(saved, current)
    assert [(d.field, d.breaks) for d in found] == [
        ("gone", False),
        ("model.dtype", False),
        ("model.unet.channels", True),
        ("optim.name", True),
        ("train.log_every", False),
        ("train.steps", False),
    ]
    assert (found[2].saved, found[2].current) == ([32, 64], [32, 128])
    assert found[4].saved == MISSING
    assert str(found[3]) == "optim.name: was 'adamw', is 'lion'"
    assert [d.breaks for d in compare_configs(saved, current, ("train.*",))][-2:] == [True] * 2


def test_every_breaking_pattern_is_of_a_field_there_is():
    from sdjax.config import Config, to_dict

    changed = compare_configs({}, to_dict(Config()))
    for pattern in BREAKING:
        assert any(fnmatch.fnmatchcase(d.field, pattern) for d in changed), pattern
    for field in ("train.steps", "optim.learning_rate", "model.dtype", "mesh.data"):
        assert [d.breaks for d in changed if d.field == field] == [False], field


def test_tuples_and_lists_are_the_same():
    assert compare_configs({"a": {"b": [1, [2]]}}, {"a": {"b": (1, (2,))}}) == []
