"""The view that looks at data: what it shows, what it refuses, and captions that are mended."""

import json
import threading

import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdjax.data.config import DataError
from sdjax.data.raw import mended
from sdjax.errors import UserError
from sdjax.system import paths
from sdjax.web.look.captions import MendedCaptions
from sdjax.web.look.collection import Collection
from sdjax.web.look.pages import Look
from sdjax.web.server.fields import Limits
from sdjax.web.server.site import Place, make_site

TOKEN = "0123456789abcdef"
NASTY = "<script>window.hacked = 1</script>"
CAPTIONS = ["a red circle", "a blue square", f"a reddish star {NASTY}", "a shuttered window"]


@pytest.fixture
def data(tmp_path):
    """Pictures with metadata.jsonl, one of which is no picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (64 + 32 * i, 64), (40 * i, 0, 99)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    (folder / "broken.png").write_bytes(b"no picture")
    rows.append({"file_name": "broken.png", "text": "broken"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_look(data, captions=None, *, token="", more=()):
    names = {"data": data, **{folder.name: folder for folder in more}}
    sets = {name: Collection(name, paths.to_path(folder)) for name, folder in names.items()}
    store = MendedCaptions(paths.to_path(captions), [paths.to_path(data)]) if captions else None
    look = Look(sets, store, bool(token), [Place("Look", "/look")])
    hosts = () if token else ("localhost", "127.0.0.1", "testserver")
    return make_site(look.routes(), Limits(rate=10**6), token=token, hosts=hosts)


@pytest.fixture
def client(data):
    return TestClient(make_look(data), raise_server_exceptions=False)


def items(client, **asked):
    return client.get("/look/items", params={"set": "data", **asked}).json()


def test_pictures_and_captions_of_a_folder(client):
    found = items(client)
    assert [one["caption"] for one in found["items"]] == [*CAPTIONS, "broken"]
    assert found["total"] == found["all"] == 5 and found["splits"] == {"train": 5}
    answer = client.get("/look/picture", params={"set": "data", "number": 3, "side": 256})
    assert answer.headers["content-type"] == "image/webp"
    assert "max-age" in answer.headers["cache-control"]
    (data_of,) = [answer.content]
    assert data_of[8:12] == b"WEBP"


def test_captions_beside_the_pictures_are_read(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("beside\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    found = items(TestClient(make_look(tmp_path)))
    assert [(one["name"], one["caption"]) for one in found["items"]] == [
        ("a.png", "beside"),
        ("b.png", ""),
    ]


@pytest.mark.parametrize(
    "words, numbers",
    [
        ("red", [0, 2]),
        ("RED circle", [0]),
        ("red -star", [0]),
        ("-a", [4]),
        ("3.png", [3]),
        ("[", []),
    ],
)
def test_words_filter(client, words, numbers):
    assert [one["number"] for one in items(client, words=words)["items"]] == numbers


def test_pages_follow_one_another(client, monkeypatch):
    monkeypatch.setattr("sdjax.web.look.pages.PAGE", 2)
    pages = [[one["number"] for one in items(client, **{"from": i})["items"]] for i in (0, 2, 4, 6)]
    assert pages == [[0, 1], [2, 3], [4], []]


def test_a_picture_that_cannot_be_read_is_told_in_words(client):
    answer = client.get("/look/picture", params={"set": "data", "number": 4})
    assert answer.status_code == 422 and "not_an_image" in answer.json()["detail"]


@pytest.mark.parametrize(
    "asked",
    [
        {"set": "../data", "number": "0"},
        {"set": "data", "number": "-1"},
        {"set": "data", "number": "99"},
        {"set": "data", "number": "../0.png"},
        {"set": "data", "number": "0", "side": "100000"},
    ],
)
def test_no_request_names_a_file_or_a_large_size(client, asked):
    answer = client.get("/look/picture", params=asked)
    assert answer.status_code == 422 and "Traceback" not in answer.text


def test_links_that_lead_out_are_not_followed(data, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    (data / "0.png").unlink()
    (data / "0.png").symlink_to(tmp_path / "secret.png")
    answer = TestClient(make_look(data)).get("/look/picture?set=data&number=0")
    assert answer.status_code == 422 and "leads_outside" in answer.json()["detail"]


def test_buckets_of_the_pictures(client):
    asked = {"set": "data", "resolution": 64, "step": 16}
    found = client.get("/look/buckets", params=asked).json()
    counts = {(row["width"], row["height"]): row["count"] for row in found["rows"]}
    assert sum(counts.values()) == 4 and counts[64, 64] == 1
    assert found["refused"] == {"unreadable": 1} and found["read"] == 5
    for wrong in ({"resolution": 10**6}, {"step": 0}, {"step": "x"}):
        answer = client.get("/look/buckets", params=asked | wrong)
        assert answer.status_code == 422


def test_duplicates_are_those_that_prepare_left_out(data, tmp_path):
    assert TestClient(make_look(data)).get("/look/duplicates?set=data").json() is None
    rows = [
        {"name": "1.png", "reason": "near_duplicate", "detail": "of 0.png"},
        {"name": "gone.png", "reason": "duplicate", "detail": "of 2.png"},
        {"name": "broken.png", "reason": "not_an_image", "detail": NASTY},
    ]
    (data / "dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = TestClient(make_look(data)).get("/look/duplicates?set=data").json()
    assert found["counts"]["not_an_image"] == 1 and found["others"][0]["name"] == "broken.png"
    first, second = found["pairs"]
    assert [one and one["number"] for one in first["pictures"]] == [1, 0]
    assert [one and one["number"] for one in second["pictures"]] == [None, 2]
    (data / "dropped.jsonl").write_text("{")
    assert TestClient(make_look(data)).get("/look/duplicates?set=data").status_code == 422


def mend(client, caption, *, number=0, before=CAPTIONS[0]):
    body = {"set": "data", "number": number, "caption": caption, "before": before}
    return client.post("/look/caption", json=body)


def test_captions_are_mended_by_token_into_a_new_file(data, tmp_path):
    file, before = tmp_path / "mended.jsonl", (data / "metadata.jsonl").read_bytes()
    client = TestClient(make_look(data, file, token=TOKEN))
    assert mend(client, "x").status_code == 401
    client.headers["authorization"] = f"Bearer {TOKEN}"
    answer = mend(client, "  a large\n red circle ")
    assert answer.json() == {"caption": "a large red circle", "mended": True, "count": 1}
    assert json.loads(file.read_text()) == {"file_name": "0.png", "text": "a large red circle"}
    assert (data / "metadata.jsonl").read_bytes() == before
    assert items(client, words="large")["items"][0]["mended"]
    again = TestClient(make_look(data, file, token=TOKEN), headers=client.headers)
    assert items(again)["items"][0]["caption"] == "a large red circle"
    late = mend(again, "another", before=CAPTIONS[0])
    assert late.status_code == 422 and "somebody else" in late.json()["detail"]
    assert mend(again, CAPTIONS[0], before="a large red circle").json()["count"] == 0
    assert file.read_text() == ""
    for wrong in ({"number": 99}, {"number": "x"}):
        assert mend(client, "y", **wrong).status_code == 422
    assert mend(client, "y" * 250_000).status_code == 422


def test_without_token_or_file_nothing_is_mended(data, tmp_path):
    for options in ({}, {"captions": tmp_path / "c.jsonl"}, {"token": TOKEN}):
        client = TestClient(
            make_look(data, **options), headers={"authorization": f"Bearer {TOKEN}"}
        )
        answer = mend(client, "x")
        assert answer.status_code == 403 and "token" in answer.json()["detail"], options
    assert not (tmp_path / "c.jsonl").exists()


def test_the_file_lies_outside_of_the_data(data, tmp_path):
    (tmp_path / "way").symlink_to(data)
    for file in (data / "new.jsonl", data / "metadata.jsonl", tmp_path / "way" / "x.jsonl"):
        with pytest.raises(UserError, match="elsewhere"):
            make_look(data, file)
    with pytest.raises(UserError, match="make it first"):
        make_look(data, tmp_path / "no" / "x.jsonl")
    (tmp_path / "other.jsonl").write_text('{"file_name": 3}\n')
    with pytest.raises(DataError, match="line 1: expected"):
        make_look(data, tmp_path / "other.jsonl")


def test_many_mend_at_once_and_none_is_lost(data, tmp_path):
    store = MendedCaptions(paths.to_path(tmp_path / "c.jsonl"), [paths.to_path(data)])
    threads = [
        threading.Thread(target=store.set, args=(f"{i}.png", f"caption {i}"),
                         kwargs={"before": "", "stored": ""})
        for i in range(20)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = mended.read(paths.to_path(tmp_path / "c.jsonl"))
    assert found == {f"{i}.png": f"caption {i}" for i in range(20)}


def test_a_failed_write_leaves_the_old_file_whole(data, tmp_path, monkeypatch):
    file = tmp_path / "c.jsonl"
    store = MendedCaptions(paths.to_path(file), [paths.to_path(data)])
    store.set("0.png", "first", before="", stored="")
    monkeypatch.setattr(mended.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="full|space"):
        store.set("0.png", "second", before="first", stored="")
    assert mended.read(paths.to_path(file)) == {"0.png": "first"}
    assert store.get("0.png", "") == "first"
