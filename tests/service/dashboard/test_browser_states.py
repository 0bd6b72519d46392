"""Every state of a project in a real browser, wide and narrow, light and dark: what is wrong is told, nothing hidden,
everybody can read it, and Try again is pressed by keyboard."""

import pytest

from ppal_backend.operations import control
from ppal_backend.store import Heartbeat, Lease
from tests.service.dashboard.conftest import ShownPlace
from tests.service.dashboard.test_browser import axe, browser, open_page, pytestmark, served  # noqa: F401

DOWN = "cannot reach Label Studio at http://ls.test:8080; check that it is up"


def claimed(place, kind="train"):
    record = place.store.rounds.request(1, kind, "5 new annotations")
    place.store.rounds.claim(1, Lease.mine())
    return record


def before(place):
    place.store.projects.poll_ended(1, title="A title without any spaces in it: " + "x" * 90)


def during(place):
    place.store.rounds.report(claimed(place).id, "train", {"done": 1, "total": 4, "detail": "loss 0.9"})


def failed(place):
    place.store.rounds.fail(claimed(place).id, "training needs at least 2 annotated images, got 1; annotate more tasks")


def waiting(place):
    place.store.rounds.release(claimed(place).id, 120.0, DOWN)
    place.store.projects.set_problem(1, "poll", DOWN)
    place.store.projects.poll_ended(1, "unavailable")


def paused(place):
    place.store.rounds.release(claimed(place).id)
    control.pause(place.store, 1)


def unreadable(place):
    text = "3 of 90 images cannot be used: gone (3 x); the first is task 7, make them readable and run a round"
    place.store.projects.set_problem(1, "images", text)


def random_order(place):
    text = (
        "the project shows no predictions, so tasks come in random order; switch on Use predictions to prelabel tasks"
    )
    place.store.projects.set_problem(1, "queue", text)


def too_few(place):
    place.world.evaluated = 4
    place.train(3)  # the hash draws none of the first ten images


STATES = {
    before: ("No model yet", None),
    during: ("this step about", None),
    failed: ("Round 1 failed: training needs at least 2", "failed"),
    waiting: ("Next try in 2 min", "failed"),
    paused: ("Paused: its rounds are paused", "note"),
    unreadable: ("Images cannot be used: 3 of 90", "failed"),
    random_order: ("Tasks do not come in the order of the queue", "failed"),
    too_few: ("Measured on 4 images: too few to tell", None),
}


@pytest.fixture(scope="module", params=STATES, ids=lambda state: state.__name__)
def state(request, tmp_path_factory):
    place = ShownPlace(tmp_path_factory.mktemp("state") / "data")
    request.param(place)
    place.heartbeat = Heartbeat(place.store.workers)
    place.said, place.kind = STATES[request.param]
    place.name = request.param.__name__
    with served(place):
        yield place


@pytest.fixture(autouse=True)
def worker(state):
    """A worker runs, however long the tests before this one took."""
    state.heartbeat.beat()


@pytest.fixture(scope="module")
def shown(state):
    return state


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_state_is_told_and_can_be_read(open_page, axe, state, width, scheme):  # noqa: F811
    page = open_page("projects/1/", width, place=state, color_scheme=scheme)
    text = " ".join(page.inner_text("main").split())
    assert state.said in text
    found = page.locator(".finding").evaluate_all("all => all.map(one => one.className)")
    assert found == ([f"finding {state.kind}"] if state.kind else []), "nothing else is wrong"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 24, 29)"
    assert dark == (scheme == "dark")
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []


@pytest.mark.parametrize("page_name", ["learning", "classes", "queue", "quality", "settings"])
def test_the_banner_stands_on_every_page(open_page, state, page_name):  # noqa: F811
    page = open_page(f"projects/1/{page_name}", 390, place=state)
    assert page.locator(".banner .finding").count() == (1 if state.kind else 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "it scrolls sideways"


def test_times_are_the_readers_own(open_page, state):  # noqa: F811
    if not state.store.rounds.of_project(1) or state.store.rounds.last(1).finished_at is None:
        return
    page = open_page("projects/1/", place=state, timezone_id="Asia/Tokyo", locale="en-GB")
    shown = page.locator("time").first
    hour = page.evaluate("new Date(document.querySelector('time').dateTime).getHours()")
    assert f"{hour:02d}:" in shown.inner_text() and "UTC" in shown.get_attribute("title")


def test_try_again_is_pressed_by_keyboard(open_page, state):  # noqa: F811
    page = open_page("projects/1/", place=state)
    if page.get_by_role("button", name="Try again").count() == 0:
        assert state.name not in ("failed", "waiting")
        return
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Try again":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/?done=retry")
    assert state.store.projects.get(1).poll_asked
