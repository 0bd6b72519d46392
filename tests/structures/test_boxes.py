"""Intersection over union against counted pixels."""

import numpy as np
import pytest

from ppal_backend.structures.detections import pairwise_iou


def test_overlaps_equal_counted_pixels():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 12, (7, 2))
    boxes = np.hstack([low, low + rng.integers(0, 9, (7, 2))]).astype(float)  # some without area
    masks = np.zeros((7, 24, 24), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    found = pairwise_iou(boxes[:3], boxes)
    for i in range(3):
        for j in range(7):
            union = (masks[i] | masks[j]).sum()
            assert found[i, j] == pytest.approx((masks[i] & masks[j]).sum() / union if union else 0.0)


def test_no_boxes_have_no_overlaps():
    assert pairwise_iou(np.zeros((0, 4)), np.zeros((2, 4))).shape == (0, 2)
