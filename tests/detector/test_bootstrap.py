"""The bootstrap: a resample gives what pycocotools finds for the copied images."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ppal_backend.detector.data import ImageRecord, Instance
from ppal_backend.detector.infer import evaluation as bootstrap
from ppal_backend.detector.infer.evaluation import (
    FEWEST_IMAGES,
    _evaluated,
    coco_metrics,
    coco_truth,
    map_interval,
    resampled_map,
)

CLASSES = ("a", "b", "c", "absent")
Prediction = dict[str, Any]


def scene(
    images: int, seed: int = 0, crowds: bool = False, most_boxes: int = 4
) -> tuple[list[ImageRecord], list[Prediction]]:
    """Records, and predictions that miss some boxes, misplace others and invent a few; class ``c`` is rare."""
    rng = np.random.default_rng(seed)
    records, predictions = [], []
    for image_id in range(1, images + 1):
        instances = []
        for _ in range(int(rng.integers(0, most_boxes + 1))):
            x, y, size = rng.uniform(0, 150), rng.uniform(0, 150), rng.uniform(15, 50)
            label = int(rng.choice(3, p=[0.55, 0.4, 0.05]))
            box = (x, y, x + size, y + size)
            instances.append(Instance(box, label, crowds and rng.random() < 0.2))
            shift = float(rng.choice([0.0, 1.0, 4.0, 40.0]))
            if rng.random() < 0.8:
                predictions.append(predicted(image_id, label, (x + shift, y, size, size), float(rng.random())))
        if rng.random() < 0.5:
            predictions.append(predicted(image_id, int(rng.integers(0, 3)), (5, 5, 30, 30), float(rng.random())))
        records.append(ImageRecord(image_id, "", 200, 200, tuple(instances)))
    return records, predictions


def predicted(image_id: int, label: int, bbox: tuple[float, float, float, float], score: float) -> Prediction:
    area = bbox[2] * bbox[3]
    return {"image_id": image_id, "category_id": label + 1, "bbox": list(bbox), "area": area, "iscrowd": 0,
            "score": score}  # fmt: skip


def reference(records: list[ImageRecord], predictions: list[Prediction], times: np.ndarray) -> float | None:
    """mAP of the copied images, evaluated from the start."""
    copies, copied = [], []
    for record, count in zip(records, times, strict=True):
        for _ in range(count):
            new = len(copies) + 1
            copies.append(replace(record, image_id=new))
            copied += [{**p, "image_id": new} for p in predictions if p["image_id"] == record.image_id]
    return coco_metrics(copies, copied, CLASSES).map


@pytest.mark.parametrize("crowds", [False, True])
def test_a_resample_is_what_the_copied_images_give(crowds: bool) -> None:
    records, predictions = scene(25, crowds=crowds)
    evaluator = _evaluated(records, [*coco_truth(records)], predictions, len(CLASSES))
    times = np.random.default_rng(5).multinomial(25, np.full(25, 1 / 25), size=12)
    times[0] = 1
    found = resampled_map(evaluator, times)
    assert found[0] == pytest.approx(coco_metrics(records, predictions, CLASSES).map, abs=1e-9)
    assert found == pytest.approx([reference(records, predictions, row) for row in times], abs=1e-9)
    assert len({round(value, 6) for value in found}) == 12, "they differ"


def test_sets_without_any_box_are_left_out() -> None:
    records, predictions = scene(8, seed=2)
    empty = next(n for n, record in enumerate(records) if not record.instances)
    evaluator = _evaluated(records, [*coco_truth(records)], predictions, len(CLASSES))
    times = np.zeros((2, 8), dtype=int)
    times[0, empty] = 8
    times[1, :] = 1
    assert resampled_map(evaluator, times) == pytest.approx([coco_metrics(records, predictions, CLASSES).map])


def test_small_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    records, predictions = scene(30, seed=4)
    evaluator = _evaluated(records, [*coco_truth(records)], predictions, len(CLASSES))
    whole = map_interval(evaluator, resamples=40)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 1)
    assert map_interval(evaluator, resamples=40) == whole


def test_the_interval_holds_the_map_and_is_narrower_with_more_images() -> None:
    widths = []
    for images in (20, 320):
        metrics = coco_metrics(*scene(images, seed=1), CLASSES, with_interval=True)
        assert metrics.map_interval is not None and metrics.map is not None
        low, high = metrics.map_interval
        assert low < metrics.map < high
        widths.append(high - low)
        assert coco_metrics(*scene(images, seed=1), CLASSES, with_interval=True) == metrics
    assert widths[1] < widths[0] / 2


def test_it_spreads_as_much_as_maps_of_other_images_do() -> None:
    maps = [coco_metrics(*scene(60, seed=seed), CLASSES[:2]).map for seed in range(60)]
    intervals = [coco_metrics(*scene(60, seed=s), CLASSES[:2], with_interval=True).map_interval for s in range(8)]
    width = np.mean([high - low for low, high in intervals])  # type: ignore[misc]
    real = np.subtract(*np.percentile(np.array(maps, float), [97.5, 2.5]))
    assert 0.7 * real < width < 1.4 * real


def test_without_being_asked_with_few_images_or_boxes_there_is_none() -> None:
    few = scene(FEWEST_IMAGES - 1, seed=1)
    assert coco_metrics(*few, CLASSES, with_interval=True).map_interval is None
    assert coco_metrics(*scene(FEWEST_IMAGES, seed=1), CLASSES, with_interval=True).map_interval is not None
    assert coco_metrics(*scene(20), CLASSES).map_interval is None
    bare = [ImageRecord(n, "", 200, 200, ()) for n in range(20)]
    assert coco_metrics(bare, [], CLASSES, with_interval=True).map_interval is None


@pytest.mark.slow
def test_it_costs_less_than_the_matching_does() -> None:
    records, predictions = scene(1000, most_boxes=10)
    started = time.process_time()
    evaluator = _evaluated(records, coco_truth(records), predictions, len(CLASSES))
    matching = time.process_time() - started
    started = time.process_time()
    map_interval(evaluator)
    assert time.process_time() - started < max(1.0, 2 * matching)
