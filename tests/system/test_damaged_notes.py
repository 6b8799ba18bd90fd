"""Notes that a verb leaves in its folder for the next start, damaged or of a stranger."""

import dataclasses
import os
import types

import pytest

from sdjax.data.prepare import pipeline
from sdjax.data.prepare.settings import Workspace
from sdjax.encoding import dataset
from sdjax.errors import UserError
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
}
DAMAGED = (
    b"", b"3", b"null", b'"a"', b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000 + b"1",
    b'[{"step": 1, "first": 0, "batch": "2"}]', b"9" * 5000,
    b'{"a": ' + b"9" * 5000 + b"}", b'{"' + b"a" * 100_000 + b'": 1}',
    b'{"a": 1, ' + b",".join(b'"%d": [[]]' % i for i in range(10_000)) + b"}",
)  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:12].decode("latin-1"))
def test_a_damaged_note_is_named_in_a_short_message(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        READERS[name](paths.to_path(tmp_path))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 6000


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_place_of_a_note_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="pipe"):
        READERS[name](paths.to_path(tmp_path))
