"""The page on which people look at pre-annotations and approve them together."""

import re
from contextlib import contextmanager

import pytest

from ppal_backend.service.app import create_app
from ppal_backend.service.dashboard.views import EXTENSION, Actions
from tests.operations.test_approvals import FACTS
from tests.service.conftest import FakeImages, FakePredictor
from tests.service.dashboard.conftest import LearningWorld, ShownPlace


class MeasuredWorld(LearningWorld):
    """People have kept 95 % of 200 boxes."""

    def prepare(self, folder, on_progress):
        data = super().prepare(folder, on_progress)
        return type(data)(**{**vars(data), "report": {**data.report, **FACTS}})


@pytest.fixture
def place(make_place):
    place = make_place(ShownPlace, world=MeasuredWorld)
    place.train(1)
    return place


@pytest.fixture
def client(place):
    app = create_app(
        place.settings, store=place.store, jobs=place.jobs, predictor=FakePredictor(), images=FakeImages(None)
    )

    @contextmanager
    def connect(*_):
        yield place.client

    dashboard = app.extensions[EXTENSION]
    dashboard.actions = Actions(dashboard.runtime, connect)
    return app.test_client()


def page_of(client, query="?at=0.5"):
    answer = client.get(f"/ui/projects/1/approve{query}")
    assert answer.status_code == 200, answer.text
    return " ".join(answer.text.split())


def press(client, route, page, **fields):
    token = re.search(r'name="token" value="([0-9a-f]{64})"', page)[1]
    answer = client.post(f"/ui/projects/1/{route}", data={"token": token, **fields}, follow_redirects=True)
    return answer.status_code, " ".join(answer.text.split())


def offered(page):
    return [int(i) for i in re.findall(r'name="task" value="(\d+)" checked', page)]


def test_it_tells_the_measured_precision_and_approves_what_is_ticked(place, client):
    page = page_of(client)
    assert "At 0.5, <b>95 % of 200 such boxes were kept by people (" in page
    tasks = offered(page)
    assert len(tasks) >= 3 and "27 of 30" in page
    version = re.search(r'name="version" value="([^"]+)"', page)[1]
    status, after = press(client, "approve", page, version=version, at="0.5", task=tasks[:2], annotator="")
    assert status == 200 and "Approved: Label Studio has the annotations" in after
    assert [len(place.label_studio.tasks[i]["annotations"]) for i in tasks[:3]] == [1, 1, 0], "one was not ticked"
    assert (
        not set(tasks[:2]) & set(offered(page_of(client))) and "2 images of" in after and "marked as the model" in after
    )
    status, after = press(client, "undo-approval", after, batch=1)
    assert status == 200 and "The batch is undone" in after and offered(page_of(client)) == tasks
    assert place.label_studio.tasks[tasks[0]]["annotations"] == []


def test_what_changed_meanwhile_is_told(place, client):
    page = page_of(client)
    one, two, *_ = offered(page)
    version = re.search(r'name="version" value="([^"]+)"', page)[1]
    del place.label_studio.tasks[one]
    _, after = press(client, "approve", page, version=version, at="0.5", task=[one, two])
    assert "Approved but for images that were labelled or deleted meanwhile" in after
    _, after = press(client, "approve", page, version=version, at="0.5", task=[one])
    assert "None was approved" in after
    place.label_studio.tasks[two]["annotations"][0]["result"] = []
    _, after = press(client, "undo-approval", after, batch=1)
    assert "people have changed since" in after and len(place.label_studio.tasks[two]["annotations"]) == 1


def test_it_is_off_until_enough_was_measured_and_says_what_is_missing(make_place):
    place = make_place(ShownPlace)
    client = place.app().test_client()
    assert "<b>Off:</b> no such box was shown to people yet. 100 more boxes and 20 more images are missing" in page_of(
        client
    )
    place.train(1)
    page = page_of(client, "?at=0.9")
    assert "From 0.9" in page and "<b>Off:</b>" in page and offered(page) == []
    status, after = press(client, "approve", client.get("/ui/projects/1/").text, version="x", at="0.9", task=[1000])
    assert status == 404 and "100 boxes and 20 images are missing" in after


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"at": "0.5"}, 404, "expected 1 to 60 tasks"),
        ({"at": "0.33", "task": 1001}, 404, "a confidence that is measured"),
        ({"at": "x", "task": 1001}, 404, "a confidence that is measured"),
        ({"at": "0.5", "task": 1001, "version": "<b>"}, 404, "another one was published"),
    ],
)
def test_what_cannot_be_approved_is_told(place, client, fields, status, text):
    found, after = press(client, "approve", page_of(client), **fields)
    assert (found, text in after) == (status, True) and place.store.approvals.batches(1) == []


def test_a_batch_that_is_none_and_a_foreign_form_are_refused(place, client):
    status, after = press(client, "undo-approval", page_of(client), batch=9)
    assert status == 404 and "has no batch 9" in after
    for route in ("approve", "undo-approval"):
        assert client.post(f"/ui/projects/1/{route}", data={"token": "0" * 64}).status_code == 403
