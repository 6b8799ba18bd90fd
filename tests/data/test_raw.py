"""Tar shards and parquet: the same rows as from a folder, damage counted, splits, clean rules."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdjax.data import transforms
from sdjax.data.builders.raw_import import prepare, read_skipped
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Example, Rules, ScoreRule, clean, clean_captions
from sdjax.data.raw.rows import BadRow, Fields, Row, Skip, split_of
from sdjax.data.sources import DataConfig, DataError, open_source
from tests.odd_names import ODD

SHARED = os.environ.get("SDJAX_TEST_DATA", "")
needs_shared = pytest.mark.skipif(not SHARED, reason="SDJAX_TEST_DATA is not set")


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def grey(number, size=(24, 20)):
    return encoded(Image.new("RGB", size, (number, number, number)))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def outcomes(path, format, fields=None, rules=None):
    """{name: caption, or reason of the skip} in order."""
    fields = fields or Fields()
    found = {}
    for shard in formats.list_shards(str(path), format, fields):
        for item in formats.read(shard, fields):
            item = clean(item, rules or Rules()) if isinstance(item, Row) else item
            found[item.name] = item.reason if isinstance(item, Skip) else item.text
    return found


def by_index(source):
    return {int(source[i]["image"][0, 0, 0]): source[i]["text"] for i in range(len(source))}


def test_tar_and_parquet_give_what_was_put_in(tmp_path):
    members, rows = [], []
    for n in range(8):
        members += [(f"{n:03}.png", grey(n)), (f"{n:03}.txt", f"number {n}\n".encode()),
                    (f"{n:03}.json", json.dumps({"captions": ["other"]}).encode())]  # fmt: skip
        rows.append({"image": {"bytes": grey(n), "path": f"{n}.png"}, "text": f"number {n}",
                     "captions": ["other"]})  # fmt: skip
    write_tar(tmp_path / "w" / "train-00000.tar", members[:15])
    write_tar(tmp_path / "w" / "train-00001.tar", members[15:21])
    write_tar(tmp_path / "w" / "val-00000.tar", members[21:])
    write_parquet(tmp_path / "p" / "data" / "train-00000-of-00001.parquet", rows[:7])
    write_parquet(tmp_path / "p" / "data" / "validation-00000-of-00001.parquet", rows[7:])
    for name, path in (("webdataset", "w"), ("parquet", "p")):
        config = DataConfig(name=name, path=str(tmp_path / path), data_dir=str(tmp_path / "t"))
        train, val = open_source(config, "train"), open_source(config, "validation")
        assert by_index(train) == {n: f"number {n}" for n in range(7)}
        assert by_index(val) == {7: "number 7"}
        assert list(train._records[0]["captions"]) == [b"other"]
        assert train._records[0]["image"] == grey(0)
        assert (train._records[0]["width"], train._records[0]["height"]) == (24, 20)
        assert prepare(config).data_dir == prepare(config).data_dir


def test_all_of_a_source_without_splits_is_in_train_or_test(tmp_path):
    members = [(f"{n}.png", grey(n)) for n in range(60)]
    texts = [(f"{n}.txt", b"%d" % n) for n in range(60) if n != 9]
    ordered = sorted(members + texts, key=lambda m: (int(m[0].split(".")[0]), m[0]))
    write_tar(tmp_path / "w" / "a.tar", ordered[:59])
    write_tar(tmp_path / "w" / "b.tar", ordered[59:])
    config = DataConfig(name="webdataset", path=str(tmp_path / "w"), data_dir=str(tmp_path / "t"))
    train, test = by_index(open_source(config, "train")), by_index(open_source(config, "test"))
    assert not set(train) & set(test) and 1 <= len(test) <= 6
    assert set(train) | set(test) == set(range(60)) - {9}
    assert [skip.reason for skip in read_skipped(prepare(config))] == ["no_caption"]


def test_a_broken_tar_gives_what_lies_before_the_break(tmp_path):
    members = [m for n in range(5) for m in ((f"{n}.png", grey(n)), (f"{n}.txt", b"%d" % n))]
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    assert list(outcomes(tmp_path / "a.tar", "webdataset").values()) == list("01234")
    block = 512
    # Cut in a header, in a member's content, and between members; then garbage for a header.
    for at, left in ((6 * 1024 + 9, "012"), (6 * 1024 + block + 9, "012"), (8 * 1024, "0123")):
        (tmp_path / "cut.tar").write_bytes(whole[:at])
        found = outcomes(tmp_path / "cut.tar", "webdataset")
        assert found.pop("cut.tar") == "bad_shard"
        assert "".join(found.values()) == left
    (tmp_path / "cut.tar").write_bytes(whole[: 8 * 1024] + b"x" * block + whole[8 * 1024 + block :])
    found = outcomes(tmp_path / "cut.tar", "webdataset")
    assert list(found.values()) == [*"0123", "bad_shard"]


def test_odd_members_of_a_tar(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("README", b"x"), ("__MACOSX/._a.png", b"x"), ("d.ir/a.b.png", grey(1)),
            ("d.ir/a.PNG", grey(2)), ("d.ir/a.json", b'{"caption": "two"}'),
            ("b.txt", b"alone"), ("c.png", grey(3)), ("c.txt", b"caf\xe9"),
            ("d.png", grey(4)), ("d.txt", b"four"), ("d.json", b"{"),
            ("c.png", grey(5)), ("c.txt", b"again"), ("e.png", grey(6)),
        ],
    )  # fmt: skip
    assert outcomes(tmp_path / "a.tar", "webdataset") == {
        "a.tar/d.ir/a.PNG": "two",
        "a.tar/b.txt": "missing_image",
        "a.tar/c.png": "bad_encoding",
        "a.tar/d.png": "four",
        "a.tar/c.png#2": "again",
        "a.tar/e.png": "no_caption",
    }
    fields = Fields(text="caption")
    assert outcomes(tmp_path / "a.tar", "webdataset", fields)["a.tar/d.png"] == "no_caption"


def test_parquet_columns(tmp_path):
    rows = [{"photo": grey(n), "caption": [f"{n}", "more"], "score": n / 4} for n in range(5)]
    rows[3]["score"] = None
    write_parquet(tmp_path / "a.parquet", rows)
    fields = Fields(image="photo", text="caption", columns=("score",))
    rules = Rules(scores=(ScoreRule("score", low=0.25, high=0.5),))
    assert outcomes(tmp_path, "parquet", fields, rules) == {
        "a.parquet/0": "score", "a.parquet/1": "1", "a.parquet/2": "2",
        "a.parquet/3": "no_score", "a.parquet/4": "score",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"columns \['photo', .*data.image_key is 'image'"):
        formats.list_shards(str(tmp_path), "parquet", Fields())
    with pytest.raises(DataError, match="no file that ends in .tar"):
        formats.list_shards(str(tmp_path), "webdataset", Fields())
    assert formats.detect(str(tmp_path)) == "parquet"


def test_splits_that_names_say():
    assert split_of("data/train-00000-of-00002.parquet") == "train"
    assert split_of("val_3.tar") == "validation" and split_of("Test/00000.tar") == "test"
    assert split_of("testing-ground.tar") == split_of("00000.tar") == "train"


def test_caption_rules():
    assert clean_captions(" a\n b\u200b", None, Rules()) == ("a b", (), ("caption_spaces",))
    assert clean_captions("a b\n", None, Rules()) == ("a b", (), ())  # the end of a file
    assert clean_captions(" a\n b", None, Rules(collapse_spaces=False))[0] == " a\n b"
    assert clean_captions("a &amp; b\x07", "a", Rules(unescape_html=True, strip_control=True)) == (
        "a & b", ("a",), ("caption_html", "caption_control"))  # fmt: skip
    for text in (None, [], b"", " \u200b \n"):
        assert clean_captions(text, ["", "b"], Rules(min_caption_chars=0)) == ("", ("b",), ())
    for text, rules, reason in (
        ("ab", Rules(min_caption_chars=3), "caption_too_short"),
        ("abcd", Rules(max_caption_chars=3), "caption_too_long"),
        ("buy now!", Rules(drop_pattern="(?i)BUY"), "caption_pattern"),
        (["", "b"], Rules(), "no_caption"),
    ):
        with pytest.raises(BadRow) as caught:
            clean_captions(text, None, rules)
        assert caught.value.reason == reason


def test_transparency_lies_on_the_background():
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    row = Row("a", "train", encoded(image), "a")
    found = clean(row, Rules(background=(0, 255, 0)))
    assert isinstance(found, Example)
    stored = np.asarray(Image.open(io.BytesIO(found.image)))
    assert (stored == found.pixels).all() and stored.shape == (20, 20, 3)
    assert (stored[:, :10] == (0, 0, 255)).all() and (stored[:, 10:] == (0, 255, 0)).all()


def cleaned(image, kind="PNG", rules=None, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return clean(Row("a", "train", buffer.getvalue(), "a"), rules or Rules()), buffer.getvalue()


@pytest.mark.parametrize(
    "mode, words",
    [
        ("RGB", ()), ("L", ("grey",)), ("1", ("grey",)), ("P", ("palette",)),
        ("LA", ("transparency", "grey")), ("RGBA", ("transparency",)), ("I;16", ("16_bit",)),
    ],
)  # fmt: skip
def test_colour_modes_are_converted_and_counted_or_dropped(mode, words):
    found, encoded = cleaned(Image.new("L", (20, 20), 7).convert(mode))
    assert found.changed == ((*words, "stored_as_png") if words else ())
    assert found.pixels.shape == (20, 20, 3) and found.pixels.dtype == np.uint8
    assert (found.image == encoded) == (mode == "RGB")
    found, _ = cleaned(Image.new("L", (20, 20), 7).convert(mode), rules=Rules(convert_modes=False))
    if words:
        assert found == Skip("a", "colour_mode", " and ".join(words))
    else:
        assert found.image == encoded


def test_a_tiff_or_an_animation_is_no_other_colour_mode():
    frames = [Image.new("RGB", (20, 20), (n, 0, 0)) for n in (10, 200)]
    found, _ = cleaned(frames[0], "TIFF", Rules(convert_modes=False))
    assert found.changed == ("stored_as_png",)
    found, _ = cleaned(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert found.changed == ("first_frame", "stored_as_png") and (found.pixels[..., 0] == 10).all()


def test_orientation_is_applied_or_not():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for orientation, shape, plain in ((6, (30, 20, 3), False), (1, (20, 30, 3), True),
                                      (99, (20, 30, 3), True)):  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        found, encoded = cleaned(image, "JPEG", exif=exif)
        assert found.pixels.shape == shape
        assert (found.image == encoded) == plain == ("turned_upright" not in found.changed)
        found, _ = cleaned(image, "JPEG", Rules(orient=False), exif=exif)
        assert found.pixels.shape == (20, 30, 3) and "turned_upright" not in found.changed
        stored = transforms.decode(found.image)  # what training reads
        np.testing.assert_array_equal(stored, found.pixels)


@needs_shared
def test_dirty_shards():
    """Each sample of the broken shards is used or skipped as the manifest says."""
    folder = Path(SHARED) / "dirty"
    tars = outcomes(folder, "webdataset")
    first = {name.split("/", 1)[1]: v for name, v in tars.items() if name.startswith("dirty")}
    assert first == {
        "000.jpg": "a stone building", "001.jpg": "a red door", "002.txt": "missing_image",
        "003.jpg": "empty_file", "004.png": "a jpeg called png", "005.jpg": "bad_encoding",
        "006.jpg": "a boat", "000.jpg#2": "same key again", "007.jpg": "houses",
        "sub/dir.with.dots/009.jpg": "caps on a wall",
    }  # fmt: skip
    cut = {name: v for name, v in tars.items() if name.startswith("truncated")}
    assert cut.pop("truncated-00001.tar") == "bad_shard" and len(cut) == 7
    assert tars["empty-00002.tar"] == "bad_shard"
    assert not any(name.startswith("no_samples") for name in tars)
    assert list(outcomes(folder, "parquet").values()) == [
        "a stone building", "missing_image", "missing_image", "empty_file", "truncated",
        "no_caption", "no_caption", "bad_shard",
    ]  # fmt: skip
