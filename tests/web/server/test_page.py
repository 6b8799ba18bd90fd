"""The page in a real browser: each way through it, on a desktop and on a phone."""

import dataclasses
import hashlib
import json
import re

import httpx
import pytest

from sdjax.system import paths
from sdjax.web.server.app import make_app
from sdjax.web.server.ratings import RatingStore
from tests.web import accessibility
from tests.web.conftest import PHONE
from tests.web.server.conftest import listening


@pytest.fixture
def open_page(visit, address):
    """Opens the page."""
    return lambda **options: visit(address, **options)


def drawn(page):
    return page.locator("#pictures li")


def test_a_prompt_becomes_pictures_with_their_settings(open_page, service):
    page = open_page()
    page.fill("#prompt", "a red <b>circle</b>")
    page.fill("#count", "2")
    page.fill("#seed", "5")
    page.click("#draw")
    page.wait_for_selector("#pictures li:nth-child(2)")
    newest = drawn(page).first
    assert newest.locator("p").first.inner_text() == "a red <b>circle</b>"
    assert "Seed 6 · 4 steps" in newest.inner_text()
    width = newest.locator("img").evaluate("image => image.naturalWidth")
    assert width == service.loaded.model.native_size[1]
    newest.get_by_role("button", name="Use settings").click()
    assert page.input_value("#seed") == "6"
    page.wait_for_selector("#draw:not([disabled])")
    page.click("#draw")
    page.wait_for_selector("#pictures li:nth-child(3)")  # two more, of the seeds 6 and 7
    page.wait_for_selector("#pictures li:nth-child(4)")
    sources = [drawn(page).nth(i).locator("img").get_attribute("src") for i in range(4)]
    assert sources[1] == sources[2] and len(set(sources)) == 3
    page.reload()
    assert page.input_value("#prompt") == "a red <b>circle</b>"


def test_the_command_draws_the_same_picture(open_page, service):
    page = open_page()
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.fill("#prompt", "it's a star")
    page.fill("#seed", "1")
    page.click("#draw")
    page.get_by_role("button", name="Copy command").click()
    command = page.evaluate("window.copied")
    assert command.startswith(f"python -m sdjax.sample --model='{service.place}'")
    assert r"--prompts='it'\''s a star'" in command and "--seed=1 --steps=4" in command


def test_an_error_of_the_server_is_shown_in_words(open_page):
    page = open_page(expected=("422",))
    page.fill("#prompt", "a <lora:x:1>")
    page.click("#draw")
    page.wait_for_selector("#error:not(:empty)")
    assert "adapters are those of its --lora" in page.inner_text("#error")
    assert page.is_enabled("#draw") and page.is_disabled("#stop")


def test_a_picture_forms_and_can_be_stopped(open_page, service):
    page = open_page()
    page.fill("#prompt", "a circle")
    page.fill("#steps", "150")
    page.fill("#count", "4")
    page.click("#draw")
    page.wait_for_selector("#preview[src]")
    assert re.search(r"step \d+ of 150", page.inner_text("#state"))
    page.click("#stop")
    page.wait_for_selector("#draw:not([disabled])")
    assert drawn(page).count() == 0
    for _ in range(100):
        if not any(service.engine.jobs()):
            break
        page.wait_for_timeout(100)
    assert not any(service.engine.jobs())  # it does not go on for nobody


