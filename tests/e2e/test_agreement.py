"""What people do to pre-annotations, as a real Label Studio exports it."""

import numpy as np
import pytest

from ppal_backend.datasets.corrections import agreement_of, corrections_of
from ppal_backend.label_studio.client import read_export
from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.rounds.ports import QueueEntry
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.round import ModelRef
from tests.e2e.test_queue_tab import Tabs, spec_of

pytestmark = pytest.mark.e2e


def test_the_export_tells_what_became_of_the_boxes_of_each_version(label_studio, tmp_path):
    project = Tabs(label_studio, 3)
    first, second, third = project.tasks
    boxes = np.array([[10, 10, 30, 30], [40, 10, 60, 30], [10, 40, 30, 60]], np.float32)
    found = Detections(first, boxes, np.array([0.9, 0.8, 0.7], np.float32), np.array([0, 1, 0]), np.zeros((3, 2)))
    queue = [QueueEntry(task, found, 100, 80) for task in (first, second)] + [QueueEntry(third, None)]
    version = LabelStudioPublisher(project.client).publish(
        spec_of(project), ModelRef("tiny", "x.pth", ("cat", "dog")), queue, None, lambda _: None
    )
    predictions = project.session.get("/api/predictions", params={"project": project.id})
    shown = next(p["result"] for p in predictions if p["task"] == first)
    kept, moved, _ = shown
    moved = {**moved, "value": {**moved["value"], "x": 3.0}, "origin": "prediction-changed"}
    drawn = {**kept, "id": "drawn", "value": {**kept["value"], "y": 60.0}}
    for task, result in ((first, [kept, moved, drawn]), (second, shown), (third, [])):
        project.session.post(f"/api/tasks/{task}/annotations", json={"result": result})
    path = project.client.download_export(project.id, tmp_path / "export.json")
    counts = agreement_of(corrections_of(read_export(path), "label"))
    assert counts == {version: {"tasks": 3, "kept": 4, "moved": 1, "relabelled": 0, "removed": 1, "added": 1}}
