"""The pages in a real browser: no console error, no sideways scrolling, readable by everybody, usable by keyboard."""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from werkzeug.serving import make_server

from benchmarks.dashboard import Size, build
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.store import Lease
from tests.service.dashboard.conftest import PASSWORD, PIXEL, ReviewedWorld, ShownPlace

CHROMIUM = Path("/usr/bin/chromium")
PAGES = ["", "projects/1/", "projects/1/learning", "projects/1/classes", "projects/1/errors",
         "projects/1/queue", "projects/1/queue?page=2", "projects/1/similar?task=1022&task=1023",
         "projects/1/approve", "projects/1/quality", "projects/1/settings"]  # fmt: skip
LABEL_STUDIO = "http://ls.test:8080"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Debian's package chromium")]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A project with five trainings and a running round, served with a login."""
    place = ShownPlace(tmp_path_factory.mktemp("shown") / "data", ReviewedWorld, strategy="ppal", delta=4.0)
    place.train(5)
    record = place.store.rounds.request(1, "train", "for the browser")
    place.store.rounds.claim(1, Lease.mine())
    place.store.rounds.report(record.id, "train", {"done": 1, "total": 4, "detail": "loss 0.9"})
    place.running = record.id
    with served(place):
        yield place


@contextmanager
def served(place):
    app = place.app(basic_auth_user="op", basic_auth_pass=SecretStr(PASSWORD))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place.url = f"http://127.0.0.1:{server.port}/ui/"
    yield
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

    def open_at(path, width=1280, place=shown, image=None, **options):
        login = {"username": "op", "password": PASSWORD}
        context = browser.new_context(viewport={"width": width, "height": 850}, http_credentials=login, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        context.route(f"{LABEL_STUDIO}/**", lambda route: route.fulfill(body="<title>Label Studio</title>"))
        if image is not None:  # instead of files that the place does not have
            page.route("**/rounds/*/*/*", lambda route: route.fulfill(body=image, content_type="image/png"))
        assert page.goto(place.url + path).status == 200
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_every_page_fits_and_can_be_read_by_everybody(open_page, axe, path, width, scheme):
    page = open_page(path, width, color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
    assert len(found["passes"]) > 15, "axe has looked at the page"


TABLES = """() => [...document.querySelectorAll(".scroll")].map(box => {
    const rows = [...box.querySelectorAll("tr")].map(row => row.clientHeight), hint = box.previousElementSibling;
    return {
        name: box.getAttribute("aria-label"), goesOn: box.scrollWidth > box.clientWidth + 1, highest: Math.max(...rows),
        said: hint.matches(".scroll-hint") && hint.offsetHeight > 0,
    };
})"""


@pytest.mark.parametrize("path", PAGES)
def test_tables_that_go_on_say_so_and_their_rows_stay_low_on_a_phone(open_page, path):
    page = open_page(path, 390)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    page.evaluate("hints()")
    for table in page.evaluate(TABLES):
        assert table["said"] == table["goesOn"], table
        assert table["highest"] <= 190, table


@pytest.mark.parametrize(
    ("path", "part"), [("approve", "Quality"), ("similar?task=1022", "Queue"), ("errors", "Model errors")]
)
def test_every_page_of_a_project_says_which_part_it_belongs_to(open_page, path, part):
    assert open_page(f"projects/1/{path}").locator("header nav a[aria-current]").all_inner_texts() == [part]


@pytest.mark.parametrize("path", ["projects/1/queue", "projects/1/quality"])
def test_images_are_shown(open_page, path):
    page = open_page(path)
    assert page.locator(".frame img").count() >= 3
    for image in page.locator(".frame img").all()[:3]:
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


@pytest.fixture
def map_page(open_page, shown):
    """The queue with its map drawn, and what the round chose."""

    def open_map(width=1280, **options):
        page = open_page("projects/1/queue", width, **options)
        page.locator("#map[data-ready]").wait_for()
        return page, RoundFolder(shown.folder(5)).read("query_set.json")["image_ids"]

    return open_map


def coloured(page, kind):
    """How many pixels of the map have a kind's colour."""
    return page.evaluate(
        """kind => {
            const rgb = COLOURS[kind].match(/[0-9a-f]{2}/gi).map(part => parseInt(part, 16));
            const copy = new OffscreenCanvas(canvas.width, canvas.height);
            const reader = copy.getContext("2d", { willReadFrequently: true });
            reader.drawImage(canvas, 0, 0);
            const data = reader.getImageData(0, 0, copy.width, copy.height).data;
            let count = 0;
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] > 99 && rgb.every((value, n) => Math.abs(data[i + n] - value) < 4)) count++;
            return count;
        }""",
        kind,
    )


def point_at(page, task_id):
    """Where a task's point is on the screen."""
    page.locator("#map canvas").scroll_into_view_if_needed()
    return page.evaluate(
        """task => {
            const box = canvas.getBoundingClientRect(), index = byTask.get(task);
            return [box.left + at[2 * index], box.top + at[2 * index + 1]];
        }""",
        task_id,
    )


def test_the_map_draws_every_kind_and_hides_what_is_not_wanted(map_page):
    page, _ = map_page()
    kinds = page.eval_on_selector_all(".layers input", "all => all.map(one => one.value)")
    assert kinds == [k for k in "pcrls" if k in page.evaluate("points.kinds")] and {"p", "c", "l"} <= set(kinds)
    assert page.evaluate("points.ids.length") == 80, "10 of the pool, 70 that are labelled"
    for kind in kinds:
        assert coloured(page, kind) >= 5, kind
        page.locator(f".layers input[value={kind}]").uncheck()
        assert coloured(page, kind) == 0, kind


def test_pointing_at_the_map_shows_image_place_and_reason_and_a_press_opens_the_task(map_page):
    page, chosen = map_page()
    page.mouse.move(*point_at(page, chosen[0]))
    card = page.locator("#map .shown")
    card.get_by_text(f"Task {chosen[0]}").wait_for()
    assert "next to label, place 1" in card.inner_text() and "Not sure" in card.inner_text()
    assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    with page.context.expect_page() as opened:
        page.mouse.click(*point_at(page, chosen[0]))
    assert opened.value.url == f"{LABEL_STUDIO}/projects/1/data?task={chosen[0]}"


def test_the_map_is_walked_by_keyboard_in_the_order_of_the_queue(map_page, axe):
    page, chosen = map_page()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === canvas"):
            break
    card = page.locator("#map .shown")
    for key, task in (("ArrowRight", chosen[0]), ("ArrowRight", chosen[1]), ("End", chosen[4]), ("Home", chosen[0])):
        page.keyboard.press(key)
        card.get_by_text(f"Task {task}", exact=True).wait_for()
        assert f"place {chosen.index(task) + 1}" in card.inner_text()
    assert card.get_attribute("aria-live") == "polite", "it is read out"
    page.evaluate(axe)
    assert [v["id"] for v in page.evaluate("axe.run()")["violations"]] == []
    with page.context.expect_page() as opened:
        page.keyboard.press("Enter")
    assert opened.value.url == f"{LABEL_STUDIO}/projects/1/data?task={chosen[0]}"


def test_the_list_beside_the_map_points_at_it(map_page):
    page, chosen = map_page()
    links = page.locator("#map .chosen a")
    assert links.all_inner_texts() == [f"Task {task}" for task in chosen]
    links.nth(3).focus()
    page.locator("#map .shown").get_by_text(f"Task {chosen[3]}").wait_for()
    assert page.evaluate("points.ids[picked]") == chosen[3]


def test_a_finger_picks_and_opens_nothing(map_page):
    page, chosen = map_page(390, has_touch=True)
    page.touchscreen.tap(*point_at(page, chosen[0]))
    page.locator("#map .shown img").wait_for()
    assert page.evaluate("points.kinds[picked]") == "p" and page.url.endswith("/queue")


def test_twenty_thousand_points_are_drawn_and_can_be_pointed_at(open_page, tmp_path_factory):
    place = ShownPlace(tmp_path_factory.mktemp("large") / "data")
    build(place.settings, place.store, Size(rounds=1))
    with served(place):
        page = open_page("projects/1/queue", place=place, image=PIXEL)
        page.locator("#map[data-ready]").wait_for()
        assert page.evaluate("points.ids.length") == 22_000 and coloured(page, "r") > 5000
        page.mouse.move(*point_at(page, 7))
        page.locator("#map .shown .tag", has_text="next to label").wait_for()


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


def test_a_line_round_images_lists_them_and_opens_none(map_page):
    page, chosen = map_page()
    page.locator("#map canvas").scroll_into_view_if_needed()
    box = page.locator("#map canvas").bounding_box()
    left, top, right, low = box["x"] + 2, box["y"] + 2, box["x"] + box["width"] - 2, box["y"] + box["height"] - 2
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, low), (left, low), (left, top + 9)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()
    listed = page.locator("#map .lassoed")
    assert "80 images within the line" in listed.inner_text()
    assert listed.locator("li a").first.inner_text() == f"Task {chosen[0]}", "what is next to label comes first"
    assert len(page.context.pages) == 1


def test_near_enough_images_show_themselves(map_page, shown):
    page, chosen = map_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.mouse.move(*point_at(page, chosen[1]))
    page.locator("#map .shown").get_by_text(f"Task {chosen[1]}").wait_for()
    for _ in range(6):
        page.get_by_role("button", name="Nearer").click()
    for _ in range(100):  # the page allows no script of others, which waiting for a function is
        if page.evaluate("[...small.values()].some((image) => image.naturalWidth > 0)"):
            break
        page.wait_for_timeout(50)
    assert page.evaluate("[...small.values()].some((image) => image.naturalWidth > 0)"), "an image is there"
    assert any("/thumbnails/" in url for url in asked)
    assert page.evaluate("view.zoom") == 64 and page.evaluate("small.size") <= 24 * 5
    x, y = point_at(page, chosen[1])
    box = page.locator("#map canvas").bounding_box()
    assert box["x"] < x < box["x"] + box["width"] and box["y"] < y < box["y"] + box["height"], "it stays in sight"
    page.get_by_role("button", name="Whole map").click()
    assert page.evaluate("view.zoom") == 1


def test_the_map_is_coloured_and_filtered_by_class(map_page, axe):
    page, _ = map_page()
    assert page.locator("#only-class option").all_inner_texts() == ["all classes", "cat", "dog"]
    all_shown = page.evaluate("points.ids.filter((_, i) => isShown(i, visible())).length")
    page.locator("#only-class").select_option(label="dog")
    dogs = page.evaluate("points.ids.filter((_, i) => isShown(i, visible())).length")
    assert 0 < dogs < all_shown and dogs == page.evaluate("points.classes.filter((c) => c === 1).length")
    page.locator("#only-class").select_option(label="all classes")
    page.locator("#by-class").check()
    assert page.locator("#map-key li").all_inner_texts() == ["cat", "dog"] and page.locator("#map-key").is_visible()
    drawn = [page.evaluate(f"colour(points.classes.indexOf({c}))") for c in (0, 1)]
    colours = "all => all.map(one => getComputedStyle(one).getPropertyValue('--class'))"
    told = page.locator("#map-key li").evaluate_all(colours)
    assert drawn == told and len(set(drawn)) == 2, "the key shows the colours that are drawn"
    page.evaluate(axe)
    assert [v["id"] for v in page.evaluate("axe.run()")["violations"]] == []


def test_model_errors_are_filtered_by_keyboard_and_a_picture_opens_its_task(open_page, axe):
    page = open_page("projects/1/errors")
    before = page.locator(".pick").count()
    page.locator("select[name=show]").focus()
    page.keyboard.press("m")  # a select takes the option that begins with what is typed
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Show":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/errors?show=missed*")
    assert 0 < page.locator(".pick").count() <= before and "Wrong:" not in page.inner_text(".gallery")
    page.evaluate(axe)
    assert [v["id"] for v in page.evaluate("axe.run()")["violations"]] == []
    with page.context.expect_page() as opened:
        page.locator(".pick .frame").first.click()
    assert opened.value.url.startswith(f"{LABEL_STUDIO}/projects/1/data?task=")


def test_a_number_of_the_matrix_shows_its_boxes_narrow_and_dark(open_page, axe):
    page = open_page("projects/1/errors", 390, color_scheme="dark")
    number = page.locator(".confusion td.mistake a").first
    boxes = number.inner_text()
    number.focus()
    page.keyboard.press("Enter")
    page.get_by_text("Only what is").wait_for()
    assert f"{boxes} box" in page.inner_text("main")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "it scrolls sideways"
    page.evaluate(axe)
    assert [v["id"] for v in page.evaluate("axe.run()")["violations"]] == []
