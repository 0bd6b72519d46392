"""The client, the queue and the image source against a real Label Studio."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppal_backend.datasets.images import ImageCache
from ppal_backend.datasets.label_studio_json import annotations_to_coco
from ppal_backend.errors import ImageError, LabelStudioAuthError, PublishError
from ppal_backend.label_studio.client import LabelStudioClient, read_export
from ppal_backend.label_studio.image_source import ImageSource
from ppal_backend.label_studio.publish import QueueItem, delete_version, prune_versions, publish
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.label_studio.snapshot import read_pool, take_snapshot
from ppal_backend.label_studio.transport import NotFound

pytestmark = pytest.mark.e2e

CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image" model_score_threshold="0.3">
<Label value="Cat" alias="c1" predicted_values="kitty"/><Label value="Dog"/></RectangleLabels></View>"""


class Project:
    """A project of ``count`` tasks, and what a person would do in it."""

    def __init__(self, server, count: int) -> None:
        self.session = server.session
        self.id = server.create_project("client tests", CONFIG)
        rows = [{"data": {"image": f"/data/upload/1/{i}.jpg"}} for i in range(count)]
        self.session.post(f"/api/projects/{self.id}/import", json=rows)
        self.client = LabelStudioClient(server.url, server.token)
        self.tasks = list(self.client.task_ids(self.id))

    def annotate(self, task_id: int, result: list, **fields) -> dict:
        return self.session.post(f"/api/tasks/{task_id}/annotations", json={"result": result, **fields})

    def exported(self, folder: Path) -> list[dict]:
        return list(read_export(self.client.download_export(self.id, folder / "export.json")))

    def next_task(self) -> dict | None:
        """The task that Label Studio serves this user next, None when all is done."""
        try:
            return self.client.transport.get(f"/api/projects/{self.id}/next")
        except NotFound:
            return None

    def prediction_pairs(self) -> list[tuple[int, str]]:
        rows = self.session.get("/api/predictions", params={"project": self.id})
        return [(row["task"], row["model_version"]) for row in rows]


@pytest.fixture
def project(label_studio):
    return Project(label_studio, 8)


