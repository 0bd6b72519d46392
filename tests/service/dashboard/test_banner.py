"""The banner: on every page, in the words of ``ppal status``, with its button."""

import html
import re

import pytest
from typer.testing import CliRunner

from ppal_backend.cli import app as cli
from ppal_backend.store import Heartbeat, Lease
from tests.service.dashboard.test_buttons import press

PAGES = ["", "live", "learning", "classes", "queue", "quality", "settings"]
DOWN = "cannot reach Label Studio at http://ls.test:8080; check that it is up"


@pytest.fixture
def client(place):
    Heartbeat(place.store.workers).beat()
    return place.app().test_client()


def banner_of(answer):
    found = re.search(r'<section class="banner".*?</section>', answer.text, re.S)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", found[0]).split())) if found else ""


def fail(place, error="training needs at least 2 annotated images, got 1; annotate more tasks"):
    record = place.store.rounds.request(1, "train", "x")
    place.store.rounds.claim(1, Lease.mine())
    place.store.rounds.fail(record.id, error)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_tells_cause_advice_and_try_again_in_the_words_of_status(place, client, page, monkeypatch):
    assert banner_of(client.get(f"/ui/projects/1/{page}")) == ""
    fail(place)
    place.store.projects.set_problem(1, "queue", "task sampling is 'Sequential'; run ppal connect")
    banner = banner_of(client.get(f"/ui/projects/1/{page}"))
    assert "Round 1 failed: training needs at least 2 annotated images, got 1." in banner
    assert "Annotate more tasks." in banner and "Try again" in banner and "1 more" in banner
    assert "Tasks do not come in the order of the queue: task sampling is 'Sequential'. Run ppal connect." in banner
    monkeypatch.setenv("MODEL_DIR", str(place.settings.model_dir))
    monkeypatch.setenv("PPAL_MIN_FREE_GIB", "0")
    told = " ".join(CliRunner().invoke(cli, ["status"]).stdout.split())
    assert "failed Round 1 failed: training needs at least 2 annotated images, got 1 -> Annotate more tasks." in told
    assert "Tasks do not come in the order of the queue: task sampling is 'Sequential' -> run ppal connect" in told


def test_the_projects_page_has_the_banner_of_each_and_what_concerns_all_once(place, client):
    fail(place)
    place.store.workers.leave(str(Lease.mine()))
    page = client.get("/ui/").text
    assert page.count("No worker runs") == 1 and page.count("Round 1 failed") == 1


def test_a_waiting_round_is_not_shown_as_running(place, client):
    record = place.store.rounds.request(1, "train", "x")
    place.store.rounds.claim(1, Lease.mine())
    place.store.rounds.report(record.id, "export", {})
    assert '<span class="tag run">running</span>' in client.get("/ui/projects/1/").text
    place.store.rounds.release(record.id, 120.0, DOWN)
    place.store.projects.set_problem(1, "poll", DOWN)
    place.store.projects.poll_ended(1, "unavailable")
    answer = client.get("/ui/projects/1/")
    banner = banner_of(answer)
    assert "Waiting for Label Studio: cannot reach" in banner and "Next try in 2 min." in banner
    assert '<span class="tag warn">waiting</span>' in answer.text and ">running</span>" not in answer.text
    assert "left" not in re.search(r'data-part="round".*?</section>', answer.text, re.S)[0]


def test_try_again_starts_what_failed(place, client):
    fail(place)
    assert "It is tried again" in press(client, "retry")
    last = place.store.rounds.last(1)
    assert (last.number, last.kind, last.state) == (2, "train", "pending") and place.jobs.synced == [1]
    assert banner_of(client.get("/ui/projects/1/")) == ""


def test_what_a_finding_quotes_is_no_markup(place, client):
    fail(place, "expected <b>x</b>, got <script>; do <i>that</i>")
    page = client.get("/ui/projects/1/queue").text
    assert "<script>" not in page.replace("<script src", "") and "&lt;script&gt;" in page
