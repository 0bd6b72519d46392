"""What people do on a simulated query, and about how many seconds it takes them.

Before an image is labelled, the model shows its pre-annotations: a person keeps, moves or relabels, deletes and draws
boxes. These are counted against the true boxes when a round's picks are labelled; the seconds are computed when a
report is written, so that other times can be tried on finished simulations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ppal_backend.acquisition.dcus import BOX_S, IMAGE_S
from ppal_backend.rounds.detections_store import read_detections
from ppal_backend.settings import ProjectDefaults
from ppal_backend.simulation.data import Benchmark
from ppal_backend.structures.detections import pairwise_iou

SHOWN_FROM: float = ProjectDefaults.model_fields["score_threshold"].default
"""Score from which a pre-annotation is shown, the product's own default."""
_SAME_OBJECT = 0.5
_NEED_NOT_MOVE = 0.8


@dataclass(frozen=True)
class AnnotationTime:
    """Seconds of each thing that people do.

    A box drawn: 7.0 s, the median of extreme clicking, which is the fastest published way with full accuracy
    (Papadopoulos et al., Extreme clicking for efficient object annotation, ICCV 2017, arXiv:1708.02750). A box that is
    shown and only looked at: 1.6 s (Papadopoulos et al., We don't need no bounding-boxes, CVPR 2016, arXiv:1602.08405).
    Half a drawing for a box to move or relabel, a look for one to delete, and 5 s to open and search an image, are
    assumptions.

    Args:
        image: Per image, whatever is on it.
        drawn: Per box drawn where nothing was shown.
        moved: Per shown box that is moved or relabelled.
        kept: Per shown box that is right.
        deleted: Per shown box of nothing.
    """

    image: float = IMAGE_S
    drawn: float = BOX_S
    moved: float = 3.5
    kept: float = 1.6
    deleted: float = 1.6

    def seconds(self, work: Mapping[str, int]) -> float:
        """Seconds of the counted work."""
        return sum(work[field.name] * float(getattr(self, field.name)) for field in fields(self))


SLOW_DRAWING = AnnotationTime(drawn=25.5, moved=12.75)
"""With the median of ordinary drawing on a crowd-sourcing platform (Su, Deng and Fei-Fei, Crowdsourcing annotations for
visual object detection, AAAI HCOMP workshop 2012)."""


def drawn_from_nothing(images: int, boxes: int) -> dict[str, int]:
    """Work on images without pre-annotations."""
    return {"image": images, "drawn": boxes, "moved": 0, "kept": 0, "deleted": 0}


def work_on(picks: Collection[int], benchmark: Benchmark, detections: Path) -> dict[str, int]:
    """Count the work on images that are labelled now.

    Args:
        picks: Ids of the images.
        benchmark: The true boxes; crowd regions are left out.
        detections: Folder of the pool's detections, of the model whose pre-annotations are shown.

    Returns:
        Counts by the names of :class:`AnnotationTime`. A shown box belongs to the free true box that it overlaps most,
        from IoU 0.5 on, in the order of the scores; from 0.8 on, with the right label, it is kept.
    """
    wanted = set(picks)
    work = drawn_from_nothing(len(wanted), sum(benchmark.boxes[image_id] for image_id in wanted))
    true: dict[int, list[tuple[list[float], int]]] = {image_id: [] for image_id in wanted}
    index = {category: number for number, category in enumerate(sorted(c.id for c in benchmark.pool.categories))}
    for row in benchmark.pool.annotations:
        if row.image_id in wanted and not row.iscrowd:
            x, y, width, height = row.bbox_xywh
            true[row.image_id].append(([x, y, x + width, y + height], index[row.category_id]))
    for found, _ in read_detections(detections, only_boxes=True):
        if found.image_id in wanted:
            scores = np.asarray(found.scores)
            shown = np.flatnonzero(scores >= SHOWN_FROM)
            shown = shown[np.argsort(-scores[shown], kind="stable")]
            boxes, classes = np.asarray(found.boxes_xyxy)[shown], np.asarray(found.class_indices)[shown]
            _count(work, boxes, classes, true[found.image_id])
    return work


def _count(work: dict[str, int], boxes: np.ndarray, classes: np.ndarray, true: list[tuple[list[float], int]]) -> None:
    """Take the boxes of one image that were shown from those that have to be drawn."""
    overlaps = pairwise_iou(boxes, np.array([box for box, _ in true], np.float64).reshape(-1, 4))
    for row, shown_class in zip(overlaps, classes, strict=True):
        best = int(row.argmax()) if len(row) else -1
        if best < 0 or row[best] < _SAME_OBJECT:
            work["deleted"] += 1
            continue
        kept = row[best] >= _NEED_NOT_MOVE and shown_class == true[best][1]
        work["kept" if kept else "moved"] += 1
        work["drawn"] -= 1
        overlaps[:, best] = 0.0
