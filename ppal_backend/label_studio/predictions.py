"""Detections as the regions of a Label Studio prediction."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppal_backend.label_studio.schema import CONTROL_TYPE, LabelSchema
from ppal_backend.structures.detections import Detections, to_numpy

logger = logging.getLogger(__name__)
_DECIMALS = 4


def detections_to_result(
    schema: LabelSchema,
    class_names: Sequence[str],
    detections: Detections,
    width: int,
    height: int,
    score_threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """Write detections as the ``result`` of a Label Studio prediction, the best score first.

    Boxes are clipped to the image and given in percent, exactly within 0..100 (Label Studio drops a whole
    prediction for one number outside). Boxes that keep no area, score below their label's threshold or are of a
    class that the config no longer has are left out.

    Args:
        schema: The labeling config.
        class_names: The detector's class names by ``class_index``; mapped through ``predicted_values`` and aliases.
        detections: Boxes in pixels of the image as displayed.
        width: Image width in pixels, > 0.
        height: Image height in pixels, > 0.
        score_threshold: Least score; the config's ``model_score_threshold`` (Label, else control) goes before it.

    Returns:
        Region dicts; ``[]`` for no detections.

    Raises:
        ValueError: The image has no size, or a class index has no name.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"expected an image size > 0, got {width} x {height}; read the image first")
    boxes, scores = to_numpy(detections.boxes_xyxy), to_numpy(detections.scores)
    classes = to_numpy(detections.class_indices)
    if len(classes) and int(classes.max()) >= len(class_names):
        raise ValueError(f"expected class indices below {len(class_names)}, got {int(classes.max())}; pass all names")
    wanted = schema.shown_from(class_names, score_threshold)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order].astype(np.float64) >= np.array(wanted)[classes[order]]]
    shares = np.clip(boxes[order].astype(np.float64) / (width, height, width, height), 0.0, 1.0) * 100
    regions = []
    found = zip(order.tolist(), classes[order].tolist(), scores[order].tolist(), shares.tolist(), strict=True)
    for row, index, score, corners_pct in found:
        label, box_pct = schema.label_of_class(class_names[index]), _percent(corners_pct)
        if label is not None and box_pct is not None:
            region_id = _region_id(detections.image_id, row, label, box_pct)
            regions.append(_region(schema, label, box_pct, score, width, height, region_id))
    unknown = Counter(class_names[index] for index in classes.tolist() if wanted[index] == math.inf)
    if unknown:
        logger.debug("task %d: boxes of classes not in the labeling config left out: %s", detections.image_id, unknown)
    return regions


def _percent(corners_pct: Sequence[float]) -> tuple[float, float, float, float] | None:
    x, y, x2, y2 = (round(value, _DECIMALS) for value in corners_pct)
    w, h = round(x2 - x, _DECIMALS), round(y2 - y, _DECIMALS)
    return (x, y, w, h) if w > 0 and h > 0 else None


def _region_id(image_id: int, index: int, label: str, box_pct: tuple[float, ...]) -> str:
    return hashlib.blake2s(f"{image_id}|{index}|{label}|{box_pct}".encode(), digest_size=5).hexdigest()


def _region(
    schema: LabelSchema,
    label: str,
    box_pct: tuple[float, float, float, float],
    score: float,
    width: int,
    height: int,
    region_id: str,
) -> dict[str, Any]:
    x, y, w, h = box_pct
    return {
        "id": region_id,
        "from_name": schema.from_name,
        "to_name": schema.to_name,
        "type": CONTROL_TYPE,
        "original_width": int(width),
        "original_height": int(height),
        "image_rotation": 0,
        "value": {"x": x, "y": y, "width": w, "height": h, "rotation": 0, CONTROL_TYPE: [label]},
        "score": round(min(max(score, 0.0), 1.0), 6),
    }
