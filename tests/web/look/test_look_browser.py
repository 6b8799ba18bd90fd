"""The page that looks at data, in a real browser."""

import contextlib
import json

import pytest

from tests.web import accessibility
from tests.web.conftest import PHONE, WIDE
from tests.web.look.test_look import CAPTIONS, TOKEN, data, make_look  # noqa: F401, a fixture
from tests.web.server.conftest import listening


@pytest.fixture
def open_page(visit, data, tmp_path):  # noqa: F811
    """Opens the view of the pictures that can be read."""
    (data / "broken.png").unlink()
    rows = (data / "metadata.jsonl").read_text().splitlines()[:-1]
    (data / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    drop = {"name": "1.png", "reason": "near_duplicate", "detail": "of 0.png"}
    (data / "dropped.jsonl").write_text(json.dumps(drop) + "\n")
    with contextlib.ExitStack() as servers:

        def start(*, mends=True, **options):
            token, captions = (TOKEN, tmp_path / "c.jsonl") if mends else ("", None)
            url = servers.enter_context(listening(make_look(data, captions, token=token)))
            page = visit(f"{url}/look", token=token, **options)
            page.wait_for_selector("#items li")
            return page

        yield start


def test_pictures_are_filtered_sorted_and_compared(open_page):
    page = open_page(mends=False)
    widths = page.evaluate(
        """async () => Promise.all([...document.querySelectorAll('#items img')].map(
             async image => { await image.decode(); return image.naturalWidth }))"""
    )
    assert widths == [64, 96, 128, 160]
    assert page.locator(".pair img").count() == 2
    page.fill("#words", "red")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#items li').length === 2")
    assert "2 of 4 pictures" in page.inner_text("#said")
    page.fill("#resolution", "64")
    page.fill("#step", "16")
    page.get_by_role("button", name="Sort into buckets").click()
    page.wait_for_selector("#buckets table")
    assert "64 × 64" in page.inner_text("#buckets")
    page.click("#items button")
    assert page.is_visible("#large") and page.get_attribute("#caption", "readonly") is not None
    assert not page.is_visible("#mend button")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.closest('#items') !== null")
    assert page.evaluate("window.hacked") is None


def test_a_caption_is_mended_by_keyboard(open_page, tmp_path):
    page = open_page()
    page.locator("#items button").first.focus()
    page.keyboard.press("Enter")
    assert page.input_value("#caption") == CAPTIONS[0]
    page.fill("#caption", "a circle, mended")
    page.get_by_role("button", name="Save the caption").click()
    page.wait_for_selector("#mended:text('1 mended so far')")
    page.get_by_role("button", name="Close").click()
    assert "mended" in page.locator("#items button").first.get_attribute("class")
    page.reload()
    page.wait_for_selector("#items li")
    assert page.locator("#items .words").first.inner_text() == "a circle, mended"
    assert json.loads((tmp_path / "c.jsonl").read_text())["text"] == "a circle, mended"


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_and_a_phone_is_wide_enough(open_page, dark):
    axe = accessibility.script()
    size = PHONE if dark else WIDE
    page = open_page(viewport=size, color_scheme="dark" if dark else "light", has_touch=dark)
    page.get_by_role("button", name="Sort into buckets").click()
    page.wait_for_selector("#buckets table")
    assert accessibility.violations(page, axe) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    page.click("#items button")
    assert accessibility.violations(page, axe) == []
