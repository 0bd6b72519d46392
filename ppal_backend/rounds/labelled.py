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
    """Tell which detections are right: those that :func:`match` gives an annotated box.

    Args:
        detections: One image.
        truth: Its annotated boxes.
        iou: Smallest intersection over union, in (0, 1].

    Returns:
        The same detections as numpy arrays with ``true_positive``.
    """
    host = detections.numpy()
    boxes, scores = to_numpy(host.boxes_xyxy).astype(np.float64), to_numpy(host.scores)
    return replace(host, true_positive=match(boxes, scores, to_numpy(host.class_indices), truth, iou) >= 0)


def match(
    boxes_xyxy: np.ndarray, scores: np.ndarray, class_indices: np.ndarray, truth: Truth, iou: float = 0.5
) -> np.ndarray:
    """Which annotated box each detection has found, as COCO's evaluation tells it.

    By falling score, a detection finds the annotated box of its class that overlaps it most, by at least ``iou``, and
    that no earlier one has taken.

    Args:
        boxes_xyxy: ``[m, 4]`` detected corners in px.
        scores: ``[m]`` confidences.
        class_indices: ``[m]`` their classes.
        truth: The annotated boxes.
        iou: Smallest intersection over union, in (0, 1].

    Returns:
        ``[m]`` the row of the annotated box; -1 for none.
    """
    annotated, classes = truth
    found = np.full(len(scores), -1)
    if len(scores) and len(annotated):
        overlap = pairwise_iou(boxes_xyxy, annotated)
        overlap[class_indices[:, None] != classes[None, :]] = 0.0
        order = np.argsort(-scores, kind="stable")
        for row in order[overlap[order].max(axis=1) >= iou]:
            best = int(np.argmax(overlap[row]))
            if overlap[row, best] >= iou:
                found[row] = best
                overlap[:, best] = 0.0
    return found
