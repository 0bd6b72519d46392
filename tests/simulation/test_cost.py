"""What people do on a simulated query: counted against a slow reference, and what it costs."""

import numpy as np
import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.simulation.cost import SLOW_DRAWING, AnnotationTime, drawn_from_nothing, work_on
from ppal_backend.simulation.data import Benchmark
from ppal_backend.structures.detections import Detections


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def reference(shown, true):
    """One person, box by box, best score first."""
    work = {"moved": 0, "kept": 0, "deleted": 0}
    free = list(true)
    for _, label, box in sorted(shown, key=lambda item: -item[0]):
        found = max(free, key=lambda item: overlap(box, item[1]), default=None)
        if found is None or overlap(box, found[1]) < 0.5:
            work["deleted"] += 1
            continue
        free.remove(found)
        work["kept" if found[0] == label and overlap(box, found[1]) >= 0.8 else "moved"] += 1
    return {"image": 1, "drawn": len(free), **work}


def world(tmp_path, true, shown):
    """One image with true boxes ``(label index, corners)`` and detections ``(score, label index, corners)``."""
    rows = [
        CocoAnnotation(n, 1, 10 + 10 * label, (x1, y1, x2 - x1, y2 - y1))
        for n, (label, (x1, y1, x2, y2)) in enumerate(true, start=1)
    ]
    # category ids fall while their place in the file rises: class indices follow the ids
    categories = [CocoCategory(20, "dog"), CocoCategory(10, "cat")]
    data = CocoDataset([CocoImage(1, "1.jpg", 200, 200), CocoImage(2, "2.jpg", 200, 200)], rows, categories)
    writer = DetectionsWriter(tmp_path / "detections")
    boxes = np.array([box for _, _, box in shown], np.float32).reshape(-1, 4)
    scores, labels = np.array([s for s, _, _ in shown], np.float32), np.array([c for _, c, _ in shown], np.int64)
    writer.add(Detections(1, boxes, scores, labels, np.zeros((len(shown), 2), np.float32)), {})
    writer.flush()
    return Benchmark(data, data), tmp_path / "detections"


@pytest.mark.parametrize("seed", range(8))
def test_work_is_what_a_person_would_do(tmp_path, seed):
    rng = np.random.default_rng(seed)
    true, shown = [], []
    for _ in range(int(rng.integers(1, 7))):
        x, y = rng.uniform(0, 140, 2)
        box = (x, y, x + rng.uniform(20, 60), y + rng.uniform(20, 60))
        true.append((int(rng.integers(2)), box))
        for _ in range(int(rng.integers(0, 3))):
            jitter = rng.normal(0, rng.choice([0.5, 6.0]), 4)
            corners = tuple(np.float32(np.array(box) + jitter).tolist())
            shown.append((round(float(rng.uniform(0.1, 1)), 3), int(rng.integers(2)), corners))
    benchmark, folder = world(tmp_path, true, shown)
    visible = [item for item in shown if item[0] >= 0.3]
    assert work_on([1], benchmark, folder) == reference(visible, true)


def test_images_that_were_not_picked_cost_nothing_and_unseen_ones_are_drawn(tmp_path):
    benchmark, folder = world(tmp_path, [(0, (10, 10, 50, 50))], [(0.9, 0, (10, 10, 50, 50))])
    assert work_on([], benchmark, folder) == drawn_from_nothing(0, 0)
    assert work_on([2], benchmark, folder) == drawn_from_nothing(1, 0)
    assert work_on([1, 2], benchmark, folder) == {"image": 2, "drawn": 0, "moved": 0, "kept": 1, "deleted": 0}


def test_seconds_add_up():
    work = {"image": 2, "drawn": 3, "moved": 4, "kept": 5, "deleted": 6}
    assert AnnotationTime().seconds(work) == pytest.approx(2 * 5 + 3 * 7 + 4 * 3.5 + 5 * 1.6 + 6 * 1.6)
    assert SLOW_DRAWING.seconds(work) == pytest.approx(2 * 5 + 3 * 25.5 + 4 * 12.75 + 5 * 1.6 + 6 * 1.6)
