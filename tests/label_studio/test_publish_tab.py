"""The Data Manager tab: one, in order, and never anybody else's."""

import json
import logging

import httpx
import pytest

from ppal_backend.label_studio.publish import QUEUE_TAB, TAB_TITLE, LabelStudioPublisher, keep_queue_tab
from ppal_backend.rounds.ports import QueueEntry
from tests.label_studio.fake import FakeLabelStudio
from tests.place import CONFIG
from tests.rounds.fakes import SPEC

MINE = {"title": "My tab", "ordering": ["-tasks:id"]}


def column(name, explore, labeling, **more):
    return {"id": name, "visibility_defaults": {"explore": explore, "labeling": labeling}, **more}


COLUMNS = [
    column("image", True, True, parent="data"),
    column("source", True, False, parent="data"),
    column("id", True, False),
    column("completed_at", True, False),
    column("total_annotations", True, True),
    column("predictions_score", False, False),
    column("predictions_model_versions", False, False),
    column("draft_exists", False, False),
    {"id": "data", "type": "List", "children": ["image"]},
]
BESIDE_A_TASK = ["tasks:data.source", "tasks:id", "tasks:completed_at", "tasks:predictions_score",
                 "tasks:predictions_model_versions", "tasks:draft_exists"]  # fmt: skip
IN_QUEUE = ["tasks:completed_at", "tasks:total_annotations", "tasks:predictions_score", "tasks:draft_exists"]
IN_FIRST = ["tasks:predictions_score", "tasks:predictions_model_versions", "tasks:draft_exists"]
MADE = QUEUE_TAB | {"hiddenColumns": {"explore": IN_QUEUE, "labeling": BESIDE_A_TASK}}


class FakeWithTabs(FakeLabelStudio):
    """A Label Studio with Data Manager tabs."""

    def __init__(self, *tabs):
        super().__init__()
        self.project["label_config"] = CONFIG
        self.tabs = [dict(tab) for tab in tabs]

    def _answer(self, request):
        if request.url.path == "/api/dm/columns":
            assert request.url.params["project"] == "1"
            return httpx.Response(200, json={"columns": COLUMNS})
        if request.url.path != "/api/dm/views/":
            return super()._answer(request)
        if request.method == "POST":
            body = json.loads(request.content)
            assert body["project"] == 1
            self.tabs.append(body["data"])
            return httpx.Response(201, json=body)
        assert request.url.params["project"] == "1", "the tabs of all projects would be looked at"
        return httpx.Response(200, json=[{"id": i, "data": tab} for i, tab in enumerate(self.tabs)])

    def publish(self):
        queue = [QueueEntry(task, None) for task in (3, 1, 2)]
        return LabelStudioPublisher(self.client()).publish(SPEC, None, queue, None, lambda state: None)


def test_publishing_makes_the_tab_once_and_leaves_the_others_alone():
    fake = FakeWithTabs(MINE)
    for _ in range(3):
        fake.publish()
    assert fake.tabs == [MINE, MADE]
    unlabelled = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}
    assert fake.tabs[1] == {
        "title": "PPAL queue",
        "ordering": ["tasks:predictions_score"],
        "filters": {"conjunction": "and", "items": [unlabelled]},
        "hiddenColumns": {"explore": IN_QUEUE, "labeling": BESIDE_A_TASK},
    }


def test_a_project_without_tabs_keeps_a_first_one_that_shows_all_tasks():
    fake = FakeWithTabs()
    fake.publish()
    first, second = fake.tabs
    assert (first["title"], first["filters"]["items"]) == ("Default", []) and "ordering" not in first
    assert first["hiddenColumns"] == {"explore": IN_FIRST, "labeling": BESIDE_A_TASK}
    assert second == MADE


def test_a_tab_that_people_changed_stays_as_they_have_it():
    changed = {"title": TAB_TITLE, "ordering": ["tasks:id"], "columnsWidth": {"tasks:id": 90}}
    fake = FakeWithTabs(changed)
    keep_queue_tab(fake.client(), 1)
    assert fake.tabs == [changed] and fake.paths("POST") == [] and fake.paths("PATCH") == []


def test_a_locked_tab_is_not_written(caplog):
    """From 1.24 on a tab can be locked, and writing it is refused."""
    locked = {**MADE, "locked": True}
    fake = FakeWithTabs(locked)
    fake.fault = lambda request: (
        httpx.Response(403, json={"detail": "This view is locked"})
        if request.url.path.startswith("/api/dm/views/") and request.method != "GET"
        else None
    )
    with caplog.at_level(logging.WARNING):
        fake.publish()
    assert fake.served() == [3, 1, 2] and fake.tabs == [locked] and caplog.records == []


def test_a_deleted_tab_comes_back_with_the_next_queue():
    fake = FakeWithTabs(MINE)
    fake.publish()
    fake.tabs.pop()
    fake.publish()
    assert fake.tabs == [MINE, MADE]


@pytest.mark.parametrize(("method", "status"), [("GET", 403), ("GET", 404), ("GET", 502), ("POST", 400), ("POST", 500)])
def test_without_a_tab_the_queue_is_published_all_the_same(method, status, caplog):
    fake = FakeWithTabs(MINE)
    fake.fault = lambda request: (
        httpx.Response(status, json={"detail": "no"})
        if request.url.path == "/api/dm/views/" and request.method == method
        else None
    )
    with caplog.at_level(logging.WARNING, logger="ppal_backend.label_studio.publish"):
        version = fake.publish()
    assert fake.served() == [3, 1, 2] and fake.project["model_version"] == version
    assert fake.tabs == [MINE] and "PPAL queue" in caplog.text


def test_an_answer_that_is_no_list_is_told_and_makes_nothing(caplog):
    fake = FakeWithTabs(MINE)
    fake.after = lambda request, response: (
        httpx.Response(200, json={"results": []}) if request.url.path == "/api/dm/views/" else response
    )
    keep_queue_tab(fake.client(), 1)
    assert fake.tabs == [MINE] and "expected the project's tabs as a list, got dict" in caplog.text


def test_unknown_columns_are_told_and_make_nothing(caplog):
    fake = FakeWithTabs(MINE)
    fake.after = lambda request, response: (
        httpx.Response(200, json=[]) if request.url.path == "/api/dm/columns" else response
    )
    keep_queue_tab(fake.client(), 1)
    assert fake.tabs == [MINE] and "expected the columns of the project's tabs" in caplog.text


def test_an_empty_queue_makes_no_tab():
    fake = FakeWithTabs()
    LabelStudioPublisher(fake.client()).publish(SPEC, None, [], None, lambda state: None)
    assert fake.tabs == []
