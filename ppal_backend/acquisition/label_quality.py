"""Annotations that a detector disputes: objects without a box, boxes out of place, boxes of the wrong class.

For an annotated box ``a`` of class ``y`` and a detection ``d`` of class ``c`` and confidence ``p``, all scores in
[0, 1], 1 for no doubt and 0 for the strongest:

- overlooked:     ``1 - p (1 - max IoU(a, d) over a of class c)``
- badly located:  ``1 - p (1 - IoU(a, d))`` for the ``d`` of class ``y`` nearest to ``a``
- swapped:        ``1 - p IoU(a, d)`` for a ``d`` of another class

Only detections that are sure count against people: those at least as confident as detections of their class are on
average where they agree with an annotation. A detector's scores mean another probability for every class and training,
so no fixed threshold would do.

Source: ObjectLab (Tkachenko, Thyagarajan and Mueller, 2023, arXiv:2309.00832), with overlap alone as the similarity of
two boxes, confidence as a factor of each score, and thresholds by class as in confident learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ppal_backend.structures.detections import pairwise_iou

AGREE_IOU = 0.5
TOUCH_IOU = 0.1
WEAK_SHARE = 0.5

Kind = Literal["overlooked", "badly located", "swapped"]


@dataclass(frozen=True)
class Compared:
    """What people annotated on an image and what a detector saw there that had not learned from them.

    Args:
        boxes: ``[n, 4]`` annotated corners x1, y1, x2, y2 in px.
        classes: ``[n]`` their class indices.
        detected: ``[m, 4]`` detected corners in px.
        detected_classes: ``[m]`` their class indices.
        scores: ``[m]`` confidences in [0, 1].
    """

    boxes: np.ndarray
    classes: np.ndarray
    detected: np.ndarray
    detected_classes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Dispute:
    """One doubt: its score (0 the strongest), the row of the annotated box it is about if any, and the detection's."""

    kind: Kind
    score: float
    annotated: int | None
    detected: int


def sure_from(images: Iterable[Compared], num_classes: int) -> np.ndarray:
    """From which confidence on a detection is sure.

    Args:
        images: All images to compare.
        num_classes: Number of classes.

    Returns:
        ``[C]`` the mean confidence of the best detection on each annotated box that has one of its class
        (IoU >= 0.5); infinite for a class without any, whose detections then count against nobody.
    """
    total, count = np.zeros(num_classes), np.zeros(num_classes)
    for image in images:
        agreeing = (overlaps(image) >= AGREE_IOU) & _same_class(image)
        best = np.where(agreeing, image.scores[None, :], -1.0).max(axis=1, initial=-1.0)
        found = best >= 0
        np.add.at(total, image.classes[found], best[found])
        np.add.at(count, image.classes[found], 1)
    return np.divide(total, count, out=np.full(num_classes, np.inf), where=count > 0)


def disputes_of(image: Compared, sure: np.ndarray) -> list[Dispute]:
    """What the detector disputes on an image, the strongest doubt first.

    A detection that agrees with an annotated box of its class (IoU >= 0.5) disputes nothing, and each other one one
    thing at most: the class of a box it agrees with, else the place of a box of its class that it touches
    (IoU >= 0.1; half as sure will do), else that there is no box.

    Args:
        image: Annotations and detections.
        sure: ``[C]`` see :func:`sure_from`.
    """
    iou, same = overlaps(image), _same_class(image)
    confident = image.scores >= sure[image.detected_classes]
    weak = image.scores >= WEAK_SHARE * sure[image.detected_classes]
    agreeing = (iou >= AGREE_IOU) & same
    backed = np.where(agreeing, image.scores[None, :], 0.0).max(axis=1, initial=0.0)
    settled = (agreeing & weak[None, :]).any(axis=1)
    found: dict[int, Dispute] = {}
    overlooked: list[int] = []
    for row in np.argsort(-image.scores, kind="stable"):
        d, p = int(row), float(image.scores[row])
        if not weak[d] or agreeing[:, d].any():
            continue
        other = _best(iou[:, d], ~same[:, d] & (iou[:, d] >= AGREE_IOU))
        near = _best(iou[:, d], same[:, d] & (iou[:, d] >= TOUCH_IOU) & ~settled)
        if other is not None:
            if confident[d] and backed[other] < p:
                _keep_strongest(found, other, Dispute("swapped", 1 - p * float(iou[other, d]), other, d))
        elif near is not None:
            _keep_strongest(found, near, Dispute("badly located", 1 - p * (1 - float(iou[near, d])), near, d))
        elif confident[d] and not _seen_before(image.detected, d, overlooked):
            overlooked.append(d)
    nearest = np.where(same, iou, 0.0).max(axis=0, initial=0.0)
    missing = [Dispute("overlooked", 1 - float(image.scores[d]) * (1 - float(nearest[d])), None, d) for d in overlooked]
    return sorted([*found.values(), *missing], key=lambda dispute: dispute.score)


def overlaps(image: Compared) -> np.ndarray:
    """``[n, m]`` IoU of annotated and detected boxes in [0, 1]."""
    return pairwise_iou(image.boxes, image.detected)


def _keep_strongest(found: dict[int, Dispute], row: int, new: Dispute) -> None:
    """One dispute for an annotated box."""
    if row not in found or new.score < found[row].score:
        found[row] = new


def _seen_before(detected: np.ndarray, d: int, earlier: Sequence[int]) -> bool:
    """Whether a more confident detection that is listed already is of the same object."""
    return bool(earlier) and bool((pairwise_iou(detected[[d]], detected[list(earlier)]) >= AGREE_IOU).any())


def _same_class(image: Compared) -> np.ndarray:
    return np.asarray(image.classes[:, None] == image.detected_classes[None, :])


def _best(values: np.ndarray, allowed: np.ndarray) -> int | None:
    return int(np.argmax(np.where(allowed, values, -1.0))) if allowed.any() else None