def box(label="c1", x=10.0, score=0.8):
    value = {"x": x, "y": 10, "width": 20, "height": 30, "rotation": 0, "rectanglelabels": [label]}
    region = {"id": "r1", "from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}
    return region | {"original_width": 100, "original_height": 80, "image_rotation": 0, "score": score}


def shuffled(tasks):
    return [int(i) for i in np.random.default_rng(0).permutation(tasks)]


def test_both_kinds_of_token(label_studio):
    with LabelStudioClient(label_studio.url, label_studio.token) as client:
        assert client.token_kind == "pat"
        assert client.whoami()["email"] == label_studio.username
        assert client.version().startswith("1.")
    legacy = label_studio.session.get("/api/current-user/token")["token"]
    with LabelStudioClient(label_studio.url, legacy) as client:
        assert client.token_kind == "legacy"
        label_studio.session.post(
            "/api/jwt/settings", json={"api_tokens_enabled": True, "legacy_api_tokens_enabled": False}
        )
        with pytest.raises(LabelStudioAuthError, match="legacy tokens are off by default") as caught:
            client.whoami()
        assert legacy not in str(caught.value)
        label_studio.session.post(
            "/api/jwt/settings", json={"api_tokens_enabled": True, "legacy_api_tokens_enabled": True}
        )
        assert client.whoami()["email"] == label_studio.username
    with pytest.raises(LabelStudioAuthError, match="Personal Access Token"):
        LabelStudioClient(label_studio.url, label_studio.token[:-4] + "AAAA").whoami()


def test_reading_tasks_and_annotations(project, tmp_path):
    first, second, third, fourth = project.tasks[:4]
    made = project.annotate(first, [box()])
    project.annotate(second, [box()], was_cancelled=True)
    project.annotate(third, [])
    project.annotate(fourth, [box("Cat"), box("Gone")])
    unlabelled = dict(project.client.unlabelled_tasks(project.id))
    assert list(unlabelled) == [second, *project.tasks[4:]], "a skipped task stays in the pool"
    assert unlabelled[second] == {"image": "/data/upload/1/1.jpg"}
    exported = project.exported(tmp_path)
    assert [task["id"] for task in exported] == [first, second, third, fourth]
    parts = project.client._export_in_parts(project.id, tmp_path / "parts.json")
    assert list(read_export(parts)) == exported, "what is read in parts is what is read as a whole"
    assert project.client.task_count(project.id) == len(list(project.client.all_tasks(project.id)))
    counted = list(project.client.annotated_task_ids(project.id)), project.client.annotated_task_count(project.id)
    assert counted == ([first, third, fourth], 3)

    stamps = list(project.client.tasks_updated_since(project.id, None))
    by_id = {stamp.id: stamp for stamp in stamps}
    assert by_id[first].annotations[0].id == made["id"]
    assert by_id[first].annotations[0].created_at == made["created_at"]
    assert [by_id[second].annotations[0].was_cancelled, by_id[project.tasks[5]].annotations] == [True, ()]
    told = list(project.client.exported_stamps(project.id, project.tasks))
    assert told == [by_id[i] for i in (first, second, third, fourth)], "an export tells the same"
    later = [s.id for s in project.client.tasks_updated_since(project.id, by_id[third].updated_at)]
    assert later == [third, fourth]

    whole_second = project.client.tasks_updated_since(project.id, "2020-01-01T00:00:00Z")
    assert sorted(stamp.id for stamp in whole_second) == sorted(project.tasks)

    schema = parse_label_config(str(project.client.project(project.id)["label_config"]))
    assert (schema.labels, schema.score_threshold, dict(schema.predicted_values)) == (
        ("c1", "Dog"),
        0.3,
        {"kitty": "c1"},
    )
    infos = {i: _info(i) for i in project.tasks}
    dataset, report = annotations_to_coco(exported, schema, infos)
    assert dataset.image_ids == (first, third, fourth)
    assert [(row.image_id, row.category_id) for row in dataset.annotations] == [(first, 1), (fourth, 1)]
    assert (report.unannotated, report.negatives, report.unknown_labels) == (1, 1, {"Gone": 1})


def test_tasks_that_have_only_a_ground_truth_are_counted(project):
    """The project's own count leaves them out; a poll asks for this one before it takes them for deleted."""
    first, second = project.tasks[:2]
    project.annotate(first, [box()])
    project.annotate(second, [box()], ground_truth=True)
    counts = project.client.project(project.id)
    assert (counts["num_tasks_with_annotations"], counts["total_annotations_number"]) == (1, 2)
    assert list(project.client.annotated_task_ids(project.id)) == [first, second]
    assert project.client.annotated_task_count(project.id) == 2


def test_events_and_polls_tell_the_same_time_of_a_change(project):
    """Of a change that both tell of a second correction would be made."""
    first, second = project.tasks[:2]
    made = project.annotate(first, [box()])
    project.annotate(second, [box()])

    def polled():
        stamps = project.client.tasks_updated_since(project.id, None)
        return next(stamp.annotations[0].updated_at for stamp in stamps if stamp.id == first)

    assert polled() == made["updated_at"]
    changed = project.client.transport.write("PATCH", f"/api/annotations/{made['id']}/", json={"result": [box("Cat")]})
    assert polled() == changed["updated_at"] > made["updated_at"]
    project.annotate(second, [box()])
    assert polled() == changed["updated_at"], "what happens to other tasks changes nothing"


def _info(task_id):
    from ppal_backend.datasets.images import ImageInfo

    return ImageInfo(task_id, Path(f"/c/{task_id}.jpg"), 100, 80)


def test_paging_over_many_tasks(label_studio, monkeypatch):
    monkeypatch.setattr("ppal_backend.label_studio.client.PAGE_SIZE", 7)
    project = Project(label_studio, 30)
    assert len(project.tasks) == len(set(project.tasks)) == 30
    assert len(list(project.client.unlabelled_tasks(project.id))) == 30
    assert len({stamp.id for stamp in project.client.tasks_updated_since(project.id, None)}) == 30
    for task_id in project.tasks[:20]:
        project.annotate(task_id, [])
    action = {"id": "delete_tasks_annotations", "project": project.id}
    project.session.post("/api/dm/actions", params=action, json={"selectedItems": {"all": True, "excluded": []}})
    stamps = list(project.client.tasks_updated_since(project.id, None))
    assert sorted(stamp.id for stamp in stamps) == project.tasks
    assert len({stamp.updated_at for stamp in stamps}) <= 11, "one action, one time"
    at_once = list(project.client.tasks_updated_since(project.id, stamps[-1].updated_at))
    assert sorted(stamp.id for stamp in at_once) == project.tasks[:20]


def test_label_studio_serves_the_published_order_with_its_boxes(project):
    order = shuffled(project.tasks)
    items = [QueueItem(task_id, [box(x=rank)]) for rank, task_id in enumerate(order)]
    result = publish(project.client, project.id, "r1", items)
    state = project.client.project(project.id)
    assert (state["model_version"], state["sampling"]) == (result.version, "Uncertainty sampling")
    for rank, task_id in enumerate(order):
        task = project.next_task()
        assert task["id"] == task_id
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == result.version
        assert prediction["result"][0]["value"]["x"] == rank
        project.annotate(task_id, [])
    assert project.next_task() is None


def test_a_template_and_a_label_written_twice_from_snapshot_to_published_boxes(label_studio, tmp_path):
    """Label Studio takes such tasks before the config is set, and shows their images (1.23.2)."""
    session = label_studio.session
    project_id = session.post("/api/projects", json={"title": "template"})["id"]
    rows = [{"data": {"base": "https://host.test", "camera": 3, "file": f"{i}.jpg"}} for i in range(3)]
    session.post(f"/api/projects/{project_id}/import", json=rows)
    config = CONFIG.replace("$image", "$base/$camera/$file").replace('<Label value="Dog"/>', '<Label value="Dog"/>' * 2)
    session.request("PATCH", f"/api/projects/{project_id}/", json={"label_config": config})
    client = LabelStudioClient(label_studio.url, label_studio.token)
    annotated, *others = client.task_ids(project_id)
    session.post(f"/api/tasks/{annotated}/annotations", json={"result": [box("Dog")]})

    take_snapshot(client, project_id, tmp_path, None)
    schema = parse_label_config((tmp_path / "label_config.xml").read_text())
    assert [url for _, url, _ in read_pool(tmp_path / "pool.jsonl")] == [f"https://host.test/3/{i}.jpg" for i in (1, 2)]
    (task,) = read_export(tmp_path / "annotated.json")
    assert (schema.labels, schema.image.url(task["data"])) == (("c1", "Dog"), "https://host.test/3/0.jpg")
    items = [QueueItem(i, [box("Dog")]) for i in [*others, annotated]]
    assert publish(client, project_id, "r1", items).created == 3
    served = client.transport.get(f"/api/projects/{project_id}/next")
    assert (served["id"], served["predictions"][0]["result"][0]["value"]["rectanglelabels"]) == (others[0], ["Dog"])


def test_items_that_label_studio_drops_leave_the_queue_alone(project):
    order = shuffled(project.tasks)
    before = publish(project.client, project.id, "r1", [QueueItem(i) for i in order]).version
    items = [QueueItem(i, [box("Gone")] if n == 3 else [box()]) for n, i in enumerate(project.tasks)]
    with pytest.raises(PublishError, match="store 8 predictions, got 7"):
        publish(project.client, project.id, "r2", items)
    assert project.client.project(project.id)["model_version"] == before
    assert project.client.model_version_counts(project.id) == {before: 8}
    assert project.next_task()["id"] == order[0]


def test_tasks_deleted_since_the_export_are_left_out(project):
    order = shuffled(project.tasks)
    project.session.request("DELETE", f"/api/tasks/{order[0]}/")
    result = publish(project.client, project.id, "r1", [QueueItem(i) for i in order])
    assert (result.gone_task_ids, result.created) == ((order[0],), 7)
    assert project.next_task()["id"] == order[1]


def test_versions_are_counted_deleted_and_pruned(project):
    items = [QueueItem(i) for i in project.tasks]
    versions = [publish(project.client, project.id, f"r{n}", items, keep=None).version for n in range(4)]
    assert list(project.client.model_version_counts(project.id)) == versions[::-1]
    with pytest.raises(PublishError, match="active"):
        delete_version(project.client, project.id, versions[3])
    assert delete_version(project.client, project.id, versions[0]) == 8
    assert prune_versions(project.client, project.id, keep=2) == [versions[1]]
    assert project.client.model_version_counts(project.id) == {versions[3]: 8, versions[2]: 8}
    assert project.client.project(project.id)["model_version"] == versions[3]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.publish import QueueItem, publish
url, token, project, order, state_file, stop_at = sys.argv[1:]
def store(state):
    Path(state_file).write_text(json.dumps(state))
    if state["state"] == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
publish(LabelStudioClient(url, token), int(project), "r1", [QueueItem(i) for i in json.loads(order)], on_state=store)
"""


@pytest.mark.parametrize("stop_at", ["importing", "imported", "activating", "done"])
def test_a_process_killed_in_each_state_is_resumed(label_studio, project, tmp_path, stop_at):
    order, note = shuffled(project.tasks), tmp_path / "state.json"
    command = [sys.executable, "-c", KILLED, label_studio.url, label_studio.token, str(project.id), json.dumps(order)]
    ended = subprocess.run([*command, str(note), stop_at], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == -signal.SIGKILL
    state = json.loads(note.read_text())
    items = [QueueItem(i) for i in order]
    result = publish(project.client, project.id, "r1", items, resume_state=state, settle_s=2)
    pairs = project.prediction_pairs()
    assert len(pairs) == len(set(pairs)) == 8
    assert {version for _, version in pairs} == {result.version}
    assert project.client.project(project.id)["model_version"] == result.version
    assert project.next_task()["id"] == order[0]


def test_a_process_killed_in_the_middle_of_the_request_is_resumed(label_studio, tmp_path):
    project = Project(label_studio, 1200)
    order, note = shuffled(project.tasks), tmp_path / "state.json"
    code = KILLED.replace("[QueueItem(i) for", "[QueueItem(i, BOXES) for").replace(
        "import json,", f"BOXES = {[box()] * 5}\nimport json,"
    )
    command = [sys.executable, "-c", code, label_studio.url, label_studio.token, str(project.id), json.dumps(order)]
    process = subprocess.Popen([*command, str(note), "never"], cwd=Path(__file__).parents[2])
    while not note.exists():
        time.sleep(0.02)
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    state = json.loads(note.read_text())
    assert state["state"] == "importing"
    result = publish(project.client, project.id, "r1", [QueueItem(i, [box()] * 5) for i in order], resume_state=state)
    pairs = project.prediction_pairs()
    active = [task for task, version in pairs if version == result.version]
    assert len(pairs) == len(set(pairs))
    assert len(active) == 1200
    assert project.next_task()["id"] == order[0]


def test_uploaded_image_is_fetched_upright(label_studio, tmp_path):
    project = label_studio.create_project("images", CONFIG)
    shown = np.zeros((60, 40, 3), np.uint8)
    shown[:20] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(np.rot90(shown, 1)).save(stream, "JPEG", exif=exif, quality=95)
    (tmp_path / "turned.jpg").write_bytes(stream.getvalue())
    (task_id,) = label_studio.import_images(project, [tmp_path / "turned.jpg"])
    client = LabelStudioClient(label_studio.url, label_studio.token)
    ((found, data),) = client.unlabelled_tasks(project)
    assert (found, data["image"].startswith("/data/upload/")) == (task_id, True)
    images = ImageCache(tmp_path / "cache", ImageSource(client), namespace=client.url)
    info = images.get(task_id, data["image"])
    assert (info.width, info.height) == (40, 60)
    stored = np.asarray(Image.open(info.path)).astype(int)
    assert np.abs(stored[5:15] - (250, 10, 10)).max() < 30
    assert stored[40:].max() < 30
    with pytest.raises(ImageError, match="no such file"):
        images.get(task_id, "/data/upload/1/none.jpg")
    with pytest.raises(ImageError, match="no such file"):
        images.get(task_id, "s3://no-such-storage/a.jpg")


def test_webhook_is_created_and_mended(project):
    url = "http://127.0.0.1:9/webhook"
    project.client.ensure_webhook(project.id, url, {"Authorization": "Bearer one"})
    project.client.ensure_webhook(project.id, url, {"Authorization": "Bearer two"})
    (hook,) = project.client.webhooks(project.id)
    assert hook["headers"] == {"Authorization": "Bearer two"}
    assert {"ANNOTATION_CREATED", "ANNOTATIONS_DELETED"} <= set(hook["actions"])
