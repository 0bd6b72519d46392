"""Why each image was picked, as value objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.selection import Selection
from ppal_backend.acquisition.uncertainty import BoxContributions
from ppal_backend.structures import (
    BoxContribution,
    ClassContribution,
    Detections,
    Explanation,
    QueryContext,
)
from ppal_backend.structures.query import by_utility

TOP_BOXES = 5
TOP_CLASSES = 5


def top_boxes(detections: Detections, parts: BoxContributions, count: int = TOP_BOXES) -> tuple[BoxContribution, ...]:
    """The boxes that contribute most, largest first; ties by lowest row."""
    rows, values = parts.rows.tolist(), parts.values.tolist()
    best = sorted(range(len(rows)), key=lambda k: (-values[k], rows[k]))[:count]
    boxes = as_tensor(detections.boxes_xyxy)
    made = []
    for k in best:
        x1, y1, x2, y2 = (float(v) for v in boxes[rows[k]])
        cls, score = int(detections.class_indices[rows[k]]), float(detections.scores[rows[k]])
        made.append(BoxContribution(rows[k], (x1, y1, x2, y2), cls, score, values[k]))
    return tuple(made)


def top_classes(
    detections: Detections, parts: BoxContributions, count: int = TOP_CLASSES
) -> tuple[ClassContribution, ...]:
    """The classes that contribute most, largest first; ties by lowest class."""
    sums: dict[int, tuple[int, float]] = {}
    classes = as_tensor(detections.class_indices)[parts.rows].tolist()
    for cls, value in zip(classes, parts.values.tolist(), strict=True):
        boxes, total = sums.get(cls, (0, 0.0))
        sums[cls] = (boxes + 1, total + value)
    best = sorted(sums, key=lambda cls: (-sums[cls][1], cls))[:count]
    return tuple(ClassContribution(cls, *sums[cls]) for cls in best)


def explain(
    context: QueryContext,
    selection: Selection,
    utilities: Mapping[int, float],
    parts: Sequence[BoxContributions | None],
) -> dict[int, Explanation]:
    """Explain every pick.

    Args:
        context: What the strategy saw.
        selection: What it chose.
        utilities: Utility of every image of the pool, by id.
        parts: For each chosen position, what its boxes add to its utility, or None.

    Returns:
        Image id to explanation.
    """
    utility_rank = {image_id: rank for rank, image_id in enumerate(by_utility(utilities, utilities))}
    made = {}
    for rank, (position, boxes) in enumerate(zip(selection.positions, parts, strict=True)):
        detections = context.pool[position]
        near = selection.neighbours.get(position)
        made[detections.image_id] = Explanation(
            image_id=detections.image_id,
            rank=rank,
            utility=utilities[detections.image_id],
            utility_rank=utility_rank[detections.image_id],
            classes=top_classes(detections, boxes) if boxes is not None else (),
            boxes=top_boxes(detections, boxes) if boxes is not None else (),
            cluster_size=selection.cluster_sizes.get(position),
            nearest_chosen=near.image_id if near else None,
            nearest_similarity=near.similarity if near else None,
            nearest_distance=near.distance if near else None,
        )
    return made
