"""The loop on real photographs with real weights: what `ppal up` does for somebody who chooses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppal_backend.datasets.ground_truth import ImageTruth, read_user_coco
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.demo.run import label_config_of
from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.rig.backend import Backend
from ppal_backend.settings import load_settings
from ppal_backend.structures.detections import pairwise_iou

SHARED = Path(__file__).resolve().parents[3] / "shared"
WEIGHTS, PHOTOGRAPHS = SHARED / "weights" / "yolox_nano_coco.pth", SHARED / "data" / "aquarium"
IMAGES, BUDGET = 30, 14

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.shared,
    pytest.mark.skipif(
        not (WEIGHTS.is_file() and PHOTOGRAPHS.is_dir()), reason=f"needs the photographs and weights in {SHARED}"
    ),
]


@dataclass(frozen=True)
class Shown:
    """Boxes that came with a queue's images, and how many of them a person would keep."""

    boxes: int
    kept: int  # the right label, at IoU 0.5 and more, each true box once
    true: int


def shown_boxes(predictions: Sequence[Mapping[str, Any]], answers: Mapping[int, ImageTruth]) -> Shown:
    """Hold the pre-annotations of a queue against the true boxes."""
    boxes = kept = true = 0
    for prediction in predictions:
        truth = answers[prediction["task"]]
        free = [(label, (x, y, x + width, y + height)) for label, x, y, width, height in truth.boxes]
        true += len(free)
        for region in prediction["result"]:
            value = region["value"]
            x, width = (value[name] * truth.width / 100 for name in ("x", "width"))
            y, height = (value[name] * truth.height / 100 for name in ("y", "height"))
            overlaps = [
                float(pairwise_iou(np.array([box]), np.array([[x, y, x + width, y + height]]))[0, 0])
                if label in value["rectanglelabels"]
                else 0.0
                for label, box in free
            ]
            boxes += 1
            if overlaps and max(overlaps) >= 0.5:
                free.pop(int(np.argmax(overlaps)))
                kept += 1
    return Shown(boxes, kept, true)


def label_and_look(label_studio: Any, folder: Path, images: int, budget: int, environment: Mapping[str, str]) -> Shown:
    """Label ``budget`` of ``images`` photographs, and look at what the others are then shown with."""
    cache = {"PPAL_CACHE": str(folder / "cache")}
    place_weights(find_entry("yolox_nano"), WEIGHTS, load_settings(**cache).weights_dir)
    truth = read_user_coco(PHOTOGRAPHS / "pool.json", PHOTOGRAPHS / "images")
    ids = sorted(truth.paths())
    truth = truth.subset(ids[:: len(ids) // images][:images])
    project_id = label_studio.create_project("photographs", label_config_of(truth.labels))
    by_path = truth.truths_by_path()
    tasks = label_studio.import_images(project_id, list(truth.paths().values()))
    answers = {task_id: by_path[path] for task_id, path in tasks.items()}
    annotator = ScriptedAnnotator(label_studio.url, label_studio.token, project_id, answers)
    chosen = {"PPAL_DETECTOR": "auto", "START_TRAINING_EACH_N_UPDATES": str(budget), "DEVICE": "cpu"}
    settings = {**cache, **chosen, **environment}
    with Backend(folder / "backend", label_studio.url, label_studio.token, settings) as backend:
        backend.connect(label_studio.session, project_id)
        backend.wait_for_round(project_id, 1, 600)
        assert len(annotator.label(budget)) == budget
        backend.wait_for_round(project_id, 2, 3600)
        assert backend.store.versions.active(project_id).detector == "yolox_nano"
        version = label_studio.session.get(f"/api/projects/{project_id}/")["model_version"]
        rows = label_studio.session.get("/api/predictions", params={"project": project_id})
        queue = sorted((row for row in rows if row["model_version"] == version), key=lambda row: row["score"])
        assert version.startswith("ppal-r2") and len(queue) == images - budget
        assert annotator.label(3) == [row["task"] for row in queue[:3]]
    return shown_boxes(queue, answers)


def test_photographs_come_in_order_with_boxes_of_the_detector_that_was_chosen(label_studio, tmp_path):
    environment = {"PPAL_MAX_ITERATIONS": "40", "OMP_NUM_THREADS": "2", "PPAL_POLL_INTERVAL_S": "5"}
    shown = label_and_look(label_studio, tmp_path, IMAGES, BUDGET, environment)
    assert shown.true > 50 and shown.boxes > 0 and shown.kept > 0, shown
