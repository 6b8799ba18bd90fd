"""The page of the report without a browser, and the verb: whole, escaped, whatever is missing."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from jinja2 import StrictUndefined

from sdjax.report import main
from sdjax.sampling.grids import save_png
from sdjax.web import templating
from sdjax.web.report import figures
from sdjax.web.report.data import DataReport
from sdjax.web.report.page import write_report
from tests.fake_gcs import FakeGCS
from tests.odd_names import ODD
from tests.web.report_workdir import NASTY, lines, make_lines, make_workdir

WEB = Path(templating.__file__).parent


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with everything in it. Do not write into it."""
    return make_workdir(tmp_path_factory.mktemp("report") / ODD / "run")


@pytest.fixture(scope="module")
def page(workdir, tmp_path_factory):
    """Its report."""
    return write_report(workdir, tmp_path_factory.mktemp("page") / "x.html").read_text()


# ---- the page --------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if not self._inside:
            self.words.append(data)


def test_what_comes_from_files_stays_text(page):
    """NASTY is in captions, config values, metric names, warnings and the data report."""
    found = Elements(page)
    assert sum(tag == "script" for tag, _ in found.tags) == 2  # plotly, our own
    assert all(a.get("src", "").startswith("data:image/") for t, a in found.tags if t == "img")
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert sum(NASTY in words for words in found.words) > 6
    assert NASTY not in page


def test_templates_escape_all_but_our_own_style_and_scripts():
    environment = templating.environment()
    assert environment.autoescape is True and environment.undefined is StrictUndefined
    templates = [file.read_text() for file in sorted(WEB.rglob("*.html"))]
    unescaped = [text for t in templates for text in re.findall(r"(\w+) \|\s*safe\b", t)]
    assert len(templates) > 2 and set(unescaped) == {"style", "script"}
    assert not any("autoescape" in text for text in templates)


def test_no_python_file_of_the_room_holds_markup():
    for file in WEB.rglob("*.py"):
        assert not re.search(r"</|<\w+[^>\n]*>|Markup", file.read_text()), file


def test_the_page_names_nothing_to_load(page):
    found = Elements(page)
    for tag, attrs in found.tags:
        for name in {"src", "href", "action", "srcset", "data"} & set(attrs):
            value = attrs[name]
            assert value.startswith(("data:", "#")) or (tag, name) == ("a", "href"), (tag, attrs)
    assert [a["href"] for t, a in found.tags if t == "a" and a["href"][0] != "#"] != []
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "connect-src" not in policy
    assert len(page) < 15e6


def test_the_page_is_outlined_and_its_pictures_described(page):
    found = Elements(page)
    levels = [int(t[1]) for t, _ in found.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("alt") for tag, attrs in found.tags if tag == "img")
    plots = [a for t, a in found.tags if a.get("class") == "plot"]
    assert len(plots) > 15 and all(len(a["aria-label"]) > 20 for a in plots)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for t, a in found.tags if t == "a" and a["href"][0] == "#")


PARTS = ["config.json", "metrics.jsonl", "samples", "evaluations"]


@pytest.mark.parametrize("kept", [[], *([part] for part in PARTS)], ids=lambda kept: "".join(kept))
def test_each_part_may_be_missing(workdir, tmp_path, kept):
    for name in kept:
        source = workdir / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    found = Elements(write_report(tmp_path).read_text())
    words = " ".join(found.words)
    assert "cannot be read" not in words and "could not be made" not in words
    assert ("0 of" in words or "4,000" in words) if "metrics.jsonl" in kept else True


