"""Two people on one task of a real Label Studio: a second opinion is asked for, and what is learned of it."""

import json
import uuid

import pytest
import requests
from PIL import Image

from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.source import LabelStudioSource, image_cache
from ppal_backend.operations.second_opinions import serve_again, take_back
from ppal_backend.rig.label_studio_server import personal_token
from ppal_backend.rig.session import LabelStudioSession
from ppal_backend.store import ModelVersion

pytestmark = pytest.mark.e2e

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Cat"/><Label value="Dog"/></RectangleLabels></View>'
)


@pytest.fixture(scope="module")
def second(label_studio):
    """A session of a second person, who joined by the organization's invitation."""
    address = label_studio.url + label_studio.session.get("/api/invite")["invite_url"]
    email = f"{uuid.uuid4().hex}@example.com"
    with requests.Session() as browser:
        browser.get(address, timeout=60)
        form = {"email": email, "password": "second-user", "csrfmiddlewaretoken": browser.cookies["csrftoken"]}
        browser.post(address, data=form, headers={"Referer": address}, allow_redirects=False, timeout=60)
    return LabelStudioSession(label_studio.url, personal_token(label_studio.url, email, "second-user"))


def box(label, x, y):
    value = {"x": x, "y": y, "width": 40, "height": 40, "rotation": 0, "rectanglelabels": [label]}
    return {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "original_width": 100,
            "original_height": 100, "value": value}  # fmt: skip


def annotate(session, task_id, *boxes):
    session.post(f"/api/tasks/{task_id}/annotations/", json={"result": list(boxes)})


def test_a_second_opinion_is_served_to_the_other_person_and_their_consensus_is_learned(
    label_studio, second, settings, store, tmp_path
):
    first = label_studio.session
    for number in range(4):
        Image.effect_noise((100, 100), 60).convert("RGB").save(tmp_path / f"{number}.jpg")
    project = label_studio.create_project("two people", CONFIG, sampling="Uncertainty sampling")
    tasks = sorted(label_studio.import_images(project, [tmp_path / f"{n}.jpg" for n in range(4)]))
    done, queue = tasks[2], [tasks[3], tasks[0], tasks[1]]
    annotate(first, done, box("Cat", 10, 10))
    rows = [{"task": t, "result": [], "score": n / 1000, "model_version": "v1"} for n, t in enumerate(queue, start=1)]
    first.post(f"/api/projects/{project}/import/predictions", json=rows)
    first.request("PATCH", f"/api/projects/{project}/", json={"model_version": "v1"})
    store.projects.connect(project, f"{project}.1", CONFIG, label_studio.url, {})
    store.versions.activate(ModelVersion(project, "v1", 1, "retinanet_tiny", "", ("Cat", "Dog"), None, {}))
    store.sides.add(project, 1, {done: "evaluation"})

    with LabelStudioClient(label_studio.url, label_studio.token) as client:
        assert serve_again(client, store, project, 3) == [done]
        assert take_back(client, store, project) == [done] and serve_again(client, store, project, 3) == [done]
        served = second.get(f"/api/projects/{project}/next")
        assert served["id"] == done, "in front of the queue"
        assert [p["result"] for p in served["predictions"]] in ([[]], [[], []]), "nothing is drawn on it"
        assert first.get(f"/api/projects/{project}/next")["id"] == queue[0], "not to whoever did it"
        annotate(second, done, box("Cat", 14, 10), box("Dog", 55, 55))
        assert second.get(f"/api/projects/{project}/next")["id"] != done
        assert first.get(f"/api/tasks/{done}")["is_labeled"] is True

        source = LabelStudioSource(client, image_cache(settings, client), project)
        (tmp_path / "export").mkdir()
        source.export(tmp_path / "export")
        data = source.prepare(tmp_path / "export", lambda progress: None)
    names = {category.id: category.name for category in data.labelled.categories}
    learned = {names[a.category_id]: a.bbox_xywh for a in data.labelled.annotations}
    assert learned == {"Cat": pytest.approx((12, 10, 40, 40)), "Dog": pytest.approx((55, 55, 40, 40))}
    people = data.report["people"]
    assert people["tasks"] == 1 and people["by_task"] == [[done, pytest.approx(2 / 3, abs=1e-4)]]
    (pair,) = people["pairs"]
    who = {s.get("/api/current-user/whoami")["id"] for s in (first, second)}
    assert set(pair["people"]) == who and (pair["same"], pair["other_label"], pair["alone"]) == (2, 0, 1)
    json.dumps(data.report)
