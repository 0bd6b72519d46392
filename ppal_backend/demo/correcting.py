"""What a careful person makes of pre-annotations: good boxes stay, others are corrected, removed or added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Region = dict[str, Any]

TYPE = "rectanglelabels"
GOOD_IOU = 0.85
SAME_OBJECT_IOU = 0.5


def corrected(truth: Sequence[Region], shown: Sequence[Mapping[str, Any]]) -> list[Region]:
    """Turn the regions of a prediction into those that a person submits, as Label Studio's editor writes them.

    A shown box belongs to the true one that it overlaps most, by at least ``SAME_OBJECT_IOU``; pairs are made from the
    largest overlap down. With the right label and an overlap of ``GOOD_IOU`` it stays as it is (origin
    ``prediction``), else it takes the true box's place and label and keeps its id (``prediction-changed``). Shown
    boxes without a true one are removed, true boxes without a shown one are drawn (``manual``).

    Args:
        truth: Rectangles as they should be, one control, values in percent of the image.
        shown: Regions of the prediction; those of other kinds or controls are left out.

    Returns:
        The result to submit, corrected regions first, in their order.
    """
    controls = {region["from_name"] for region in truth}
    known = [r for r in shown if r.get("type") == TYPE and (not controls or r.get("from_name") in controls)]
    pairs = sorted(
        ((overlap(t["value"], s["value"]), i, j) for i, s in enumerate(known) for j, t in enumerate(truth)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    of_shown: dict[int, tuple[int, float]] = {}
    taken: set[int] = set()
    for iou, i, j in pairs:
        if iou >= SAME_OBJECT_IOU and i not in of_shown and j not in taken:
            of_shown[i] = (j, iou)
            taken.add(j)
    result = [_answer(known[i], truth[j], iou) for i, (j, iou) in sorted(of_shown.items())]
    return result + [region for j, region in enumerate(truth) if j not in taken]


def overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Intersection over union in [0, 1] of two upright boxes given by x, y, width and height."""
    width = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
    height = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
    shared = max(0.0, width) * max(0.0, height)
    union = a["width"] * a["height"] + b["width"] * b["height"] - shared
    return shared / union if union > 0 else 0.0


def _answer(shown: Mapping[str, Any], true: Region, iou: float) -> Region:
    if iou >= GOOD_IOU and shown["value"][TYPE] == true["value"][TYPE]:
        return {**shown, "origin": "prediction"}
    return {**shown, "origin": "prediction-changed", "value": true["value"]}
