"""Splits by hash: disjoint, whole, of the right size, and stable when data comes and goes."""

import numpy as np
import pytest

from sdjax.data import splits
from sdjax.data.config import DataConfig
from sdjax.data.splits import Cut, hashes, plan
from sdjax.errors import UserError

KEYS = [f"folder/{i:05}.jpg" for i in range(4000)]


def select(split, stored=("train",), keys=KEYS, **fields):
    given = {"validation": 0.0, "test": 0.0, "fold": ""} | fields
    read, cut = plan(split, stored, **given)
    if cut is None:
        return read
    share, fold = np.array([hashes(key) for key in keys], np.uint64).T
    assert read == "train"
    return {key for key, keep in zip(keys, cut.keep(share, fold), strict=True) if keep}


def test_shares_are_disjoint_and_whole():
    made = [select(name, validation=0.1, test=0.05) for name in ("train", "validation", "test")]
    assert set.union(*made) == set(KEYS) and sum(map(len, made)) == len(KEYS)
    shares = [len(part) / len(KEYS) for part in made]
    assert shares == pytest.approx([0.85, 0.1, 0.05], abs=0.02)


def test_an_example_stays_where_it_is():
    test = select("test", test=0.05)
    assert select("test", test=0.05, keys=KEYS[::-2]) == test & set(KEYS[::-2])
    assert test < select("test", test=0.08)  # a larger share only takes from train


def test_folds_part_the_train_split():
    held_out = [select("validation", test=0.1, fold=f"{i}/5") for i in range(1, 6)]
    rest = set(KEYS) - select("test", test=0.1, fold="1/5")
    assert set.union(*held_out) == rest and sum(map(len, held_out)) == len(rest)
    assert all(abs(len(part) - len(rest) / 5) < 80 for part in held_out)
    for i, part in enumerate(held_out, start=1):
        assert select("train", test=0.1, fold=f"{i}/5") == rest - part


def test_stored_splits_are_taken_as_they_are():
    assert select("test", ("train", "test"), test=0.1) == "test"
    assert select("train", ("train", "test"), test=0.1) == "train"
    assert select("train[:10%]") == "train[:10%]"
    assert select("validation", ("train", "validation"), validation=0.1) == "validation"
    # But a fold makes a validation split of its own.
    assert len(select("validation", ("train", "validation"), fold="1/2")) < 2200
    assert select("other", validation=0.1) == "other"  # not there; who opens it says so


def test_a_slice_of_a_split_by_hash_is_refused():
    with pytest.raises(UserError, match=r"'train\[:10%\]' is a slice, but train is cut by hash"):
        select("train[:10%]", test=0.1)


@pytest.mark.parametrize("fold", ["2", "0/5", "6/5", "1/1", "a/b", "1/5 "])
def test_wrong_folds(fold):
    with pytest.raises(UserError, match="data.fold is"):
        DataConfig(fold=fold)


@pytest.mark.parametrize(
    "fields, named",
    [({"test_share": 1.0}, "test_share is 1.0"), ({"validation_share": -0.1}, "validation_share"),
     ({"validation_share": 0.5, "test_share": 0.5}, "leaves nothing to train on"),
     ({"validation_share": 0.5, "fold": "1/2"}, "both make a validation split")],
)  # fmt: skip
def test_wrong_shares(fields, named):
    with pytest.raises(UserError, match=named):
        DataConfig(**fields)


def test_the_largest_hash_is_in_the_last_fold():
    top = np.array([2**64 - 1], np.uint64)
    assert Cut("validation", 0.0, 0.0, (4, 5)).keep(top, top).all()
    assert Cut("train", 0.5, 0.4, (0, 0)).keep(top, top).all()


def test_a_subset_is_those_records():
    subset = splits.Subset("abcdef", np.array([4, 1]))
    assert len(subset) == 2 and [subset[0], subset[1]] == ["e", "b"]
