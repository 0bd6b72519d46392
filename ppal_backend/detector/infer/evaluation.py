"""Mean average precision by COCO's rules, of one detector or of several on the same images."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ppal_backend.datasets.coco import read_predictions, result_row, write_predictions
from ppal_backend.detector.data import ImageRecord, read_coco
from ppal_backend.detector.infer.bootstrap import compare, measure
from ppal_backend.detector.infer.prediction import batch_size_for, images_at_once, predict_batch
from ppal_backend.detector.models import LoadedDetector, load_detector
from ppal_backend.detector.runtime import isolated, pick_device, quiet_stdout
from ppal_backend.errors import PPALError
from ppal_backend.structures.quality import Difference, Measured
from ppal_backend.structures.round import ModelRef, OnProgress, Progress

logger = logging.getLogger(__name__)

_IOU_50 = 0
_ALL_AREAS = 0
_SMALL_AREAS = 1
_MOST_DETECTIONS = -1


@dataclass(frozen=True)
class Metrics:
    """Quality of a detector on annotated images.

    Args:
        map: AP over IoU 0.50 to 0.95 in [0, 1], averaged over the classes that have boxes; None without any box.
        map50: The same at IoU 0.50.
        map_small: As ``map``, of boxes under 32 × 32 px alone; None without any of them.
        per_class: AP over IoU 0.50 to 0.95 by label, for the classes that have boxes.
        images: Number of images.
        instances: Number of boxes (crowds apart).
        measured: What that tells of images like these, with how sure it is; None where nobody asked.
    """

    map: float | None
    map50: float | None
    per_class: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    instances: int = 0
    measured: Measured | None = None
    map_small: float | None = None


def evaluate(
    detector: str,
    checkpoint: Path,
    classes: Sequence[str],
    ann_json: Path,
    device: str = "auto",
    *,
    batch_size: int | None = None,
    zoo_root: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Metrics:
    """Evaluate a trained detector.

    Args:
        detector: Name in the zoo.
        checkpoint: Final checkpoint of a training.
        classes: Labels in the order of the class indices.
        ann_json: COCO file with absolute ``file_name``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: Images at once; None for the zoo's choice.
        zoo_root: Folder of the zoo; None for the packaged one.
        on_progress: Called once a batch.

    Returns:
        Metrics; ``map`` is None for no images or no boxes.

    Raises:
        CheckpointError: The checkpoint is damaged or belongs to something else.
        DatasetError: The COCO file cannot be read.
        ImageError: An image cannot be read.
    """
    records = read_coco(ann_json, classes)
    if not any(record.instances for record in records):
        return Metrics(None, None, {}, len(records), 0)
    with isolated(f"ppal-{uuid.uuid4().hex}"):
        loaded = load_detector(detector, Path(checkpoint), classes, pick_device(device), zoo_root)
    return evaluate_loaded(loaded, records, batch_size, on_progress, with_measured=True)


@dataclass(frozen=True)
class Versions:
    """A detector on a set of images, and earlier ones on the same images.

    Args:
        metrics: Of the detector.
        earlier: What is measured of the earlier ones, by their number.
        differences: mAP of the detector less theirs.
        problems: Why others could not be evaluated, by their number.
    """

    metrics: Metrics
    earlier: Mapping[int, Measured] = field(default_factory=dict)
    differences: Mapping[int, Difference] = field(default_factory=dict)
    problems: Mapping[int, str] = field(default_factory=dict)


def evaluate_versions(
    number: int,
    model: ModelRef,
    earlier: Mapping[int, ModelRef],
    ann_json: Path,
    folder: Path,
    device: str = "auto",
    zoo_root: Path | None = None,
) -> Versions:
    """Evaluate a detector and earlier ones on the same images.

    What a detector predicts is kept in ``folder`` by its number: only images that are new to it are looked at. Boxes of
    an earlier detector count by the names of its classes; those that the new one does not know are left out.

    Args:
        number: Of the detector.
        model: The detector; its classes are those that count.
        earlier: Earlier detectors by their numbers.
        ann_json: COCO file with absolute ``file_name``.
        folder: Where predictions are kept, as ``NUMBER.npz``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.

    Raises:
        CheckpointError: The detector's checkpoint is damaged or belongs to something else; earlier ones only miss.
        DatasetError: The COCO file cannot be read.
        ImageError: An image cannot be read.
    """
    records = read_coco(ann_json, model.labels)
    if not any(record.instances for record in records):
        return Versions(Metrics(None, None, {}, len(records), 0))
    truth = coco_truth(records)

    def evaluated(at: int, of: ModelRef) -> COCOeval:
        rows = kept_predictions(folder / f"{at}.npz", of, records, device, zoo_root)
        known = {index: model.labels.index(label) for index, label in enumerate(of.labels) if label in model.labels}
        rows = [{**row, "category_id": known[c] + 1} for row in rows if (c := row["category_id"] - 1) in known]
        return _evaluated(records, truth, rows, len(model.labels))

    current = evaluated(number, model)
    metrics = _metrics(current, records, model.labels, with_measured=True)
    others: dict[int, Measured] = {}
    differences: dict[int, Difference] = {}
    problems: dict[int, str] = {}
    for at, of in earlier.items():
        try:
            other = evaluated(at, of)
        except PPALError as error:
            logger.warning("the version of round %d is not measured again: %s", at, error)
            problems[at] = str(error)
            continue
        others[at] = measure(other, model.labels)
        difference = compare(current, other)
        if difference is not None:
            differences[at] = difference
    return Versions(metrics, others, differences, problems)


def kept_predictions(
    path: Path, model: ModelRef, records: Sequence[ImageRecord], device: str, zoo_root: Path | None
) -> list[dict[str, Any]]:
    """COCO results of a detector on these images, from its file as far as that has them; the file has them all then.

    Args:
        path: The ``.npz`` file, which need not exist.
        model: The detector.
        records: Images; nothing is looked at where the file has all of them.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.

    Returns:
        Rows of COCO results, image by image in the order of ``records``.

    Raises:
        CheckpointError: The checkpoint is damaged or belongs to something else.
        ImageError: An image cannot be read.
    """
    kept = read_predictions(path, model.labels)
    new = [record for record in records if record.image_id not in kept]
    if new:
        with isolated(f"ppal-{uuid.uuid4().hex}"):
            loaded = load_detector(model.detector, Path(model.checkpoint), model.labels, pick_device(device), zoo_root)
        kept.update({record.image_id: [] for record in new})
        for row in _predict(loaded, new):
            kept[row["image_id"]].append(row)
        write_predictions(path, kept, model.labels)
    return [row for record in records for row in kept[record.image_id]]


def evaluate_loaded(
    loaded: LoadedDetector,
    records: Sequence[ImageRecord],
    batch_size: int | None = None,
    on_progress: OnProgress | None = None,
    with_measured: bool = False,
) -> Metrics:
    """Evaluate a detector that is in memory and in evaluation mode.

    Args:
        loaded: The detector; ``loaded.checkpoint.classes`` are its labels in the order of the class indices.
        records: Annotated images.
        batch_size: Images at once; None for the zoo's choice.
        on_progress: Called once a batch.
        with_measured: Also tell what that says of images like these.

    Raises:
        ImageError: An image cannot be read.
    """
    predictions = _predict(loaded, records, batch_size, on_progress)
    return coco_metrics(records, predictions, loaded.checkpoint.classes, with_measured)


def _predict(
    loaded: LoadedDetector,
    records: Sequence[ImageRecord],
    batch_size: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    predictions: list[dict[str, Any]] = []
    size = images_at_once(loaded, batch_size_for(loaded, batch_size))
    for start in range(0, len(records), size):
        batch = records[start : start + size]
        for record, sample in zip(batch, predict_batch(loaded, batch), strict=True):
            predictions += _predictions(record.image_id, sample.pred_instances)
        if on_progress is not None:
            on_progress(Progress("evaluate", start + len(batch), len(records)))
    return predictions


def _predictions(image_id: int, instances: Any) -> list[dict[str, Any]]:
    boxes = instances.bboxes.cpu().double().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    scores, labels = instances.scores.cpu().tolist(), instances.labels.cpu().tolist()
    return [result_row(image_id, box, score, label) for box, score, label in zip(boxes, scores, labels, strict=True)]


def coco_metrics(
    records: Sequence[ImageRecord],
    predictions: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    with_measured: bool = False,
) -> Metrics:
    """Compute COCO's AP from annotations and predictions.

    Args:
        records: Annotated images.
        predictions: COCO results; ``category_id`` is the class index + 1, boxes are x, y, width, height in px.
        classes: Labels in the order of the class indices.
        with_measured: Also tell what that says of images like these.
    """
    truth = coco_truth(records)
    counted = [item for item in truth if not item["iscrowd"]]
    if not counted:
        return Metrics(None, None, {}, len(records), 0)
    return _metrics(_evaluated(records, truth, predictions, len(classes)), records, classes, with_measured)


def _metrics(
    evaluator: COCOeval, records: Sequence[ImageRecord], classes: Sequence[str], with_measured: bool
) -> Metrics:
    by_area = np.asarray(evaluator.eval["precision"])[..., _MOST_DETECTIONS]
    precision = by_area[:, :, :, _ALL_AREAS]
    by_class = [_mean(precision[:, :, index]) for index in range(len(classes))]
    return Metrics(
        map=_mean(precision),
        map50=_mean(precision[_IOU_50]),
        per_class={label: ap for label, ap in zip(classes, by_class, strict=True) if ap is not None},
        images=len(records),
        instances=sum(not item.crowd for record in records for item in record.instances),
        measured=measure(evaluator, classes) if with_measured else None,
        map_small=_mean(by_area[:, :, :, _SMALL_AREAS]),
    )


def coco_truth(records: Sequence[ImageRecord]) -> list[dict[str, Any]]:
    """Annotated images as COCO annotations: ``category_id`` is class index + 1, boxes are x, y, width, height in px."""
    return [
        {
            "image_id": record.image_id,
            "category_id": item.class_index + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(item.crowd),
        }
        for record in records
        for item in record.instances
        for x1, y1, x2, y2 in [item.box_xyxy]
    ]


def _evaluated(
    records: Sequence[ImageRecord],
    truth: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    num_classes: int,
) -> COCOeval:
    """Accumulated; precision is ``[IoU thresholds, recalls, classes, areas, detections]``, -1 without boxes."""
    with quiet_stdout():  # pycocotools prints
        evaluator = COCOeval(
            _index(records, truth, num_classes), _index(records, predictions, num_classes), iouType="bbox"
        )
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _index(records: Sequence[ImageRecord], annotations: Sequence[Mapping[str, Any]], num_classes: int) -> COCO:
    index = COCO()
    index.dataset = {
        "images": [{"id": record.image_id} for record in records],
        "annotations": [{**item, "id": number} for number, item in enumerate(annotations, start=1)],
        "categories": [{"id": number} for number in range(1, num_classes + 1)],
    }
    index.createIndex()
    return index


def _mean(precision: np.ndarray) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None
