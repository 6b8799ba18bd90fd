"""What hosts compare before they train together, with one of them made up."""

import dataclasses
import json

import pytest

from sdjax.data.config import DataConfig
from sdjax.data.pipeline import make_iterator
from sdjax.errors import UserError
from sdjax.parallel import hosts
from sdjax.train.agreement import check_data


@pytest.fixture
def data(shapes_dir):
    """A function: split, fields of the buckets -> (state, lines) of a host."""
    config = DataConfig(
        data_dir=str(shapes_dir), resolution=16, batch_size=8, shapes_train=40, shapes_test=8
    )

    def found(split, **buckets):
        group = dataclasses.replace(config.buckets, **buckets)
        own = dataclasses.replace(config, buckets=group)
        iterator = make_iterator(own, {}, split=split, seed=0)
        return iterator.get_state(), iterator.summary.lines

    return found


def test_hosts_with_other_data_do_not_start(data, monkeypatch):
    first = data("train")
    sent = json.dumps({**first[0], "summary": first[1]})
    monkeypatch.setattr(hosts, "from_first", lambda name, value: sent)
    check_data(*data("train"))
    with pytest.raises(UserError, match="(?s)examples: 40 there, 8 here.*rsync"):
        check_data(*data("test"))
    with pytest.raises(UserError, match="(?s)buckets.*summary: .* there, .*bucket.* here"):
        check_data(*data("train", step=4))


def test_alone_there_is_nobody_to_differ_from(data):
    check_data(*data("train"))
