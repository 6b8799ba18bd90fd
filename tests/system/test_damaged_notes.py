"""Notes that a verb leaves in its folder for the next start, damaged or of a stranger."""

import dataclasses
import os
import types

import pytest

from sdjax.checkpoints.checkpoint import CheckpointError, read_config
from sdjax.data.builders import raw_import
from sdjax.data.prepare import cleaning, index, pipeline
from sdjax.data.prepare.settings import Workspace
from sdjax.encoding import dataset
from sdjax.errors import UserError
from sdjax.improving import judging, rounds
from sdjax.sampling import drawing
from sdjax.system import paths
from sdjax.train import rollback


@dataclasses.dataclass
class Settings:
    dtype: str = "float32"


# {file in the folder: what reads it}
READERS = {
    drawing.SETTINGS: lambda folder: drawing._begin(folder, {"seed": 0}),
    "started.json": lambda folder: dataset._begin(
        folder, Settings(), types.SimpleNamespace(shard_examples=10)
    ),
    pipeline.STATE: lambda folder: pipeline._begin(Workspace(str(folder)), "key"),
    rollback.FILE: rollback.read,
    "work/clean-00000.json": lambda folder: index.read_index(Workspace(str(folder)), 0),
    "work/pairs/0.json": lambda folder: pipeline._pairs(folder / "work/pairs/0.json"),
    "judge.jsonl": lambda folder: judging.remembered(folder / "judge.jsonl", list),
    "limit.json": lambda folder: rounds._limit(folder / "limit.json"),
    "material.json": lambda folder: rounds._said(folder / "material.json"),
    "shard.json": lambda folder: dataset._noted(folder / "shard.json"),
    raw_import.SKIP_REPORT: lambda folder: raw_import.read_skipped(
        types.SimpleNamespace(data_path=folder)
    ),
}
DAMAGED = (
    b"", b"3", b"null", b'"a"', b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000 + b"1",
    b'[{"step": 1, "first": 0, "batch": "2"}]', b"9" * 5000,
    b'{"a": ' + b"9" * 5000 + b"}", b'{"' + b"a" * 100_000 + b'": 1}',
    b'{"a": 1, ' + b",".join(b'"%d": [[]]' % i for i in range(10_000)) + b"}",
)  # fmt: skip


# Verdicts of no prompts, and a limit of 3.
RIGHT = {("judge.jsonl", b""), ("limit.json", b"3")}


@pytest.mark.parametrize(
    "name, content", [(n, c) for n in READERS for c in DAMAGED if (n, c) not in RIGHT],
    ids=lambda value: value[:12].decode("latin-1") if isinstance(value, bytes) else value,
)  # fmt: skip
def test_a_damaged_note_is_named_in_a_short_message(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        READERS[name](paths.to_path(tmp_path))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 6000


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_place_of_a_note_is_not_waited_for(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="pipe"):
        READERS[name](paths.to_path(tmp_path))


@pytest.mark.parametrize("content", [c for c in DAMAGED if not c.startswith(b'{"a": 1')][:11])
def test_a_damaged_configuration_of_a_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "checkpoints" / "3" / "config" / "metadata"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(file.parents[1]) in str(caught.value) and len(str(caught.value)) < 6000


def test_a_damaged_note_of_how_far_a_shard_is_counts_as_nothing(tmp_path):
    workspace = Workspace(str(tmp_path))
    workspace.work.mkdir()
    for number, content in enumerate((b"0.5", b"", b"\xff", b"x", b"9" * 1000, b"nan", b"-1")):
        workspace.part(number).write_bytes(content)
    assert cleaning.how_far(workspace, list(range(7)))() == 0.5
