"""The view that looks at data, of what `sdjax.prepare` wrote from tars and from parquet."""

import io

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdjax.data.prepare.settings import Workspace
from tests.data.test_prepare import picture, settings
from tests.data.test_raw import encoded, write_parquet, write_tar
from tests.web.look.test_look import items, make_look

COUNT = 8


@pytest.fixture(scope="module", params=["webdataset", "parquet"])
def prepared(request, tmp_path_factory):
    """Eight pictures, tall and wide in turn; the first of them again, and a broken one, are out."""
    pytest.importorskip("apache_beam")
    from sdjax.data.prepare import pipeline

    folder = tmp_path_factory.mktemp(request.param)
    sizes = [(96, 64), (64, 96)] * (COUNT // 2)
    files = [encoded(picture(i, size)) for i, size in enumerate(sizes)]
    rows = [(file, f"picture {i}") for i, file in enumerate([*files, files[0], b"no picture"])]
    if request.param == "webdataset":
        members = [
            (f"{i:03d}.{kind}", data)
            for i, (file, caption) in enumerate(rows)
            for kind, data in (("png", file), ("txt", caption.encode()))
        ]
        write_tar(folder / "in" / "0.tar", members)
    else:
        made = [{"image": {"bytes": file, "path": None}, "text": text} for file, text in rows]
        write_parquet(folder / "in" / "0.parquet", made)
    chosen = settings(request.param, test_share=0.3)
    pipeline.run(str(folder / "in"), chosen, Workspace(str(folder / "out")), workers=1)
    return folder / "out"


@pytest.fixture
def client(prepared):
    view = make_look(prepared)
    return TestClient(view, raise_server_exceptions=False)


def test_prepared_pictures_are_shown_with_captions_and_splits(client):
    found = items(client)
    assert sorted(one["caption"] for one in found["items"]) == [
        f"picture {i}" for i in range(COUNT)
    ]
    assert sum(found["splits"].values()) == found["all"] == COUNT
    assert found["splits"]["test"] == items(client, split="test")["total"] > 0
    for one in items(client, words="5")["items"]:
        asked = {"set": "data", "number": one["number"], "side": 256}
        shown = Image.open(io.BytesIO(client.get("/look/picture", params=asked).content))
        assert one["caption"] == "picture 5" and shown.size == (64, 96)
        wanted = np.asarray(picture(5, (64, 96)), float)
        assert np.abs(np.asarray(shown, float) - wanted).mean() < 12  # WebP loses a little


def test_prepared_pictures_are_sorted_into_buckets(client):
    asked = {"set": "data", "resolution": 64, "step": 16}
    rows = client.get("/look/buckets", params=asked).json()["rows"]
    assert sum(row["count"] for row in rows) == COUNT
    assert {row["width"] > row["height"] for row in rows if row["count"]} == {True, False}


def test_what_prepare_left_out_is_shown_beside_what_it_kept(client):
    found = client.get("/look/duplicates", params={"set": "data"}).json()
    assert found["counts"] == {"duplicate": 1, "not_an_image": 1}
    ((_, kept),) = [pair["pictures"] for pair in found["pairs"]]
    shown = items(client)["items"][kept["number"]]
    assert shown["caption"] in ("picture 0", "picture 8")
