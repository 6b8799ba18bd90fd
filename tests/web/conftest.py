"""A real browser for the tests of pages; they are skipped where there is none."""

import shutil

import pytest

OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium on PATH")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=list(OPTIONS))
        yield launched
        launched.close()


@pytest.fixture
def visit(browser):
    """Opens a page in a context of its own; in the end nothing may have gone wrong in any.

    Words of the console that are expected are no complaint; a request to elsewhere is one.
    """
    contexts, complaints = [], []

    def start(url, *, expected=(), token="", **options):
        known = {"http_credentials": {"username": "me", "password": token}} if token else {}
        context = browser.new_context(**({"viewport": WIDE} | known | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # the machine may be busy

        def told(message):
            wrong = message.type in ("error", "warning")
            if wrong and not any(words in message.text for words in expected):
                complaints.append(f"console: {message.text}")

        def asked(request):
            if not request.url.startswith(("data:", "blob:", own)):
                complaints.append(f"request: {request.url}")

        # A file may ask for nothing besides itself; a server for what it has.
        own = url if url.startswith("file:") else "/".join(url.split("/")[:3])
        page.on("console", told)
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", asked)
        page.goto(url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []
