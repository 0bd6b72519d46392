"""Which tasks are served to a second person, and what Label Studio is told."""

import json

import pytest

from ppal_backend.errors import LabelStudioError, StateError
from ppal_backend.label_studio.transport import NotFound
from ppal_backend.operations.second_opinions import serve_again, take_back
from ppal_backend.store import ModelVersion


class Client:
    """Tasks by id; remembers what was written."""

    def __init__(self, tasks):
        self.tasks, self.imported, self.patched, self.lost = tasks, [], [], 0
        self.transport = self

    def get(self, path):
        task_id = int(path.rsplit("/", 1)[1])
        if task_id not in self.tasks:
            raise NotFound("no such task")
        return {"id": task_id, **self.tasks[task_id]}

    def import_predictions(self, project_id, body):
        assert project_id == 7
        self.imported += json.loads(body)
        return len(json.loads(body)) - self.lost

    def write(self, method, path, json):
        self.patched.append((method, path, json))
        self.tasks[int(path.rsplit("/", 1)[1])].update(json)


def labelled(*people, overlap=1, is_labeled=True):
    annotations = [{"completed_by": who, "was_cancelled": False} for who in people]
    return {"annotations": annotations, "overlap": overlap, "is_labeled": is_labeled}


@pytest.fixture
def project(store):
    store.projects.connect(7, "7.1", "<View/>", "http://ls", {})
    store.versions.activate(ModelVersion(7, "ppal-7-r1", 1, "retinanet_tiny", "", ("Cat",), None, {}))
    sides = {1: "evaluation", 2: "training", 3: "evaluation", 4: "evaluation", 5: "evaluation", 6: "evaluation"}
    store.sides.add(7, 1, sides)
    return store


@pytest.fixture
def client():
    skipped = labelled(2)
    skipped["annotations"].append({"completed_by": {"id": 3}, "was_cancelled": True})
    return Client({1: labelled(2), 2: labelled(2), 3: labelled(2, 3), 5: skipped, 6: labelled({"id": 2})})


def test_tasks_of_the_evaluation_set_with_one_persons_annotation(project, client):
    assert serve_again(client, project, 7, 2) == [1, 5], "2 trains, 3 has two people, 4 is gone"
    empty = {"result": [], "score": 0.0, "model_version": "ppal-7-r1"}
    assert client.imported == [{"task": 1, **empty}, {"task": 5, **empty}], "in front, with nothing drawn"
    served = {"overlap": 2, "is_labeled": False}
    assert client.patched == [("PATCH", "/api/tasks/1", served), ("PATCH", "/api/tasks/5", served)]
    assert serve_again(client, project, 7, 5) == [6], "those that wait are not taken twice"
    assert serve_again(client, project, 7, 5) == []


def test_they_can_be_taken_back_while_nobody_did_them(project, client):
    serve_again(client, project, 7, 3)
    client.tasks[5] = labelled(2, 3, overlap=2)
    assert take_back(client, project, 7) == [1, 6]
    assert (client.tasks[1]["overlap"], client.tasks[1]["is_labeled"]) == (1, True)
    assert take_back(client, project, 7) == []


def test_nothing_is_changed_where_label_studio_drops_a_prediction(project, client):
    client.lost = 1
    with pytest.raises(LabelStudioError, match="expected Label Studio to take 2 predictions, got 1"):
        serve_again(client, project, 7, 2)
    assert client.patched == []


def test_without_a_measured_task_it_says_what_to_do(store, client):
    store.projects.connect(7, "7.1", "<View/>", "http://ls", {})
    with pytest.raises(StateError, match="label some"):
        serve_again(client, store, 7, 2)
    with pytest.raises(StateError, match="8"):
        serve_again(client, store, 8, 2)
