"""Pictures that can be rated take bounded memory; what a full disk makes of a rating."""

import asyncio
import json

import numpy as np
import pytest
from starlette.requests import Request

from sdjax.diffusion.grids import SamplerConfig
from sdjax.errors import WriteError
from sdjax.system import paths
from sdjax.web.server import app
from sdjax.web.server import ratings as module
from sdjax.web.server.ratings import RatingStore
from sdjax.web.server.requests import InvalidRequest, PictureRequest


def request(pixels=0):
    image = np.zeros((pixels, 1, 3), np.uint8) if pixels else None
    return PictureRequest("a circle", "", 1, 8, 8, SamplerConfig(), 3.0, image=image)


def test_only_so_many_bytes_of_pictures_can_be_rated(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 3000)
    store = RatingStore(paths.to_path(tmp_path), "0" * 64)
    names = [store.show(request(300), b"%0100d" % i) for i in range(4)]  # 1,000 bytes each
    with pytest.raises(InvalidRequest, match="expected one of the last"):
        store.rate(names[0], 1)
    for name in names[1:]:
        store.rate(name, 1)
    large = store.show(request(), b"x" * 5000)  # the last one stays, whatever its size
    store.rate(large, -1)
    with pytest.raises(InvalidRequest):
        store.rate(names[3], 1)
    assert len((tmp_path / "ratings.jsonl").read_bytes().splitlines()) == 4


def test_a_rating_that_cannot_be_written_is_507_in_words(tmp_path):
    store = RatingStore(paths.to_path(tmp_path), "0" * 64)
    name = store.show(request(), b"picture")
    (tmp_path / "ratings.jsonl").mkdir()
    with pytest.raises(WriteError, match="ratings.jsonl cannot be written") as caught:
        store.rate(name, 1)
    scope = {"type": "http", "path": "/rate", "headers": [], "query_string": b"", "scheme": "http",
             "server": ("localhost", 80)}  # fmt: skip
    answer = asyncio.run(app._refused(Request(scope), caught.value))
    assert answer.status_code == 507
    assert "cannot be written" in json.loads(bytes(answer.body))["detail"]
    (tmp_path / "ratings.jsonl").rmdir()
    store.rate(name, 1)
    assert (tmp_path / "ratings.jsonl").read_text().count("\n") == 1