def test_it_draws_from_a_picture_by_keyboard_on_a_phone(open_page, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    page = open_page(viewport=PHONE, has_touch=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.click("summary")
    page.set_input_files("#image", tmp_path / "a.png")
    page.fill("#strength", "0.5")
    page.focus("#prompt")
    page.keyboard.type("a red circle")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#pictures li")
    small = page.evaluate(
        """() => [...document.querySelectorAll("main button, main .button, main summary")]
             .filter(each => each.getBoundingClientRect().height < 24).length"""
    )
    assert small == 0


def test_every_field_has_a_name_and_every_picture_words(open_page):
    page = open_page()
    page.fill("#prompt", "a circle")
    page.click("#draw")
    page.wait_for_selector("#pictures li")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("main input, main select, main textarea")]
             .filter(each => !each.labels.length).map(each => each.id)"""
    )
    assert nameless == []
    assert drawn(page).first.locator("img").get_attribute("alt") == "a circle"
    assert page.locator("html").get_attribute("lang") == "en"


def test_what_people_say_is_kept_with_the_picture(visit, service, tmp_path):
    store = RatingStore(paths.to_path(tmp_path), service.digest)
    with listening(make_app(dataclasses.replace(service, ratings=store))) as url:
        page = visit(url)
        page.fill("#prompt", "a circle")
        page.fill("#seed", "3")
        page.click("#draw")
        good = page.get_by_role("button", name="Good")
        good.click()
        page.wait_for_selector("button[aria-pressed=true]")
        assert good.get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name="Bad").click()
        page.wait_for_selector("button[aria-pressed=true]:text('Bad')")
        unknown = httpx.post(f"{url}/rate", json={"picture": "../../x", "rating": 1})
        assert unknown.status_code == 422 and "one of the last" in unknown.text
    rows = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert [row["rating"] for row in rows] == [1, -1]
    assert rows[0]["prompt"] == "a circle" and rows[0]["seed"] == 3
    assert rows[0]["model"] == service.digest
    (file,) = (tmp_path / "pictures").iterdir()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem == rows[0]["picture"]


def test_which_of_two_pictures_is_better_is_kept_with_both(visit, service, tmp_path):
    store = RatingStore(paths.to_path(tmp_path), service.digest)
    with listening(make_app(dataclasses.replace(service, ratings=store))) as url:
        page = visit(url)
        for prompt, seed in (("a square", "3"), ("a circle", "3"), ("a circle", "4")):
            page.fill("#prompt", prompt)
            page.fill("#seed", seed)
            page.click("#draw")
            page.wait_for_selector(f"#pictures li:has-text('{prompt}'):has-text('Seed {seed}')")
        cards = page.locator("#pictures li").all()
        newest, older, other = (card.get_by_role("button").last for card in cards)
        older.click()
        assert other.is_disabled() and not newest.is_disabled()
        with page.expect_response("**/rate") as answer:
            newest.click()
        assert answer.value.status == 200
        page.wait_for_selector("button:text('Worse: noted')")
        names = [json.loads(line) for line in (tmp_path / "ratings.jsonl").open()]
        pair = {"better": names[0]["worse"], "worse": names[0]["better"]}
        assert httpx.post(f"{url}/rate", json=pair).status_code == 200
        for wrong, words in (
            ({**pair, "worse": pair["better"]}, "two pictures of one prompt"),
            ({"better": pair["better"]}, "expected a picture and a rating"),
            ({**pair, "rating": 1, "picture": pair["better"]}, "expected a picture and a rating"),
            ({**pair, "worse": "0" * 64}, "worse is '000"),
        ):
            refused = httpx.post(f"{url}/rate", json=wrong)
            assert refused.status_code == 422 and words in refused.text, words
    first, second = map(json.loads, (tmp_path / "ratings.jsonl").read_text().splitlines())
    assert (first["better"], first["worse"]) == (second["worse"], second["better"])
    assert first["prompt"] == "a circle" and {first["seed"], first["worse_seed"]} == {3, 4}
    files = {file.stem for file in (tmp_path / "pictures").iterdir()}
    assert files == {first["better"], first["worse"]}


def test_without_a_folder_there_is_nothing_to_rate(open_page, address):
    page = open_page()
    page.fill("#prompt", "a circle")
    page.click("#draw")
    page.wait_for_selector("#pictures li")
    assert page.get_by_role("button", name="Good").count() == 0
    answer = httpx.post(f"{address}/rate", json={"picture": "0" * 64, "rating": 1})
    assert answer.status_code == 422 and "--ratings" in answer.text


def test_the_page_runs_no_script_but_its_own(address):
    answer = httpx.get(address)
    rules = answer.headers["content-security-policy"]
    assert "default-src 'none'" in rules and "frame-ancestors 'none'" in rules
    assert "unsafe-inline" not in rules.split("script-src")[1].split(";")[0]


def test_with_a_token_the_page_asks_for_it(service):
    token = "0123456789abcdef"
    with listening(make_app(service, token=token, hosts=())) as url:
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, auth=("anyone", token)).status_code == 200


def test_axe_finds_nothing(open_page):
    axe = accessibility.script()
    page = open_page(color_scheme="dark")
    assert accessibility.violations(page, axe) == []
    page.fill("#prompt", "a circle")
    page.click("#draw")
    page.wait_for_selector("#pictures li")
    assert accessibility.violations(page, axe) == []
