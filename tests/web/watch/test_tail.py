"""What was added to metrics.jsonl: appended lines, a last line written again, files made anew."""

import json

import pytest

from sdjax.train.monitoring.metrics_log import JsonLines, trim_metrics
from sdjax.web.watch import tail
from sdjax.web.watch.tail import Seen


def write(log, *steps, **values):
    for step in steps:
        log.write_scalars(step, {"train/loss": 1 / step, **values})


@pytest.fixture
def log(tmp_path):
    made = JsonLines(tmp_path / "metrics.jsonl")
    yield made
    made.close()


def steps(added):
    return [row["step"] for row in added.rows]


def test_appended_lines_come_once(tmp_path, log):
    assert tail.read(tmp_path, Seen()).rows == []
    write(log, 10, 20)
    added = tail.read(tmp_path, Seen())
    assert steps(added) == [10, 20] and not added.anew
    assert added.seen.offset == (tmp_path / "metrics.jsonl").stat().st_size
    assert tail.read(tmp_path, added.seen).rows == []
    write(log, 30)
    assert steps(tail.read(tmp_path, added.seen)) == [30]


def test_last_line_that_gets_more_numbers_comes_again(tmp_path, log):
    write(log, 10, 20)
    seen = tail.read(tmp_path, Seen()).seen
    log.write_scalars(20, {"validation/raw/loss": 0.5})
    added = tail.read(tmp_path, seen)
    assert added.rows == [{"step": 20, "train/loss": 0.05, "validation/raw/loss": 0.5}]
    write(log, 30)
    assert steps(tail.read(tmp_path, added.seen)) == [30]


def test_half_a_line_waits(tmp_path, log):
    write(log, 10)
    seen = tail.read(tmp_path, Seen()).seen
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 20, "train/lo')
    assert tail.read(tmp_path, seen) == tail.Added([], seen)


def test_file_that_is_cut_and_not_yet_written_again_waits(tmp_path, log):
    write(log, 10, 20)
    seen = tail.read(tmp_path, Seen()).seen
    with open(tmp_path / "metrics.jsonl", "r+b") as file:  # as JsonLines does between two writes
        file.truncate(seen.offset - len(seen.line))
    added = tail.read(tmp_path, seen)
    assert added.rows == [] and not added.anew


@pytest.mark.parametrize("later", [(), (20, 30, 40), (20, 30, 40, 50, 60)])
def test_run_that_goes_back_is_read_anew(tmp_path, later):
    log = JsonLines(tmp_path / "metrics.jsonl")
    write(log, 10, 20, 30, 40)
    log.close()
    seen = tail.read(tmp_path, Seen()).seen
    assert trim_metrics(tmp_path / "metrics.jsonl", 10) == 3
    log = JsonLines(tmp_path / "metrics.jsonl")
    write(log, *later)
    log.close()
    assert tail.read(tmp_path, seen).anew
    assert tail.find(tmp_path, seen.mark) is None or later[:3] == (20, 30, 40)


def test_a_mark_finds_its_place_and_no_other(tmp_path, log):
    write(log, 10, 20)
    seen = tail.read(tmp_path, Seen()).seen
    assert tail.find(tmp_path, seen.mark).offset == seen.offset
    assert tail.find(tmp_path, str(seen.offset)).offset == seen.offset  # a byte offset is enough
    assert steps(tail.read(tmp_path, tail.find(tmp_path, "0"))) == [10, 20]
    wrong = (f"{seen.offset}-00000000", str(seen.offset - 3), str(seen.offset + 1), "x", "-1", "")
    assert [tail.find(tmp_path, mark) for mark in wrong] == [None] * len(wrong)
    assert tail.find(tmp_path / "nowhere", seen.mark) is None


def test_what_is_not_finite_is_none_and_what_is_no_number_is_left_out(tmp_path):
    row = {"step": 1, "a": "NaN", "b": "Infinity", "c": 1e308, "d": "words", "e": True, "f": [1]}
    text = "\n".join(["nonsense", json.dumps(row), '{"no": 1}', "[" * 100_000, ""])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert tail.read(tmp_path, Seen()).rows == [{"step": 1, "a": None, "b": None, "c": None}]


def test_much_at_once_is_read_anew(tmp_path):
    line = json.dumps({"step": 1, "a" * 1000: 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 1200)
    assert tail.read(tmp_path, Seen()).anew
    seen = tail.end_of(tmp_path)
    assert seen.offset == len(line) * 1200 and seen.line == line.encode()
