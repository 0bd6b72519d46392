"""Webhook payloads as Label Studio 1.23 sends them, reduced to an event; broken ones are refused."""

import pytest

from ppal_backend.service.http_errors import RequestError
from ppal_backend.service.payloads import LARGEST_ID, Event, Ignored, parse_event, project_of
from tests.service.conftest import CONFIG, annotation_payload


def body(annotations=(), label_config=None, tasks=0, deleted_tasks=()):
    changes = {"annotations": list(annotations), "deleted_tasks": list(deleted_tasks)}
    return {**changes, "label_config": label_config, "tasks": tasks}


@pytest.mark.parametrize("action", ["ANNOTATION_CREATED", "ANNOTATION_UPDATED"])
def test_a_submit_or_update(action):
    event = parse_event(annotation_payload(31, 5, action))
    assert event == Event(7, action, body([{"id": 31, "task_id": 5, "usable": True}]))


def test_a_skip_is_not_usable():
    event = parse_event(annotation_payload(31, 5, was_cancelled=True, result=[{"type": "rectanglelabels"}]))
    assert event.body["annotations"] == [{"id": 31, "task_id": 5, "usable": False}]


def test_an_empty_submit_is_usable():
    assert parse_event(annotation_payload(result=[])).body["annotations"][0]["usable"] is True


def test_the_task_is_found_beside_the_annotation_when_it_does_not_name_it():
    payload = annotation_payload(31, 5)
    del payload["annotation"]["task"]
    assert parse_event(payload).body["annotations"] == [{"id": 31, "task_id": 5, "usable": True}]


def test_the_time_of_the_change_is_kept_as_it_is_told():
    event = parse_event(annotation_payload(31, 5, updated_at="2026-01-01T08:00:00.250000Z"))
    assert event.body["annotations"][0]["changed_at"] == "2026-01-01T08:00:00.250000Z"
    for nothing in (None, "", 5, "yesterday", "2026" * 20, "2026-01-01T08:00:00Z\x00"):
        assert "changed_at" not in parse_event(annotation_payload(updated_at=nothing)).body["annotations"][0]


def test_annotations_made_from_predictions_come_as_lists():
    payload = {
        "action": "ANNOTATIONS_CREATED",
        "annotation": [{"id": 1, "task": 11}, {"id": 2, "task": {"id": 12}}, {"id": 3}],
        "task": [{"id": 11}, {"id": 12}, {"id": 13}],
        "project": {"id": 7},
    }
    assert parse_event(payload).body["annotations"] == [
        {"id": 1, "task_id": 11, "usable": True},
        {"id": 2, "task_id": 12, "usable": True},
        {"id": 3, "task_id": None, "usable": True},
    ]


def test_one_task_beside_several_annotations_is_nobodys():
    payload = {"action": "ANNOTATIONS_CREATED", "annotation": [{"id": 1}, {"id": 2}], "task": {"id": 9}, "project": 7}
    assert [a["task_id"] for a in parse_event(payload).body["annotations"]] == [None, None]


def test_deleted_annotations_have_ids_only():
    event = parse_event({"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 4}, {"id": 9}], "project": {"id": 7}})
    assert event.body["annotations"] == [
        {"id": 4, "task_id": None, "usable": False},
        {"id": 9, "task_id": None, "usable": False},
    ]


def test_new_tasks_are_counted_and_deleted_ones_named():
    payload = {"tasks": [{"id": 1}, {"id": 2}], "project": {"id": 7}}
    assert parse_event({"action": "TASKS_CREATED", **payload}) == Event(7, "TASKS_CREATED", body(tasks=2))
    assert parse_event({"action": "TASKS_DELETED", **payload}) == Event(7, "TASKS_DELETED", body(deleted_tasks=[1, 2]))


def test_a_changed_project_brings_its_label_config():
    event = parse_event({"action": "PROJECT_UPDATED", "project": {"id": 7, "label_config": CONFIG}})
    assert event == Event(7, "PROJECT_UPDATED", body(label_config=CONFIG))


@pytest.mark.parametrize("project", [{"id": 7}, 7, "7", "7.1795336563"])
def test_start_training_in_every_way_a_project_is_named(project):
    assert parse_event({"action": "START_TRAINING", "project": project}) == Event(7, "START_TRAINING", body())


@pytest.mark.parametrize("action", ["LABEL_LINK_CREATED", "REVIEW_CREATED", ""])
def test_unknown_actions_are_ignored_with_a_reason(action):
    ignored = parse_event({"action": action})
    assert isinstance(ignored, Ignored)
    assert repr(action) in ignored.reason


BROKEN = {
    "no object": [],
    "no action": {"project": {"id": 7}},
    "action is a list": {"action": ["ANNOTATION_CREATED"]},
    "only the action, as sent without payload": {"action": "ANNOTATION_CREATED"},
    "no annotation": {"action": "ANNOTATION_CREATED", "project": {"id": 7}},
    "annotation is text": {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": "x"},
    "list with a number": {"action": "ANNOTATIONS_CREATED", "project": {"id": 7}, "annotation": [5]},
    "annotation without id": {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": {}},
    "annotation id is text": {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": {"id": "5"}},
    "annotation id is true": {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": {"id": True}},
    "annotation id too large": {
        "action": "ANNOTATION_CREATED",
        "project": {"id": 7},
        "annotation": {"id": LARGEST_ID + 1},
    },
    "no tasks": {"action": "TASKS_CREATED", "project": {"id": 7}},
    "project is a number": {"action": "PROJECT_UPDATED", "project": 7},
    "label config is a number": {"action": "PROJECT_UPDATED", "project": {"id": 7, "label_config": 5}},
    "label config with half a surrogate": {
        "action": "PROJECT_UPDATED",
        "project": {"id": 7, "label_config": "<View>\ud800</View>"},
    },
    "project id below 1": {"action": "START_TRAINING", "project": {"id": 0}},
    "project id is true": {"action": "START_TRAINING", "project": {"id": True}},
    "project id is a float": {"action": "START_TRAINING", "project": 7.5},
    "project id is other text": {"action": "START_TRAINING", "project": "7; DROP TABLE"},
    "project id is far too large": {"action": "START_TRAINING", "project": 10**30},
}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN.keys())
def test_broken_payloads_are_refused(payload):
    with pytest.raises(RequestError, match="expected") as caught:
        parse_event(payload)
    assert caught.value.status == 400


def test_project_of_reads_the_id_before_the_creation_time():
    assert project_of({"project": "23.1795336563"}) == 23


def test_parse_leaves_its_argument_alone():
    payload = annotation_payload()
    before = repr(payload)
    parse_event(payload)
    assert repr(payload) == before