@pytest.mark.parametrize(
    "name",
    ["config.json", "checkpoints/5/state/_METADATA", "frozen.safetensors", "frozen.json"],
)
def test_damaged_files_are_named_and_the_rest_is_shown(workdir, tmp_path, name):
    shutil.copy(workdir / "metrics.jsonl", tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("[}")
    words = " ".join(Elements(write_report(tmp_path).read_text()).words)
    assert "config.json and checkpoints: " in words and "Gradient norm" in words


@pytest.mark.parametrize(
    ("owner", "name", "kept"),
    [(DataReport, "counts", "Gradient norm"), (figures, "sections", "To train it again")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [KeyError, AttributeError])
def test_a_chapter_that_fails_leaves_the_others(
    owner, name, kept, kind, workdir, tmp_path, monkeypatch
):
    """Jinja2 takes an AttributeError for a name that is not there, if it lets it."""

    def fail(*_):
        raise kind("nobody foresaw this")

    monkeypatch.setattr(owner, name, fail)
    text = unescape(write_report(workdir, tmp_path / "x.html").read_text())
    assert "This part could not be made" in text and kept in text
    assert re.search(f"{kind.__name__}: '?nobody foresaw this", text)


def test_what_a_run_counts_of_its_data_is_a_table(tmp_path):
    row = {"step": 0, "data/bucket_64x96": 1234, "data/cropped_share": 0.0625}
    (tmp_path / "metrics.jsonl").write_bytes(lines(row, {"step": 1, "train/loss": 1}))
    words = Elements(write_report(tmp_path).read_text()).words
    assert words[words.index("bucket 64x96") + 1] == "1,234"
    assert words[words.index("cropped share") + 1] == "0.0625"


def test_a_long_run_makes_no_large_page(tmp_path):
    rows = make_lines(200)
    for i in range(100):  # 20,000 lines
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(lines(*(row | {"step": row["step"] + 2000 * i} for row in rows)))
    report = write_report(tmp_path)
    assert "Thinned from 20,000" in report.read_text() and report.stat().length < 8e6


# ---- the verb --------------------------------------------------------------------------------


def test_the_verb_writes_where_it_is_told(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "a.html"
    assert main([f"--workdir={workdir}", f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_text().startswith("<!doctype html>")
    link = re.search(r'href="([^"]*report\.html)"', output.read_text())[1]
    file = urlsplit(urljoin(output.as_uri(), unescape(link))).path
    assert Path(unquote(file)) == workdir.parent / "data" / "report.html"
    command = re.search(r"<code>(.*--workdir=.*)</code>", output.read_text())[1]
    assert shlex.split(unescape(command)) == [f"--workdir={workdir}"]
    assert output.read_text().count("data:image/webp") > 6


def test_the_verb_tells_what_is_wrong(workdir, tmp_path, capsys):
    assert main([f"--workdir={tmp_path / 'none'}"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main([f"--workdir={tmp_path}"]) == 2
    assert "neither config.json nor metrics.jsonl" in capsys.readouterr().err
    assert main([f"--workdir={workdir}", f"--output={tmp_path}"]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([f"--workdir={workdir}", f"--output={tmp_path / 'file' / 'x.html'}"]) == 2
    assert "cannot be made" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "gs://" in capsys.readouterr().out


IN_A_BUCKET = """
from sdjax.report import main
assert main(["--workdir=gs://bucket/runs/a"]) == 0
assert main(["--workdir=gs://bucket/runs/a", "--output=gs://bucket/pages/a.html"]) == 0
assert main(["--workdir=gs://bucket/runs/none"]) == 2
assert main(["--workdir=gs://none/runs"]) == 2
"""


def test_a_run_in_a_bucket(workdir, tmp_path):
    with FakeGCS(tmp_path, "bucket") as gcs:
        for file in workdir.rglob("*"):
            if file.is_file():
                gcs.write(f"bucket/runs/a/{file.relative_to(workdir)}", file.read_bytes())
        done = subprocess.run(
            [sys.executable, "-c", IN_A_BUCKET],
            # A device that a run is using could not be opened: it opens none.
            env=gcs.environment | {"JAX_PLATFORMS": "none"},
            timeout=300,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        page = gcs.objects["bucket/runs/a/report.html"].decode()
        assert page.count("data:image/webp") > 8 and "Gradient norm" in page
        assert "Left out of this report" not in page
        assert gcs.objects["bucket/pages/a.html"].startswith(b"<!doctype html>")


def test_unicode_survives(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "train/höhe": 1.0}, ensure_ascii=False) + "\n"
    )
    save_png(tmp_path / "samples" / "1.png", np.zeros((8, 8, 3), np.uint8), {"prompts": "ein Öhr"})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "train/höhe" in text and "ein Öhr" in text
