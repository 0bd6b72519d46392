"""The pages in a real browser: no console error, no sideways scrolling, readable by everybody, usable by keyboard."""

import threading
from pathlib import Path

import pytest
from pydantic import SecretStr
from werkzeug.serving import make_server

from ppal_backend.store import Lease
from tests.service.dashboard.conftest import PASSWORD, ReviewedWorld, ShownPlace

CHROMIUM = Path("/usr/bin/chromium")
PAGES = ["", "projects/1/", "projects/1/learning", "projects/1/classes", "projects/1/queue", "projects/1/quality",
         "projects/1/settings"]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Debian's package chromium")]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A project with five trainings and a running round, served with a login."""
    place = ShownPlace(tmp_path_factory.mktemp("shown") / "data", ReviewedWorld)
    place.train(5)
    record = place.store.rounds.request(1, "train", "for the browser")
    place.store.rounds.claim(1, Lease.mine())
    place.store.rounds.report(record.id, "train", {"done": 1, "total": 4, "detail": "loss 0.9"})
    place.running = record.id
    app = place.app(basic_auth_user="op", basic_auth_pass=SecretStr(PASSWORD))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place.url = f"http://127.0.0.1:{server.port}/ui/"
    yield place
    server.shutdown()
    place.store.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe():
    """The accessibility checker's script."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


@pytest.fixture
def open_page(browser, shown):
    """Opens a page at a width; whatever its console says fails the test."""
    said, contexts = [], []

    def open_at(path, width=1280):
        context = browser.new_context(
            viewport={"width": width, "height": 850}, http_credentials={"username": "op", "password": PASSWORD}
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        assert page.goto(shown.url + path).status == 200
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", PAGES)
def test_every_page_fits_and_can_be_read_by_everybody(open_page, axe, path, width):
    page = open_page(path, width)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
    assert len(found["passes"]) > 15, "axe has looked at the page"


@pytest.mark.parametrize("path", ["projects/1/queue", "projects/1/quality"])
def test_images_are_shown(open_page, path):
    page = open_page(path)
    assert page.locator(".frame img").count() >= 3
    for image in page.locator(".frame img").all()[:3]:
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_now_follows_the_round_without_a_reload(open_page, shown):
    page = open_page("projects/1/")
    assert "1 of 4" in page.inner_text("[data-part=round]")
    shown.store.rounds.report(shown.running, "train", {"done": 3, "total": 4, "detail": "loss 0.4"})
    page.locator("[data-part=round]", has_text="3 of 4 · loss 0.4").wait_for()


def test_a_button_is_pressed_by_keyboard_and_only_after_a_second_yes(open_page, shown):
    page = open_page("projects/1/")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Pause":
            break
    page.keyboard.press("Enter")
    with page.expect_response(lambda answer: answer.url.endswith("/live")):
        assert not shown.store.projects.get(1).paused
    assert page.get_by_text("Yes, pause").is_visible(), "a refresh has closed it"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?done=pause")
    assert shown.store.projects.get(1).paused and "Paused" in page.inner_text(".said")
