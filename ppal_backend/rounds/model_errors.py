"""What a detector gets right and wrong on the evaluation set, box by box, matched as its mAP is (IoU 0.5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ppal_backend.datasets.coco import CocoDataset, Predicted
from ppal_backend.rounds.labelled import Truth, match, truth_by_image
from ppal_backend.structures.detections import pairwise_iou

Kind = Literal["right", "wrong", "missed"]
Why = Literal["", "another label", "found already", "out of place", "nothing there"]
BoxXyxy = tuple[float, float, float, float]

SAME_IOU = 0.5
TOUCH_IOU = 0.1
SMALL_PX, LARGE_PX = 32, 96
"""Sides of COCO's small and large boxes: area below 32 x 32 px, and from 96 x 96 px on."""


class Judged(NamedTuple):
    """A detection, or an annotated box that none has found.

    Args:
        image_id: Its image.
        kind: ``right``: a true positive; ``wrong``: a false positive; ``missed``: a box without a detection.
        box_xyxy: The detection, or the box that was missed; corners in px.
        detected: Class index of the detection; None for a miss.
        labelled: Class index of the annotated box; None where there is none.
        score: Of the detection; None for a miss.
        why: Of what kind a wrong one is.
        annotated: Row of the annotated box within its image; None where there is none.
        area: Of the annotated box, else of the detection, in square pixels.
    """

    image_id: int
    kind: Kind
    box_xyxy: BoxXyxy
    area: float
    detected: int | None = None
    labelled: int | None = None
    score: float | None = None
    why: Why = ""
    annotated: int | None = None

    @property
    def size(self) -> str:
        """``small``, ``medium`` or ``large``, as COCO has it."""
        return "small" if self.area < SMALL_PX**2 else "medium" if self.area < LARGE_PX**2 else "large"


@dataclass(frozen=True)
class Judgement:
    """All boxes of an evaluation set.

    Args:
        items: Detections and misses, image by image.
        weaker: Detections of a score that was too low to count.
        unseen: Images without stored predictions.
        other: Annotated boxes of classes that the detector does not know.
    """

    items: Sequence[Judged]
    weaker: int = 0
    unseen: int = 0
    other: int = 0

    @property
    def missed(self) -> int:
        """Annotated boxes that no detection of their class has found (false negatives)."""
        return sum(item.kind == "missed" or item.why == "another label" for item in self.items)

    def count(self, kind: Kind) -> int:
        """Items of a kind."""
        return sum(item.kind == kind for item in self.items)

    def confusion(self, num_classes: int) -> np.ndarray:
        """``[C + 1, C + 1]`` boxes by detected and labelled class; the last row is missed, the last column where
        nothing (or nothing more) is labelled."""
        counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
        rows = [num_classes if item.detected is None else item.detected for item in self.items]
        columns = [num_classes if item.labelled is None else item.labelled for item in self.items]
        np.add.at(counts, (rows, columns), 1)
        return counts


def judge(
    evaluation: CocoDataset,
    predictions: Mapping[int, Predicted],
    labels: Sequence[str],
    least_scores: Sequence[float],
) -> Judgement:
    """Compare what was predicted with what was annotated.

    Args:
        evaluation: The evaluation set.
        predictions: What was predicted, by image id.
        labels: Of the detector, by class index.
        least_scores: ``[C]`` score from which a detection counts.
    """
    items: list[Judged] = []
    weaker = unseen = other = 0
    least = np.asarray(least_scores, np.float64)
    for image_id, (boxes, classes) in truth_by_image(evaluation, labels).items():
        predicted = predictions.get(image_id)
        if predicted is None:
            unseen += 1
            continue
        known = classes >= 0
        other += int((~known).sum())
        boxes_xywh, scores, found = predicted
        corners = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        counts = scores >= least[found]
        weaker += int((~counts).sum())
        items += _of_image(image_id, (boxes[known], classes[known]), corners[counts], scores[counts], found[counts])
    return Judgement(items, weaker, unseen, other)


def _of_image(
    image_id: int, truth: Truth, corners: np.ndarray, scores: np.ndarray, classes: np.ndarray
) -> Iterable[Judged]:
    """Detections by falling score, then the misses."""
    annotated, labelled = truth
    matched = match(corners, scores, classes, truth, SAME_IOU)
    free = np.ones(len(annotated), bool)
    free[matched[matched >= 0]] = False
    overlap = pairwise_iou(corners, annotated)
    same = np.where(classes[:, None] == labelled[None, :], overlap, 0.0).max(axis=1, initial=0.0).tolist()
    over_free = np.where(free[None, :], overlap, 0.0).max(axis=1, initial=0.0) >= SAME_IOU
    found_areas, areas = ((b[:, 2:] - b[:, :2]).prod(axis=1).tolist() for b in (corners, annotated))
    boxes, labels, confidences, rows = (values.tolist() for values in (corners, classes, scores, matched))
    for d in np.argsort(-scores, kind="stable").tolist():
        box, label, score, row = tuple(boxes[d]), labels[d], confidences[d], rows[d]
        if row >= 0:
            yield Judged(image_id, "right", box, areas[row], label, label, score, "", row)
            continue
        best = int(np.argmax(np.where(free, overlap[d], 0.0))) if over_free[d] else -1
        if best >= 0 and free[best] and overlap[d, best] >= SAME_IOU:
            free[best] = False
            yield Judged(image_id, "wrong", box, areas[best], label, int(labelled[best]), score, "another label", best)
            continue
        why: Why = (
            "found already" if same[d] >= SAME_IOU else "out of place" if same[d] >= TOUCH_IOU else "nothing there"
        )
        yield Judged(image_id, "wrong", box, found_areas[d], label, None, score, why)
    for row in np.flatnonzero(free).tolist():
        yield Judged(
            image_id, "missed", tuple(annotated[row].tolist()), areas[row], None, int(labelled[row]), None, "", row
        )
