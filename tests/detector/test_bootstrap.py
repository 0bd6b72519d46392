"""The bootstrap: a resample gives what pycocotools finds for the copied images."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ppal_backend.detector.data import ImageRecord, Instance
from ppal_backend.detector.infer import bootstrap
from ppal_backend.detector.infer.bootstrap import Evaluated, compare
from ppal_backend.detector.infer.evaluation import _evaluated, coco_metrics, coco_truth
from ppal_backend.structures.quality import FEWEST_BOXES, FEWEST_IMAGES, Difference, Measured

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
    found = np.nanmean(Evaluated(evaluator).average_precision(times), axis=1)
    assert found[0] == pytest.approx(coco_metrics(records, predictions, CLASSES).map, abs=1e-9)
    assert found == pytest.approx([reference(records, predictions, row) for row in times], abs=1e-9)
    assert len({round(value, 6) for value in found}) == 12, "they differ"


def test_drawn_images_are_evaluated_as_they_would_be_from_the_start() -> None:
    records, predictions = scene(40, seed=6)
    whole = Evaluated(_evaluated(records, coco_truth(records), predictions, len(CLASSES)))
    positions = np.random.default_rng(2).integers(0, 40, 15)
    found = whole.drawn(positions)
    expected = reference(records, predictions, np.bincount(positions, minlength=40))
    assert np.nanmean(found.average_precision(np.ones((1, 15), dtype=int))) == pytest.approx(expected, abs=1e-9)
    assert found.images == 15 and len(whole.drawn([0]).boxes) == len(CLASSES)


def test_sets_without_any_box_have_no_map() -> None:
    records, predictions = scene(8, seed=2)
    empty = next(n for n, record in enumerate(records) if not record.instances)
    evaluator = _evaluated(records, [*coco_truth(records)], predictions, len(CLASSES))
    times = np.zeros((2, 8), dtype=int)
    times[0, empty] = 8
    times[1, :] = 1
    found = Evaluated(evaluator).average_precision(times)
    assert np.isnan(found[0]).all()
    assert np.nanmean(found[1]) == pytest.approx(coco_metrics(records, predictions, CLASSES).map)


def test_small_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = coco_metrics(*scene(30, seed=4), CLASSES, with_measured=True)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 1)
    assert coco_metrics(*scene(30, seed=4), CLASSES, with_measured=True) == whole


def measured_of(records: list[ImageRecord], predictions: list[Prediction]) -> Measured:
    measured = coco_metrics(records, predictions, CLASSES, with_measured=True).measured
    assert measured is not None
    return measured


def width(measured: Measured) -> float:
    assert measured.interval is not None
    return measured.interval[1] - measured.interval[0]


def test_the_interval_is_narrower_with_more_images_and_always_the_same() -> None:
    few, many = (measured_of(*scene(images, seed=1)) for images in (20, 320))
    assert width(many) < width(few) / 2
    assert many.map is not None and many.interval is not None and many.interval[0] < many.map < many.interval[1]
    assert measured_of(*scene(20, seed=1)) == few


def test_classes_with_too_few_boxes_or_images_are_named_and_do_not_count() -> None:
    records, predictions = scene(200, seed=1)
    measured = measured_of(records, predictions)
    metrics = coco_metrics(records, predictions, CLASSES)
    counts = {label: sum(i.class_index == c for r in records for i in r.instances) for c, label in enumerate(CLASSES)}
    assert set(measured.classes) == {label for label in CLASSES if counts[label] >= FEWEST_BOXES} == {"a", "b", "c"}
    assert measured.too_few == {"absent": 0}
    assert measured.classes == pytest.approx({k: v for k, v in metrics.per_class.items() if k in measured.classes})
    assert measured.map == pytest.approx(np.mean(list(measured.classes.values())))
    crowded = [replace(r, instances=()) for r in records[:-2]] + [
        replace(r, instances=tuple(Instance((9 * k, 0, 9 * k + 8, 8), 0, False) for k in range(9)))
        for r in records[-2:]
    ]
    assert measured_of(crowded, predictions).too_few["a"] == 18, "all of them in two images"


@pytest.mark.parametrize("images", [10, 20, 40])
def test_it_holds_the_map_of_all_such_images_and_plain_percentiles_do_not(images: int) -> None:
    """Two hundred small sets out of one large one. benchmarks/measured_quality.py has the figures at length."""
    records, predictions = scene(1500, seed=3)
    whole = Evaluated(_evaluated(records, coco_truth(records), predictions, len(CLASSES)))
    held: dict[str, list[bool]] = {"told": [], "percentiles": []}
    rng = np.random.default_rng(8)
    truth = whole.average_precision(np.ones((1, 1500), dtype=int))[0]
    for _ in range(200):
        found = whole.drawn(rng.choice(1500, images, replace=False))
        if not found.measured.any():
            continue
        resampled = found.resampled(0)
        ap = found.average_precision(np.ones((1, images), dtype=int))[0]
        told = found.interval(ap, resampled, found.halved(0))
        assert told is not None
        wanted = truth[found.measured].mean()
        plain = np.nanpercentile(np.nanmean(resampled, axis=1), [2.5, 97.5])
        held["told"].append(told[0] <= wanted <= told[1])
        held["percentiles"].append(plain[0] <= np.nanmean(truth) <= plain[1])
    assert 0.90 <= np.mean(held["told"]) <= 0.99
    assert np.mean(held["percentiles"]) < np.mean(held["told"])


@pytest.mark.parametrize("right", [True, False])
def test_what_no_resample_changes_is_not_taken_for_certain(right: bool) -> None:
    records, _ = scene(30, seed=1)
    rows = [
        predicted(r.image_id, i.class_index, (i.box_xyxy[0], i.box_xyxy[1], i.box_xyxy[2] - i.box_xyxy[0],
                                              i.box_xyxy[3] - i.box_xyxy[1]), 0.9)
        for r in records for i in r.instances
    ]  # fmt: skip
    measured = measured_of(records, rows if right else [])
    assert measured.map == pytest.approx(1.0 if right else 0.0)
    assert measured.interval == pytest.approx((0.9, 1.0) if right else (0.0, 0.1)), "three in thirty"


def worse(predictions: list[Prediction], share: float, seed: int = 0) -> list[Prediction]:
    """The same detector with a share of its boxes moved away."""
    rng = np.random.default_rng(seed)
    moved = [{**p, "bbox": [p["bbox"][0] + 30, *p["bbox"][1:]]} for p in predictions]
    return [m if rng.random() < share else p for p, m in zip(predictions, moved, strict=True)]


def compared(records: list[ImageRecord], one: list[Prediction], two: list[Prediction]) -> Difference:
    evaluators = [_evaluated(records, coco_truth(records), rows, len(CLASSES)) for rows in (one, two)]
    found = compare(*evaluators)
    assert found is not None
    return found


def test_a_worse_detector_is_told_on_the_images_that_show_it() -> None:
    records, predictions = scene(60, seed=1)
    much, little = worse(predictions, 0.5), worse(predictions, 0.03)
    assert compared(records, predictions, much).verdict == "better"
    assert compared(records, much, predictions).verdict == "worse"
    assert compared(records, predictions, little).verdict == "open"
    assert compared(records, predictions, predictions).map == 0.0
    assert compared(records, predictions, predictions).verdict == "open"


def test_pairing_tells_what_two_intervals_do_not() -> None:
    records, predictions = scene(60, seed=1)
    other = worse(predictions, 0.2)
    one, two = measured_of(records, predictions), measured_of(records, other)
    assert one.interval is not None and two.interval is not None and two.interval[1] > one.interval[0], "they overlap"
    assert compared(records, predictions, other).verdict == "better"


def test_the_same_quality_is_called_different_in_few_cases_only() -> None:
    """Two detectors that are equally good on all images, on a hundred small sets."""
    wrong = 0
    for seed in range(100):
        records, predictions = scene(30, seed=seed)
        found = compared(records, worse(predictions, 0.2, seed=1), worse(predictions, 0.2, seed=2))
        wrong += found.verdict != "open"
    assert wrong <= 10


def test_without_being_asked_with_few_images_or_boxes_there_is_none() -> None:
    assert measured_of(*scene(FEWEST_IMAGES - 1, seed=1)).interval is None
    assert measured_of(*scene(FEWEST_IMAGES, seed=1)).interval is not None
    assert coco_metrics(*scene(20), CLASSES).measured is None
    bare = [ImageRecord(n, "", 200, 200, ()) for n in range(20)]
    assert coco_metrics(bare, [], CLASSES, with_measured=True).measured is None
    few = scene(FEWEST_IMAGES - 1, seed=1)
    assert compared(few[0], few[1], few[1]).interval is None


@pytest.mark.slow
def test_it_costs_less_than_the_matching_does() -> None:
    records, predictions = scene(1000, most_boxes=10)
    started = time.process_time()
    evaluator = _evaluated(records, coco_truth(records), predictions, len(CLASSES))
    matching = time.process_time() - started
    started = time.process_time()
    bootstrap.measure(evaluator, CLASSES)
    assert time.process_time() - started < max(1.0, 2 * matching)
