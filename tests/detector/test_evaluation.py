from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric

from ppal_backend.datasets.coco import read_predictions, write_predictions
from ppal_backend.detector.data import ImageRecord, Instance, read_coco
from ppal_backend.detector.infer import evaluation
from ppal_backend.detector.infer.evaluation import (
    Metrics,
    coco_metrics,
    evaluate,
    evaluate_versions,
)
from ppal_backend.detector.train.training import TrainResult
from ppal_backend.structures.round import ModelRef, Progress
from tests.detector.shapes import CLASSES, write_set


def as_predictions(records: tuple[ImageRecord, ...], rng: np.random.Generator | None = None) -> list[dict[str, Any]]:
    """The annotations as predictions; with ``rng``, shifted, partly mislabelled and partly missing."""
    predictions = []
    for record in records:
        for item in record.instances:
            x1, y1, x2, y2 = item.box_xyxy
            label, shift, score = item.class_index, 0.0, 1.0
            if rng is not None:
                if rng.random() < 0.2:
                    continue
                label = label if rng.random() < 0.8 else int(rng.integers(0, 3))
                shift, score = float(rng.normal(0, 3)), float(rng.random())
            box = [x1 + shift, y1, x2 - x1, y2 - y1]
            predictions.append(
                {
                    "image_id": record.image_id,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return predictions


def test_perfect_predictions_have_ap_one(train_json: Path) -> None:
    records = read_coco(train_json, CLASSES)
    metrics = coco_metrics(records, as_predictions(records), CLASSES)
    assert metrics.map == pytest.approx(1.0) and metrics.map50 == pytest.approx(1.0)
    assert metrics.per_class == pytest.approx(dict.fromkeys(CLASSES, 1.0))
    assert metrics.images == 12 and metrics.instances == sum(len(record.instances) for record in records)


def test_agrees_with_mmdets_coco_metric(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 40, seed=7)
    records = read_coco(path, CLASSES)
    predictions = as_predictions(records, np.random.default_rng(0))
    metric = CocoMetric(ann_file=str(path), metric="bbox", classwise=True)
    metric.dataset_meta = {"classes": CLASSES}
    for record in records:
        own = [item for item in predictions if item["image_id"] == record.image_id]
        boxes = torch.tensor([item["bbox"] for item in own]).reshape(-1, 4)
        metric.process(
            {},
            [
                {
                    "img_id": record.image_id,
                    "pred_instances": {
                        "bboxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
                        "scores": torch.tensor([item["score"] for item in own]),
                        "labels": torch.tensor([item["category_id"] - 1 for item in own], dtype=torch.long),
                    },
                    "ori_shape": (record.height, record.width),
                }
            ],
        )
    theirs = metric.evaluate(len(records))
    ours = coco_metrics(records, predictions, CLASSES)
    assert ours.map is not None and ours.map50 is not None and 0.1 < ours.map < 0.9
    assert ours.map == pytest.approx(theirs["coco/bbox_mAP"], abs=6e-4)
    assert ours.map50 == pytest.approx(theirs["coco/bbox_mAP_50"], abs=6e-4)
    for label in CLASSES:
        assert ours.per_class[label] == pytest.approx(theirs[f"coco/{label}_precision"], abs=6e-4)


def test_classes_without_boxes_do_not_count() -> None:
    record = ImageRecord(1, "", 50, 50, (Instance((0, 0, 20, 20), 1),))
    metrics = coco_metrics([record], as_predictions((record,)), ("a", "b", "c"))
    assert metrics.map == pytest.approx(1.0) and metrics.per_class == pytest.approx({"b": 1.0})


def test_no_predictions_is_zero_not_an_error() -> None:
    record = ImageRecord(1, "", 50, 50, (Instance((0, 0, 20, 20), 0),))
    assert coco_metrics([record], [], ("a",)).map == 0.0


def test_crowds_are_neither_found_nor_missed() -> None:
    whole, crowd = Instance((0, 0, 20, 20), 0), Instance((25, 25, 50, 50), 0, crowd=True)
    record = ImageRecord(1, "", 50, 50, (whole, crowd))
    predictions = as_predictions((record,))
    predictions[1]["score"] = 2.0  # were it a false positive, precision would fall
    metrics = coco_metrics([record], predictions, ("a",))
    assert metrics.map == pytest.approx(1.0) and metrics.instances == 1
    assert coco_metrics([ImageRecord(1, "", 50, 50, (crowd,))], [], ("a",)) == Metrics(None, None, {}, 1, 0)


def test_a_set_without_boxes_or_images_has_no_map(tmp_path: Path, trained: TrainResult, zoo_root: Path) -> None:
    empty = tmp_path / "empty.json"
    categories = [{"id": 1, "name": CLASSES[0]}]
    empty.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    assert evaluate("small", trained.checkpoint, CLASSES, empty, "cpu", zoo_root=zoo_root) == Metrics(None, None)
    negatives = write_set(tmp_path / "negatives", 3, empty_every=1)
    metrics = evaluate("small", trained.checkpoint, CLASSES, negatives, "cpu", zoo_root=zoo_root)
    assert metrics == Metrics(None, None, {}, 3, 0)


def test_evaluate_runs_the_detector_quietly(
    trained: TrainResult, test_json: Path, zoo_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Progress] = []
    metrics = evaluate(
        "small", trained.checkpoint, CLASSES, test_json, "cpu", batch_size=3, zoo_root=zoo_root, on_progress=seen.append
    )
    assert metrics.images == 8 and metrics.map is not None and 0 <= metrics.map <= 1
    assert [(item.done, item.total) for item in seen] == [(3, 8), (6, 8), (8, 8)]
    assert capfd.readouterr() == ("", "")


def test_versions_are_measured_on_the_same_images_and_each_image_is_looked_at_once(
    trained: TrainResult, zoo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round later two images have come to the set: only these are looked at, by both."""
    looked_at: list[int] = []
    predict = evaluation.predict_batch

    def noted(loaded: Any, records: Any) -> Any:
        looked_at.extend(record.image_id for record in records)
        return predict(loaded, records)

    monkeypatch.setattr(evaluation, "predict_batch", noted)
    model = ModelRef("small", str(trained.checkpoint), CLASSES)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    earlier = {1: model, 2: ModelRef("small", str(broken), CLASSES)}
    images = write_set(tmp_path / "images", 14, seed=3)
    content = json.loads(images.read_text())
    few = tmp_path / "few.json"
    ids = [image["id"] for image in content["images"]]
    kept = [row for row in content["annotations"] if row["image_id"] in ids[:12]]
    few.write_text(json.dumps({**content, "images": content["images"][:12], "annotations": kept}))
    first = evaluate_versions(3, model, earlier, few, tmp_path / "kept", "cpu", zoo_root)
    assert first.metrics == evaluate("small", trained.checkpoint, CLASSES, few, "cpu", zoo_root=zoo_root)
    assert first.earlier[1] == first.metrics.measured and first.differences[1].map == 0.0
    assert set(first.earlier) == {1} and "broken.pth" in first.problems[2]
    looked_at.clear()
    second = evaluate_versions(3, model, {1: model}, images, tmp_path / "kept", "cpu", zoo_root)
    assert sorted(looked_at) == sorted([*ids[12:], *ids[12:]])
    assert second.metrics == evaluate("small", trained.checkpoint, CLASSES, images, "cpu", zoo_root=zoo_root)


def test_boxes_of_an_earlier_version_count_by_the_names_of_its_classes(
    trained: TrainResult, test_json: Path, zoo_root: Path, tmp_path: Path
) -> None:
    """The labels were put in another order, and one was taken away, since it was trained."""
    old = ModelRef("small", str(trained.checkpoint), CLASSES)
    records = read_coco(test_json, CLASSES)
    order = (CLASSES[2], CLASSES[0])
    write_predictions(tmp_path / "9.npz", by_image(records, as_predictions(records)), CLASSES)
    perfect = by_image(read_coco(test_json, order), as_predictions(read_coco(test_json, order)))
    write_predictions(tmp_path / "10.npz", perfect, order)
    new = ModelRef("small", "not needed.pth", order)
    found = evaluate_versions(10, new, {9: old}, test_json, tmp_path, "cpu", zoo_root)
    assert found.metrics.map == pytest.approx(1.0) and found.earlier[9].map == pytest.approx(1.0)
    assert found.differences[9].map == pytest.approx(0.0)


def test_kept_predictions_that_cannot_be_used_are_made_again(train_json: Path, tmp_path: Path) -> None:
    records = read_coco(train_json, CLASSES)
    kept = by_image(records, as_predictions(records))
    path = tmp_path / "1.npz"
    write_predictions(path, kept, CLASSES)
    assert read_predictions(path, CLASSES) == kept
    assert read_predictions(path, CLASSES[:2]) == {} == read_predictions(tmp_path / "none.npz", CLASSES)
    path.write_bytes(path.read_bytes()[:100])
    assert read_predictions(path, CLASSES) == {}
    write_predictions(path, {}, CLASSES)
    assert read_predictions(path, CLASSES) == {}


def by_image(records: tuple[ImageRecord, ...], rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {record.image_id: [row for row in rows if row["image_id"] == record.image_id] for record in records}
