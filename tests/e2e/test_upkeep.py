"""People change a project's settings on a real Label Studio; a running backend notices within a poll."""

import pytest

from ppal_backend.files import read_json
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.store import LABEL_STUDIO_NOTE
from tests.e2e.conftest import IMAGES
from tests.e2e.test_loop import round_folder

pytestmark = pytest.mark.e2e
POLLS_S = 60


@pytest.fixture
def ranked(backend, make_project, label_studio):
    """A project whose first queue is published; its client."""
    project_id, _ = make_project("upkeep")
    backend.connect(label_studio.session, project_id)
    backend.wait_for_round(project_id, 1, 300)
    return project_id, LabelStudioClient(label_studio.url, label_studio.token)


def shown(client, project_id):
    project = client.project(project_id)
    return project["model_version"], project["sampling"]


def test_a_queue_that_people_break_is_set_right_once_and_told_after_that(backend, ranked, label_studio):
    project_id, client = ranked
    store, wait = backend.store, backend.wait_until
    right = (store.versions.active(project_id).version, "Uncertainty sampling")
    assert shown(client, project_id) == right
    prelabelling_off = {"show_collab_predictions": False}
    path = f"/api/projects/{project_id}/"

    label_studio.session.request("PATCH", path, json={**prelabelling_off, "sampling": "Sequential sampling"})
    assert shown(client, project_id) == ("", "Sequential sampling"), "as Label Studio does it"
    wait(lambda: shown(client, project_id) == right, POLLS_S, "the queue to be set right")
    first = label_studio.session.get(f"/api/projects/{project_id}/next")
    assert first["id"] == read_json(round_folder(backend, project_id, 1) / "query_set.json")["queue"][0], (
        "the order is back"
    )
    assert client.project(project_id)["show_collab_predictions"] is False, "what is people's own stays"
    assert store.projects.get(project_id).problems == {}

    label_studio.session.request("PATCH", path, json={"sampling": "Sequential sampling"})
    wait(lambda: "queue" in store.projects.get(project_id).problems, POLLS_S, "the second change to be told")
    assert "'Sequential sampling'" in store.projects.get(project_id).problems["queue"]
    assert shown(client, project_id) == (right[0], "Sequential sampling"), "and nobody is fought"

    label_studio.session.request("PATCH", path, json={"sampling": "Uncertainty sampling"})
    wait(lambda: store.projects.get(project_id).problems == {}, POLLS_S, "the problem to be taken back")


def test_a_webhook_that_is_off_comes_back_without_a_public_address(backend, ranked, label_studio):
    project_id, client = ranked
    (hook,) = client.webhooks(project_id)
    off = {**hook, "is_active": False, "actions": list(hook["actions"])}
    label_studio.session.request("PATCH", f"/api/webhooks/{hook['id']}", json=off)
    assert client.webhooks(project_id)[0]["is_active"] is False
    backend.wait_until(lambda: client.webhooks(project_id)[0]["is_active"], POLLS_S, "the webhook to be switched on")
    (again,) = client.webhooks(project_id)
    assert (again["url"], sorted(again["actions"])) == (hook["url"], sorted(hook["actions"]))


def test_the_projects_of_a_real_label_studio_are_listed_with_title_and_tasks(backend, make_project, label_studio):
    project_id, _ = make_project("listed")
    rows = LabelStudioClient(label_studio.url, label_studio.token).projects()
    assert {"id": project_id, "title": "listed", "tasks": IMAGES} in rows

    def noted():
        return any(row["id"] == project_id for row in backend.store.notes.get(LABEL_STUDIO_NOTE)[0].get("projects", []))

    backend.wait_until(noted, 60, "the projects of Label Studio in the state database")
