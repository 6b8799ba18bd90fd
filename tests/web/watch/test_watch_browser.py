"""The page that watches, in a real browser: live curves, a run that goes back, runs compared."""

import contextlib
import re

import pytest

from sdjax.system import locks, paths, wishes
from sdjax.train.monitoring.metrics_log import JsonLines, trim_metrics
from sdjax.web.watch import runs, stream
from tests.web import accessibility
from tests.web.conftest import PHONE, WIDE
from tests.web.report_workdir import write_pictures
from tests.web.server.conftest import listening
from tests.web.watch.conftest import TOKEN, make_run, make_watch


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stream, "LOOK", 0.1)
    monkeypatch.setattr(stream, "_STATE", 0.2)
    monkeypatch.setattr(runs, "_RESCAN", 0.2)


@pytest.fixture
def open_page(visit, folder):
    """Opens the page of the two runs."""
    with contextlib.ExitStack() as servers:

        def start(*, token="", **options):
            application, watch = make_watch(folder, token=token)
            url = servers.enter_context(listening(application))
            servers.callback(watch.ending.set)
            page = visit(f"{url}/watch", token=token, **options)
            page.wait_for_selector("#now .tile")
            return page

        yield start


def last_step(page, title="Loss"):
    """The step at which the first curve of a figure ends, as it is drawn."""
    return page.evaluate(
        """title => { const card = [...document.querySelectorAll('.plot-card')].find(
             each => each.querySelector('h4').textContent === title);
           const data = card?.querySelector('.plot').data;
           return data ? Math.max(...data.map(trace => trace.x.at(-1) ?? 0)) : 0 }""",
        title,
    )


def wait_for_step(page, step):
    for _ in range(200):
        page.evaluate("() => document.getElementById('figures').scrollIntoView()")  # to be drawn
        if last_step(page) == step:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"the curve ends at {last_step(page)}, not at {step}")


def test_curves_grow_and_go_back_with_the_run(open_page, folder):
    page = open_page()
    assert page.inner_text("#connection") == "Live"
    assert page.locator("#now article").count() == 1  # the one that is trained
    wait_for_step(page, 400)
    log = JsonLines(folder / "first" / "metrics.jsonl")
    log.write_scalars(410, {"train/loss": 0.2, "train/images_seen": 410 * 32})
    wait_for_step(page, 410)
    log.close()
    trim_metrics(folder / "first" / "metrics.jsonl", 200)
    wait_for_step(page, 200)
    log = JsonLines(folder / "first" / "metrics.jsonl")
    log.write_scalars(210, {"train/loss": 0.2, "fidelity/colour": 0.9})
    log.close()
    wait_for_step(page, 210)
    page.wait_for_selector("h4:text('Prompt fidelity')", state="attached")
    page.reload()
    wait_for_step(page, 210)
    tiles = page.inner_text("#now .tiles")
    assert re.search(r"Steps\s+210\s+of 4,000", tiles) and "Time left" in tiles


def test_runs_are_compared_and_a_new_one_appears(open_page, folder):
    page = open_page()
    page.get_by_label("second").check()
    page.wait_for_function("() => document.querySelectorAll('#now article').length === 2")
    card = page.locator(".plot-card", has=page.locator("h4", has_text=re.compile("^Loss$")))
    card.scroll_into_view_if_needed()
    legend = card.locator(".legend button")
    legend.nth(3).wait_for()
    names = legend.all_inner_texts()
    assert "first: training" in names and "second: training" in names
    colours = [legend.nth(names.index(f"{run}: training")).locator("line").get_attribute("stroke")
               for run in ("first", "second")]  # fmt: skip
    assert colours[0] != colours[1]
    count = "() => document.querySelector('.plot-card .plot').data.length"
    before = page.evaluate(count)
    legend.nth(0).click()
    assert legend.nth(0).get_attribute("aria-pressed") == "false"
    assert page.evaluate(count) < before
    page.get_by_label("images seen").check()
    assert page.evaluate("Math.max(...document.querySelector('.plot').data.at(-1).x)") > 5000
    make_run(folder / "third", 5, pictures=())
    page.get_by_label("third").wait_for()
    page.reload()
    page.wait_for_function(
        "() => document.querySelectorAll('#now article').length === 2"
    )  # as chosen


def test_new_pictures_follow_and_the_slider_goes_back(open_page, folder):
    page = open_page()
    page.wait_for_selector("#pictures img[src]")
    assert page.inner_text("#pictures .which") == "step 100"
    assert "a large red circle" in page.locator("#pictures .prompts").text_content()
    write_pictures(folder / "first" / "samples", (300,), kinds=("",), side=64)
    page.wait_for_selector("#pictures .which:text('step 300')")
    page.click("#pictures .earlier")
    page.wait_for_selector("#pictures .which:text('step 100')")
    page.locator("#pictures input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_selector("#pictures .which:text('step 0')")
    write_pictures(folder / "first" / "samples", (400,), kinds=("",), side=64)
    page.wait_for_function(
        "() => document.querySelector('#pictures input[type=range]').max === '3'"
    )
    assert page.inner_text("#pictures .which") == "step 0"  # who looks back is left in peace
    assert page.evaluate("window.hacked") is None


def test_the_buttons_take_a_token(open_page, folder):
    page = open_page()
    assert page.locator("#now .buttons button:disabled").count() == 2
    assert "--token_file" in page.inner_text("#now .buttons")


def test_with_a_token_the_run_is_asked(open_page, folder):
    page = open_page(token=TOKEN)
    page.on("dialog", lambda dialog: dialog.accept())
    first = paths.to_path(folder / "first")
    page.get_by_role("button", name="Sample now").click()
    page.wait_for_selector(".said:text('pictures come')")
    assert wishes.pending(first) == ["sample"]
    page.get_by_role("button", name="Stop and save").click()
    page.wait_for_selector(".said:text('it stops')")
    assert wishes.pending(first) == ["stop", "sample"]


def test_a_run_that_ends_is_no_longer_asked(open_page, folder):
    with locks.held(folder / "second", "--workdir", "sdjax.main"):
        page = open_page(token=TOKEN)
        page.wait_for_function("() => document.querySelectorAll('.badge.active').length === 2")
    page.wait_for_function("() => document.querySelectorAll('.badge.active').length === 1")
    second = page.locator("article", has_text="second")
    assert second.locator("button:disabled").count() == 2


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_and_a_phone_is_wide_enough(open_page, dark):
    axe = accessibility.script()
    size = PHONE if dark else WIDE
    page = open_page(viewport=size, color_scheme="dark" if dark else "light", has_touch=dark)
    page.get_by_label("second").check()
    page.wait_for_function("() => document.querySelectorAll('#now article').length === 2")
    wait_for_step(page, 400)
    for i in range(page.locator(".plot-card:visible").count()):
        page.locator(".plot-card:visible").nth(i).scroll_into_view_if_needed()
    assert accessibility.violations(page, axe) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
