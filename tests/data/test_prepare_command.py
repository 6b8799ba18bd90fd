"""`python -m sdjax.prepare` as a command: options, mistakes, runners of Beam."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from sdjax import encode
from sdjax import prepare as verb
from sdjax.data.prepare import cleaning
from sdjax.data.prepare.report import STEPS
from sdjax.data.prepare.settings import Settings, Workspace
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Rules, ScoreRule
from sdjax.errors import UserError
from sdjax.prepare import parse_colour, parse_score
from tests.data.test_prepare import contents, picture, prepare, settings, small_dirty_set
from tests.data.test_raw import encoded, write_tar


def test_output_and_input_that_cannot_be(tmp_path):
    small_dirty_set(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=r"holds \['file'\]; expected a folder that is empty"):
        prepare(tmp_path / "in", tmp_path / "full", settings())
    with pytest.raises(UserError, match="not one image can be used: .*'too_small': 12.*text_key"):
        prepare(tmp_path / "in", tmp_path / "out", settings(rules=Rules(min_side=999)))
    # Nothing is left of it that would stand in the way of better options.
    assert prepare(tmp_path / "in", tmp_path / "out", settings())["kept"] > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: settings(near_distance=11), "near_distance is 11; expected 0 to 10"),
        (lambda: settings(test_share=0.6, validation_share=0.4), "leaves nothing to train on"),
        (lambda: settings(rules=Rules(drop_pattern="(")), "no regular expression"),
        (lambda: settings(rules=Rules(max_pixels=2**40)), "--max_pixels is .* beyond which Pillow"),
        (lambda: settings(thumbnails=-1), "--thumbnails is -1; expected 0 or more"),
        (lambda: settings(rules=Rules(scores=(ScoreRule("width"),))), "--score names 'width'"),
        (lambda: parse_score("a>3"), "--score is 'a>3'; expected a column"),
        (lambda: parse_score("1<=a>=3"), "expected a column"),
        (lambda: parse_colour("1,2,256"), "expected three numbers of 0 to 255"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make()


def test_scores_and_colours_are_parsed():
    assert parse_score("4<=a <= 9.5") == ScoreRule("a", 4, 9.5)
    assert parse_score("a>=-1e-3") == ScoreRule("a", low=-1e-3)
    assert parse_score("a") == ScoreRule("a")
    assert parse_colour("1, 2,3") == (1, 2, 3)


@pytest.fixture(autouse=True)
def fresh_flags():
    """No value of a test before, which may be one of another file, is left."""
    for name in verb.FLAGS:
        verb.FLAGS[name].unparse()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output=o"], "--input is missing"),
        (["--input=IN"], "--output is missing"),
        (["--input=IN", "--output=o", "--min_sid=3"], "'min_sid'. Did you mean: min_side"),
        (["--input=IN", "--output=o", "--min_side=x"], "--min_side=x: invalid literal"),
        (["--input=IN", "--output=o", "--workers=-1"], "--workers=-1"),
        (["--input=IN", "--output=o", "stray"], "'stray' is no flag; options of Beam go after --"),
        (["--input=IN/gone", "--output=o"], "IN/gone', which is not there"),
        (["--input=IN", "--output=o"], "neither metadata.jsonl, nor images, nor files"),
    ],
)
def test_wrong_command_lines(tmp_path, capsys, arguments, message):
    arguments = [text.replace("IN", str(tmp_path)) for text in arguments]
    assert verb.main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.replace("IN", str(tmp_path)) in error
    verb.FLAGS.unparse_flags()


def test_the_verb_prints_its_results_and_no_log_lines(tmp_path, capfd):
    """Whatever libraries have to say; here they also do so of broken pictures."""
    pytest.importorskip("apache_beam")
    small_dirty_set(tmp_path / "in")
    command = ["prepare", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}"]
    assert verb.main([*command, "--workers=1"]) == 0
    out, err = capfd.readouterr()
    # Of a machine that is busy with other work, progress may be shown.
    lines = [line for line in err.splitlines() if not re.match("(looking|cleaning|writing)", line)]
    assert lines == [
        "split train: 16 rows, in folders that make no split",
        "split test: 0.03 of train, by a hash of the name",
    ]
    assert re.match(r"\d+ rows read, \d+ kept: ", out)
    assert verb.main(command) == 0
    assert capfd.readouterr() == (out, f"{tmp_path / 'out'} is finished already\n")
    verb.FLAGS.unparse_flags()


@pytest.mark.parametrize("format", ["image_text_folder", "webdataset"])
def test_a_worker_says_how_much_of_a_shard_is_clean(tmp_path, monkeypatch, format):
    if format == "webdataset":
        members = [(f"{n}.png", encoded(picture(n, (300, 300)))) for n in range(8)]
        write_tar(tmp_path / "in" / "a.tar", members)
    else:
        small_dirty_set(tmp_path / "in")
    workspace, chosen = Workspace(str(tmp_path / "out")), settings(format=format)
    workspace.work.mkdir(parents=True)
    monkeypatch.setattr("sdjax.data.raw.folder.ROWS_PER_SHARD", 8)
    shards = formats.list_shards(str(tmp_path / "in"), format, chosen.fields)
    poll = cleaning.how_far(workspace, [0, 1])
    seen = []

    class Time:
        now = 0.0

        @classmethod
        def monotonic(cls):
            seen.append(poll())
            cls.now += 1
            return cls.now

    monkeypatch.setattr(cleaning, "time", Time)
    cleaning.clean_shard((0, shards[0]), workspace=workspace, settings=chosen)
    assert len(seen) >= 8 and seen == sorted(seen) and 0.4 < seen[-1] < 1
    assert poll() == 1  # of the two


def test_without_beam_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "apache_beam" else found(name)
    )
    small_dirty_set(tmp_path / "in")
    assert verb.main(["prepare", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'o'}"]) == 2
    assert "pip install 'sdjax[beam]'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_every_option_reaches_the_settings(tmp_path):
    """The flags that are fields cover them all."""
    special = (
        {"background", "images", "scores"},
        {
            "format",
            "fields",
            "rules",
            "duplicates",
            "captions_from",
            "captions_sha256",
        },
    )
    for fields, options, other in zip(
        (Rules, Settings), (verb._OF_RULES, verb._OF_SETTINGS), special, strict=True
    ):
        assert set(options) | other == {field.name for field in dataclasses.fields(fields)}
    small_dirty_set(tmp_path / "in")
    verb.FLAGS(["prepare", f"--input={tmp_path / 'in'}", "--noorient", "--max_aspect=3",
                "--score=s>=2", "--near_distance=4", "--background=1,2,3"])  # fmt: skip
    rules = Rules(orient=False, max_aspect=3.0, background=(1, 2, 3),
                  scores=(ScoreRule("s", low=2.0),))  # fmt: skip
    expected = settings(rules=rules, near_distance=4)
    assert verb.settings_of_flags() == expected
    assert expected.to_json()["rules"]["scores"] == [{"column": "s", "low": 2.0, "high": None}]
    verb.FLAGS.unparse_flags()


def test_the_page_about_it_names_every_option_and_every_word_of_the_report():
    page = (Path(__file__).parents[2] / "docs" / "prepare.md").read_text()
    options = set(re.findall(r"--(?:\[no\])?([a-z_]+)", page))
    assert set(verb.FLAGS) - options == {"h", "help"}
    of_beam = {"runner", "project", "region", "temp_location", "sdk_container_image",
               "flink_master", "spark_master_url"}  # fmt: skip
    of_training = {"config", "workdir"}
    assert options - set(verb.FLAGS) - set(encode.FLAGS) - of_training == of_beam
    assert not [word for words in STEPS.values() for word in words if f"`{word}`" not in page]


def test_another_runner_of_beam(tmp_path):
    """By flags: here Beam's portable one, which works in this process."""
    pytest.importorskip("apache_beam")
    from sdjax.data.prepare import pipeline

    small_dirty_set(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out", settings())
    options = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    workspace = Workspace(str(tmp_path / "other"))
    pipeline.run(str(tmp_path / "in"), settings(), workspace, workers=1, beam_options=options)
    assert contents(tmp_path / "other") == contents(tmp_path / "out")
    with pytest.raises(UserError, match="Beam has no option --runer on this machine"):
        pipeline.run(
            str(tmp_path / "in"), settings(), workspace, workers=1, beam_options=["--runer=x"]
        )
    with pytest.raises(UserError, match=r"(?s)Beam refuses .*Missing required option: project"):
        options = ["--runner=DataflowRunner"]
        pipeline.run(str(tmp_path / "in"), settings(), workspace, workers=1, beam_options=options)
