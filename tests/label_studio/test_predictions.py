"""Detections to regions and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ppal_backend.label_studio.predictions import detections_to_result
from ppal_backend.label_studio.schema import ImageAddress, LabelSchema
from ppal_backend.structures.detections import Detections

SCHEMA = LabelSchema(
    "boxes", "img", ImageAddress("$image"), ("c1", "Bus"), predicted_values={"truck": "c1"}, aliases={"Car": "c1"}
)


def detections(boxes, scores, classes, image_id=7):
    n = len(boxes)
    return Detections(
        image_id=image_id,
        boxes_xyxy=np.array(boxes, np.float32).reshape(n, 4),
        scores=np.array(scores, np.float32),
        class_indices=np.array(classes, np.int64),
        embeddings=np.zeros((n, 2), np.float32),
    )


def test_one_box_in_full():
    (region,) = detections_to_result(SCHEMA, ("truck", "Bus"), detections([[20, 10, 60, 40]], [0.75], [0]), 200, 100)
    region_id = region.pop("id")
    assert len(region_id) == 10
    assert region == {
        "from_name": "boxes",
        "to_name": "img",
        "type": "rectanglelabels",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "value": {"x": 10.0, "y": 10.0, "width": 20.0, "height": 30.0, "rotation": 0, "rectanglelabels": ["c1"]},
        "score": 0.75,
    }


def test_best_first_threshold_and_unknown_classes():
    found = detections([[0, 0, 9, 9], [0, 0, 8, 8], [0, 0, 7, 7], [0, 0, 6, 6]], [0.4, 0.9, 0.2, 0.95], [1, 0, 1, 2])
    result = detections_to_result(SCHEMA, ("Car", "Bus", "Gone"), found, 10, 10, score_threshold=0.3)
    assert [(r["value"]["rectanglelabels"][0], round(r["score"], 2)) for r in result] == [("c1", 0.9), ("Bus", 0.4)]


def test_threshold_of_label_goes_before_control_before_default():
    schema = LabelSchema("b", "i", ImageAddress("$image"), ("A", "B"), score_threshold=0.5, label_thresholds={"B": 0.1})
    found = detections([[0, 0, 5, 5]] * 3, [0.45, 0.55, 0.2], [0, 0, 1])
    result = detections_to_result(schema, ("A", "B"), found, 10, 10, score_threshold=0.99)
    assert [round(r["score"], 2) for r in result] == [0.55, 0.2]


def test_boxes_are_clipped_to_exactly_0_to_100_and_empty_ones_dropped():
    boxes = [[-5, -5, 50, 50], [90, 90, 130, 110], [-9, 0, -1, 10], [101, 0, 120, 10], [0, 0, 100, 100], [5, 5, 5, 9]]
    found = detections(boxes, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0] * 6)
    result = detections_to_result(SCHEMA, ("Bus",), found, 100, 100)
    values = [tuple(r["value"][k] for k in ("x", "y", "width", "height")) for r in result]
    assert values == [(0, 0, 50, 50), (90, 90, 10, 10), (0, 0, 100, 100)]


def test_no_sum_over_100_for_any_size():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(v) for v in rng.integers(1, 5000, 2))
        low = rng.uniform(-0.2, 1.0, 2) * (width, height)
        box = np.concatenate([low, low + rng.uniform(0, 1.2, 2) * (width, height)])
        for region in detections_to_result(SCHEMA, ("Bus",), detections([box], [0.5], [0]), width, height):
            value = json.loads(json.dumps(region["value"]))
            assert 0 <= value["x"] < 100
            assert 0 <= value["y"] < 100
            assert value["x"] + value["width"] <= 100
            assert value["y"] + value["height"] <= 100
            assert min(value["width"], value["height"]) > 0


def test_round_trip_is_exact_to_a_hundredth_of_a_pixel():
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 500, (20, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 200, (20, 2))], 1)
    found = detections(boxes, np.linspace(1, 0, 20), [1] * 20)
    regions = detections_to_result(SCHEMA, ("Car", "Bus"), found, 1000, 800)
    values = [region["value"] for region in regions]
    xywh = np.array([[v["x"], v["y"], v["width"], v["height"]] for v in values]) / 100 * (1000, 800, 1000, 800)
    np.testing.assert_allclose(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), boxes, atol=0.01)
    assert {label for v in values for label in v["rectanglelabels"]} == {"Bus"}
    np.testing.assert_allclose([region["score"] for region in regions], found.scores, atol=1e-6)


def test_region_ids_differ_within_an_image_and_repeat_between_runs():
    found = detections([[0, 0, 5, 5]] * 3, [0.5] * 3, [0] * 3)
    ids = [r["id"] for r in detections_to_result(SCHEMA, ("Bus",), found, 10, 10)]
    assert len(set(ids)) == 3
    assert ids == [r["id"] for r in detections_to_result(SCHEMA, ("Bus",), found, 10, 10)]


def test_nothing_found_gives_an_empty_result():
    assert detections_to_result(SCHEMA, ("Bus",), Detections.empty(3), 10, 10) == []


def test_wrong_arguments():
    with pytest.raises(ValueError, match="size > 0"):
        detections_to_result(SCHEMA, ("Bus",), Detections.empty(3), 0, 10)
    with pytest.raises(ValueError, match="below 1"):
        detections_to_result(SCHEMA, ("Bus",), detections([[0, 0, 1, 1]], [0.5], [1]), 10, 10)
