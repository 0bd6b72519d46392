"""Buttons: what they do to the store, and that only a page of this backend can press them."""

import re

import pytest

from ppal_backend.service.dashboard.views import EXTENSION, Actions, FormTokens
from ppal_backend.service.http_errors import RequestError
from ppal_backend.store import Lease, SeenAnnotation


@pytest.fixture
def client(place):
    return place.app().test_client()


def token_of(client, project_id=1):
    return re.search(r'name="token" value="([0-9a-f]{64})"', client.get(f"/ui/projects/{project_id}/").text)[1]


def press(client, action, **fields):
    """Press a button as its page does; what the page says then."""
    answer = client.post(f"/ui/projects/1/{action}", data={"token": token_of(client), **fields}, follow_redirects=True)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_train_now_asks_for_a_training_and_tells_the_worker(place, client):
    assert "A training is asked for" in press(client, "train")
    (record,) = place.store.rounds.of_project(1)
    assert (record.kind, record.state, record.reason) == ("train", "pending", "training was asked for on the dashboard")
    assert place.jobs.synced == [1]


def test_cancel_stops_the_round_and_its_annotations_do_not_ask_again(place, client):
    place.store.ledger.see(1, [SeenAnnotation(i, i) for i in range(5)])
    record = place.store.rounds.request(1, "train", "x")
    place.store.rounds.claim(1, Lease.mine())
    press(client, "cancel")
    assert place.store.rounds.get(record.id).cancel_asked and place.store.ledger.new_count(1) == 0
    assert "cancelling" in client.get("/ui/projects/1/").text


def test_cancelling_nothing_is_told(client):
    answer = client.post("/ui/projects/1/cancel", data={"token": token_of(client)})
    assert answer.status_code == 404 and "no open round" in answer.text


def test_pause_holds_rounds_until_resume(place, client):
    page = press(client, "pause")
    assert place.store.projects.get(1).paused and "Resume" in page and "its rounds are paused" in page
    place.store.rounds.request(1, "train", "x")
    assert place.store.rounds.claim(1, Lease.mine()) is None
    page = press(client, "resume")
    assert not place.store.projects.get(1).paused and "its rounds are paused" not in page
    assert place.store.rounds.claim(1, Lease.mine()) is not None and place.jobs.synced == [1]


def test_roll_back_makes_an_earlier_version_the_one_in_force(place):
    place.train(2)
    first, second = place.versions()
    app = place.app()
    app.extensions[EXTENSION].actions = Actions(app.extensions["ppal"], lambda settings, url: place.client)
    client = app.test_client()
    options = re.findall(r'<option value="([^"]+)"', client.get("/ui/projects/1/").text)
    assert options == [first], "the version in force is none to go back to"
    assert "in force again" in press(client, "rollback", version=first)
    assert place.store.versions.active(1).version == first and place.label_studio.project["model_version"] == first
    assert second != first
    answer = client.post("/ui/projects/1/rollback", data={"token": token_of(client), "version": "../x"})
    assert answer.status_code == 404 and "expected a version of project 1" in answer.text


@pytest.mark.parametrize("token", ["", "0" * 64, "ünïcode"])
@pytest.mark.parametrize("action", ["train", "cancel", "pause", "resume", "rollback"])
def test_a_form_from_elsewhere_does_nothing(place, client, action, token):
    place.store.rounds.request(1, "train", "x")
    before = place.store.rounds.of_project(1)
    answer = client.post(f"/ui/projects/1/{action}", data={"token": token} if token else {})
    assert answer.status_code == 403 and "press once more" in answer.text
    assert place.store.rounds.of_project(1) == before and not place.store.projects.get(1).paused


def test_a_token_is_good_for_one_project_of_one_process(place):
    tokens = FormTokens()
    tokens.check(1, tokens.make(1))
    for wrong in (tokens.make(2), FormTokens().make(1)):
        with pytest.raises(RequestError, match="older than the backend"):
            tokens.check(1, wrong)


def test_looking_changes_nothing(place, client):
    for action in ("train", "cancel", "pause", "resume", "rollback"):
        assert client.get(f"/ui/projects/1/{action}").status_code == 405
    assert client.post("/ui/projects/1/prune", data={"token": token_of(client)}).status_code in (404, 405)
    assert place.store.rounds.of_project(1) == []


def test_a_page_says_only_what_a_button_can_say(client):
    assert "evil" not in client.get("/ui/projects/1/?done=evil").text
