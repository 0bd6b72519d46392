"""Images that are labelled already, and what the model says about them: for strategies that look at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.structures.detections import Detections, pairwise_iou, to_numpy

Truth = tuple[np.ndarray, np.ndarray]
"""``[n, 4]`` boxes x1, y1, x2, y2 in px and ``[n]`` class indices (-1 for a class the model does not know)."""


def labelled_entries(dataset: CocoDataset) -> list[PoolEntry]:
    """The images of a data set in the form that inference takes."""
    return [PoolEntry(image.id, image.file_name, image.width, image.height) for image in dataset.images]


def truth_by_image(dataset: CocoDataset, labels: Sequence[str]) -> dict[int, Truth]:
    """Annotated boxes by image id, class indices in the order of ``labels``; crowd regions are left out."""
    index = {label: position for position, label in enumerate(labels)}
    class_of = {category.id: index.get(category.name, -1) for category in dataset.categories}
    rows: Mapping[int, list[tuple[float, ...]]] = defaultdict(list)
    for row in dataset.annotations:
        if not row.iscrowd:
            x, y, width, height = row.bbox_xywh
            rows[row.image_id].append((x, y, x + width, y + height, class_of[row.category_id]))
    tables = {i: np.asarray(rows.get(i, []), np.float64).reshape(-1, 5) for i in dataset.image_ids}
    return {i: (table[:, :4], table[:, 4].astype(np.int64)) for i, table in tables.items()}


def mark_true_positives(detections: Detections, truth: Truth, iou: float = 0.5) -> Detections:
    """Tell which detections are right.

    By falling score, a detection is right when an annotated box of its class that no earlier one has taken overlaps
    it by at least ``iou``.

    Args:
        detections: One image.
        truth: Its annotated boxes.
        iou: Smallest intersection over union, in (0, 1].

    Returns:
        The same detections as numpy arrays with ``true_positive``.
    """
    host = detections.numpy()
    boxes, classes = truth
    right = np.zeros(len(host), dtype=bool)
    if len(host) and len(boxes):
        overlap = pairwise_iou(to_numpy(host.boxes_xyxy).astype(np.float64), boxes)
        overlap[to_numpy(host.class_indices)[:, None] != classes[None, :]] = 0.0
        for row in np.argsort(-to_numpy(host.scores), kind="stable"):
            best = int(np.argmax(overlap[row]))
            if overlap[row, best] >= iou:
                right[row] = True
                overlap[:, best] = 0.0
    return replace(host, true_positive=right)
