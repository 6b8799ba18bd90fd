"""The report in a real browser without a network: it opens, draws, zooms, and fits a phone."""

import pytest

from sdjax.web.report.page import write_report
from tests.odd_names import ODD
from tests.web import accessibility
from tests.web.conftest import PHONE
from tests.web.report_workdir import NASTY, make_workdir


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / ODD / "run"
    return write_report(make_workdir(folder, count=3000))  # 3,000 points: thinned


@pytest.fixture
def open_page(visit, report):
    """Opens the report, without a network."""
    return lambda **options: visit(report.as_uri(), offline=True, **options)


def draw_all(page):
    """Scroll through the page, as its reader does, until every plot is drawn."""
    count = page.locator(".plot").count()
    for i in range(count):
        page.locator(".plot").nth(i).scroll_into_view_if_needed()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
    )
    return count


def axis(page, number=0, which="x"):
    """The ends of an axis as they are shown."""
    return page.evaluate(
        "([n, a]) => document.querySelectorAll('.plot')[n]._fullLayout[a + 'axis'].range.slice()",
        [number, which],
    )


def test_every_figure_is_drawn_and_seen(open_page):
    page = open_page()
    count = draw_all(page)
    assert count > 20
    plots = page.evaluate("""() => [...document.querySelectorAll('.plot')].map(plot => ({
        title: plot.closest('section').querySelector('h4').textContent,
        width: plot.getBoundingClientRect().width, height: plot.getBoundingClientRect().height,
        lengths: [...plot.querySelectorAll('path.js-line')].map(p => p.getTotalLength()),
        points: plot.querySelectorAll('path.point').length,
    }))""")
    for plot in plots:
        assert plot["width"] > 300 and plot["height"] > 200, plot
        assert max([0, *plot["lengths"]]) > 50 or plot["points"], plot
    fid = next(plot for plot in plots if plot["title"] == "fid")
    assert fid["points"] == 2
    assert page.locator("path.yerror").count() >= 2
    assert page.evaluate("window.hacked") is None
    assert NASTY in page.locator("#warnings").text_content()


def test_every_picture_is_shown_and_the_slider_turns_them(open_page):
    page = open_page()
    loaded = page.evaluate("""async () => Promise.all([...document.images].map(async image => {
        await image.decode(); return image.naturalWidth * image.naturalHeight }))""")
    assert len(loaded) >= 9 and min(loaded) > 100
    gallery = page.locator(".gallery").first
    shown = gallery.locator("figure:visible")
    assert shown.count() == 1 and shown.get_attribute("data-step") == "2000"
    gallery.locator("button.earlier").click()
    assert shown.get_attribute("data-step") == "1000"
    gallery.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert shown.get_attribute("data-step") == "0"
    assert gallery.locator(".which").text_content() == "step 0"


def test_a_plot_zooms_and_comes_back(open_page):
    page = open_page()
    page.locator(".plot").first.scroll_into_view_if_needed()
    area = page.locator(".plot").first.locator(".nsewdrag")
    area.wait_for()
    whole = axis(page)
    box = area.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.25 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], y, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "end => document.querySelector('.plot')._fullLayout.xaxis.range[1] < 0.9 * end",
        arg=whole[1],
    )
    part = axis(page)
    share = (part[1] - part[0]) / (whole[1] - whole[0])
    assert share == pytest.approx(0.25, abs=0.02)
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], y)
    page.wait_for_function(
        "end => document.querySelector('.plot')._fullLayout.xaxis.range[1] == end", arg=whole[1]
    )


def test_the_switches_do_what_they_say(open_page):
    page = open_page()
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.locator(".plot .nsewdrag").first.wait_for()
    steps, ys = axis(page), axis(page, which="y")
    page.get_by_label("images seen").check()
    images = axis(page)
    assert images[1] == pytest.approx(32 * steps[1], rel=1e-3)
    assert "images seen" in page.locator(".plot .xtitle").first.text_content()
    lines = "document.querySelector('.plot').data.length"
    assert page.evaluate(lines) == 4  # the training loss twice
    page.get_by_label("smooth").uncheck()
    assert page.evaluate(lines) == 3
    page.locator("button.log").first.click()
    assert axis(page, which="y")[1] < 1 < ys[1]  # its logarithm
    button = page.locator(".legend button").first
    button.click()
    assert page.evaluate(lines) == 2 and button.get_attribute("aria-pressed") == "false"


def test_it_follows_the_dark_scheme(open_page):
    page = open_page(color_scheme="light")
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.locator(".plot .js-line").first.wait_for()
    look = """() => {
        const style = (s) => getComputedStyle(document.querySelector(s));
        return [style('body').backgroundColor, style('body').color, style('.plot .js-line').stroke,
                style('.plot .xtick text').fill];
    }"""
    light = page.evaluate(look)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => ({look})()[2] !== before", arg=light[2])
    dark = page.evaluate(look)
    assert all(a != b for a, b in zip(light, dark, strict=True)), (light, dark)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50 and min(c for c, _ in contrasts) >= 4.5, min(contrasts)


# [contrast, text] of every element with text of its own (WCAG 2.2, relative luminance).
CONTRASTS = """() => {
    const parse = (c) => c.match(/[\\d.]+/g).map(Number);
    const channel = (v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) =>
        0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > 0.5) return c;
        }
    };
    return [...document.querySelectorAll('body *:not(script):not(noscript)')]
        .filter(e => !e.closest('svg') && e.getClientRects().length
            && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .map(e => {
            const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(behind(e))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 60)];
        });
}"""


def test_light_text_has_contrast_too(open_page):
    contrasts = open_page(color_scheme="light").evaluate(CONTRASTS)
    assert len(contrasts) > 50 and min(c for c, _ in contrasts) >= 4.5, min(contrasts)


def test_nothing_is_wider_than_a_phone(open_page):
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    draw_all(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("innerWidth") == 360  # a mobile browser zooms out where a page is wider
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = page.evaluate("""() => [...document.querySelectorAll('body *')]
        .filter(e => e.getBoundingClientRect().right > 360.5
            && !e.closest('.scroll, pre, nav ul, .skip, .modebar, svg'))
        .map(e => e.tagName + ' ' + e.className)""")
    assert wide == []
    # A finger scrolls; the buttons zoom.
    whole = axis(page)
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.locator(".plot").first.locator('[data-title="Zoom in"]').tap()
    page.wait_for_function(
        "end => document.querySelector('.plot')._fullLayout.xaxis.range[1] < end", arg=whole[1]
    )


def test_the_page_prints_all_its_plots(open_page):
    page = open_page()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    drawn = "() => [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
    page.wait_for_function(drawn)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page, scheme):
    axe = accessibility.script()
    page = open_page(color_scheme=scheme)
    draw_all(page)
    assert accessibility.violations(page, axe) == []
