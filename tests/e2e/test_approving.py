"""Approving in bulk on a real Label Studio, with two people; the detector alone is a fake."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.label_studio.source import LabelStudioSource, image_cache, open_client
from ppal_backend.operations.approvals import approve, offer, precision_at, undo
from ppal_backend.rounds.evaluation_set import TRAINING
from ppal_backend.rounds.folder import RoundFolder, Rounds
from ppal_backend.rounds.ports import Inferred, Ports
from ppal_backend.settings import load_settings
from ppal_backend.store import ProjectSides, ProjectSteering, open_store
from ppal_backend.structures.detections import Detections
from ppal_backend.worker.round_process import run_next_round
from tests.place import CONFIG
from tests.rounds.fakes import FakeWorld

pytestmark = pytest.mark.e2e
IMAGES, LOOKED_AT, BOXES = 50, 24, 5


class SureWorld(FakeWorld):
    """A detector that sees five cats, and is sure of them."""

    def infer(self, spec, model, images, on_progress, should_stop):
        for entry in images:
            left = np.arange(BOXES, dtype=np.float32) * 10 + entry.image_id % 7
            boxes = np.stack([left, left, left + 8, left + 8], axis=1)
            vectors = np.random.default_rng(entry.image_id).normal(size=(BOXES, 4)).astype(np.float32)
            found = Detections(entry.image_id, boxes, np.full(BOXES, 0.92, np.float32), np.zeros(BOXES, int), vectors)
            yield Inferred(found, {"global": vectors[0]})


class Loop:
    """A project whose rounds export from and publish to the real Label Studio."""

    def __init__(self, server, root):
        self.server, self.session = server, server.session
        self.project_id = server.create_project("approving", CONFIG)
        self.settings = load_settings(
            MODEL_DIR=root / "data", LABEL_STUDIO_URL=server.url, LABEL_STUDIO_API_KEY=server.token, min_free_gib=0
        )
        self.store = open_store(self.settings)
        self.store.projects.connect(self.project_id, f"{self.project_id}.1", CONFIG, server.url, {})
        self.client = open_client(self.settings, server.url)
        self.world, self.while_publishing = SureWorld(), None
        paths = []
        for k in range(IMAGES):
            path = root / f"{k}.png"
            Image.fromarray(np.random.default_rng(k).integers(0, 255, (80, 100, 3), np.uint8)).save(path)
            paths.append(path)
        self.tasks = sorted(server.import_images(self.project_id, paths))

    def publish(self, *args):
        *others, on_state = args

        def told(state):
            on_state(state)
            if state["state"] == "importing" and self.while_publishing is not None:
                action, self.while_publishing = self.while_publishing, None
                action()

        return LabelStudioPublisher(self.client).publish(*others, told)

    def ports(self, settings, store, project, spec, observer):
        approved = partial(store.approvals.annotations, project.id)
        source = LabelStudioSource(
            self.client, image_cache(settings, self.client), project.id, approved=lambda: approved().values()
        )
        return Ports(source, self.world, self, observer, ProjectSides(store.sides, project.id, spec.number),
                     steering=ProjectSteering(store.steering, project.id), approved=approved)  # fmt: skip

    def round(self):
        record = self.store.rounds.request(self.project_id, "train", "test")
        assert run_next_round(self.settings, self.project_id, self.ports)
        done = self.store.rounds.get(record.id)
        assert done.state == "done", done.error
        return RoundFolder(Rounds(self.settings).path(self.project_id, done.number)).facts("dataset")

    def shown(self):
        """Pre-annotations of the version in force, by task in the order of the queue."""
        version = self.store.versions.active(self.project_id).version
        rows = self.session.get("/api/predictions", params={"project": self.project_id})
        mine = sorted((p for p in rows if p["model_version"] == version), key=lambda p: p["score"])
        return {p["task"]: p["result"] for p in mine}

    def submit(self, task_id, result, **more):
        self.session.post(f"/api/tasks/{task_id}/annotations/", json={"result": result, **more})

    def annotations(self, task_id):
        return self.session.get(f"/api/tasks/{task_id}/")["annotations"]


def test_what_was_measured_on_people_is_approved_counted_apart_and_undone(label_studio, tmp_path):
    loop = Loop(label_studio, tmp_path)
    ann = label_studio.session.post("/api/users/", json={"username": "ann", "email": "ann@example.com"})
    for task_id in loop.tasks[:5]:  # whichever are drawn for the evaluation set, boxes are left to train on
        loop.submit(task_id, BOX)
    assert loop.round()["precision"] == {}, "nobody was shown anything"

    queue = list(loop.shown().items())
    for number, (task_id, result) in enumerate(queue[:LOOKED_AT]):
        kept = result[:-1] if number < 6 else result  # in six images somebody removed a box
        loop.submit(task_id, kept, completed_by=ann["id"] if number % 2 else loop.client.whoami()["id"])
    facts = loop.round()
    measured = precision_at(facts, 0.8)
    assert (measured.boxes, measured.kept, measured.images) == (LOOKED_AT * BOXES, LOOKED_AT * BOXES - 6, LOOKED_AT)
    assert measured.is_measured and (measured.whole, measured.untouched) == (LOOKED_AT, LOOKED_AT - 6)
    assert not precision_at(facts, 0.95).is_measured

    offered = offer(loop.settings, loop.store, loop.project_id, measured)
    assert len(offered.tasks) >= 4 and set(offered.tasks) <= set(loop.shown())
    one, two, three, four, *_ = offered.tasks
    pre_annotated, version = loop.shown(), loop.store.versions.active(loop.project_id).version
    wish = (loop.settings, loop.store, loop.client, loop.project_id, version, measured)
    loop.submit(three, [])  # by somebody in Label Studio, of which no round and no poll knows yet
    results = []
    loop.while_publishing = lambda: results.append(approve(*wish, [one, two, three], "Ann@example.com"))
    loop.round()
    (done,) = results
    assert done.tasks == (one, two) and done.left == {"labelled meanwhile": 1}
    for task_id in (one, two):
        (made,) = loop.annotations(task_id)
        assert made["completed_by"]["id"] == ann["id"] and not made["was_cancelled"]
        assert [r["value"] for r in made["result"]] == [r["value"] for r in pre_annotated[task_id]]
        assert {tuple(r["meta"]["text"]) for r in made["result"]} == {("approved in bulk, batch 1",)}
    published = loop.shown()
    assert {one, two} <= set(published), "they were in the queue that was being published"

    facts = loop.round()
    assert facts["approved_images"] == 2 and {one, two}.isdisjoint(loop.shown())
    now = precision_at(facts, 0.8)  # with the image whose boxes somebody removed, without those that were approved
    assert (now.boxes, now.kept, now.images) == (measured.boxes + BOXES, measured.kept, measured.images + 1)
    sides = loop.store.sides.of_project(loop.project_id)
    assert sides[one] == sides[two] == TRAINING

    again = (*wish[:4], loop.store.versions.active(loop.project_id).version, measured)
    assert approve(*again, [four]).tasks == (four,)
    assert loop.annotations(four)[0]["completed_by"]["id"] == loop.client.whoami()["id"]
    (made,) = loop.annotations(one)
    moved = [{**made["result"][0], "value": {**made["result"][0]["value"], "x": 50.0}}, *made["result"][1:]]
    loop.session.request("PATCH", f"/api/annotations/{made['id']}/", json={"result": moved})
    result = undo(loop.store, loop.client, loop.project_id, done.batch_id)
    assert (result.deleted, result.changed) == (1, 1)
    assert loop.annotations(two) == [] and len(loop.annotations(one)) == len(loop.annotations(four)) == 1
    facts = loop.round()
    assert facts["approved_images"] == 1 and two in loop.shown()
    loop.store.close()


BOX = [{"id": "a", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
        "original_width": 100, "original_height": 80, "image_rotation": 0,
        "value": {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["cat"]}}]  # fmt: skip
