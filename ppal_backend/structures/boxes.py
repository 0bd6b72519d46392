"""Geometry of boxes as numpy arrays."""

from __future__ import annotations

import numpy as np


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box with every other.

    Args:
        a: ``[n, 4]`` corners x1, y1, x2, y2, in any one unit.
        b: ``[m, 4]`` likewise.

    Returns:
        ``[n, m]`` in [0, 1]; 0 for boxes without area.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = np.clip(high - low, 0.0, None).prod(2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None).prod(1) for boxes in (a, b)]
    return np.asarray(inner / np.maximum(areas[0][:, None] + areas[1][None, :] - inner, 1e-12))
