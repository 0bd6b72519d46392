"""Images that are labelled already: which are held out for evaluation, and what the model says about them.

Held out is by task id alone, so never by chance or by round. What the model says is for strategies that learn or keep
away from labelled images.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.structures.detections import Detections, pairwise_iou, to_numpy

FEWEST_TO_HOLD_OUT = 10

Truth = tuple[np.ndarray, np.ndarray]
"""``[n, 4]`` boxes x1, y1, x2, y2 in px and ``[n]`` class indices (-1 for a class the model does not know)."""


def holdout_ids(image_ids: Sequence[int], fraction: float) -> set[int]:
    """The images to evaluate on: those whose hashed id falls below ``fraction``.

    An image stays on its side in all later rounds. With at least ``FEWEST_TO_HOLD_OUT`` images and a
    fraction above 0 there is always at least one (the smallest hash), and never more than half.
    """
    if fraction <= 0 or len(image_ids) < FEWEST_TO_HOLD_OUT:
        return set()
    ranked = sorted(set(image_ids), key=_position)
    chosen = [i for i in ranked if _position(i) < fraction] or ranked[:1]
    return set(chosen[: len(ranked) // 2])


def _position(image_id: int) -> float:
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
