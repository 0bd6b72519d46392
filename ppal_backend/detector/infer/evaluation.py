"""Mean average precision by COCO's rules, and how far it may be off because other images could have been held out.

The second is a bootstrap over the images. The detections are matched with the annotations once, by pycocotools; a
resample only counts each image's matches as often as it was drawn, which gives what evaluating the copies would (but
for equal scores of different images, whose order is anybody's).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ppal_backend.detector.data import ImageRecord, read_coco
from ppal_backend.detector.infer.prediction import batch_size_for, images_at_once, predict_batch
from ppal_backend.detector.models import LoadedDetector, load_detector
from ppal_backend.detector.runtime import isolated, pick_device, quiet_stdout
from ppal_backend.structures.round import OnProgress, Progress

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
        map_interval: Low and high of ``map`` over resampled images (see ``detector.bootstrap``), or None.
    """

    map: float | None
    map50: float | None
    per_class: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    instances: int = 0
    map_interval: tuple[float, float] | None = None
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
    return evaluate_loaded(loaded, records, batch_size, on_progress, with_interval=True)


def evaluate_loaded(
    loaded: LoadedDetector,
    records: Sequence[ImageRecord],
    batch_size: int | None = None,
    on_progress: OnProgress | None = None,
    with_interval: bool = False,
) -> Metrics:
    """Evaluate a detector that is in memory and in evaluation mode.

    Args:
        loaded: The detector; ``loaded.checkpoint.classes`` are its labels in the order of the class indices.
        records: Annotated images.
        batch_size: Images at once; None for the zoo's choice.
        on_progress: Called once a batch.
        with_interval: Also tell how far the mAP depends on which images these are.

    Raises:
        ImageError: An image cannot be read.
    """
    predictions: list[dict[str, Any]] = []
    size = images_at_once(loaded, batch_size_for(loaded, batch_size))
    for start in range(0, len(records), size):
        batch, samples = predict_batch(loaded, records[start : start + size])
        for record, sample in zip(batch, samples, strict=True):
            predictions += _predictions(record.image_id, sample.pred_instances)
        if on_progress is not None:
            on_progress(Progress("evaluate", start + len(batch), len(records)))
    return coco_metrics(records, predictions, loaded.checkpoint.classes, with_interval)


def _predictions(image_id: int, instances: Any) -> list[dict[str, Any]]:
    boxes = instances.bboxes.cpu().double().numpy()
    scores, labels = instances.scores.cpu().tolist(), instances.labels.cpu().tolist()
    return [
        {
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "area": float((box[2] - box[0]) * (box[3] - box[1])),
            "iscrowd": 0,
            "score": score,
        }
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]


def coco_metrics(
    records: Sequence[ImageRecord],
    predictions: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    with_interval: bool = False,
) -> Metrics:
    """Compute COCO's AP from annotations and predictions.

    Args:
        records: Annotated images.
        predictions: COCO results; ``category_id`` is the class index + 1, boxes are x, y, width, height in px.
        classes: Labels in the order of the class indices.
        with_interval: Also tell how far the mAP depends on which images these are.
    """
    truth = coco_truth(records)
    counted = [item for item in truth if not item["iscrowd"]]
    if not counted:
        return Metrics(None, None, {}, len(records), 0)
    evaluator = _evaluated(records, truth, predictions, len(classes))
    by_area = np.asarray(evaluator.eval["precision"])[..., _MOST_DETECTIONS]
    precision = by_area[:, :, :, _ALL_AREAS]
    by_class = [_mean(precision[:, :, index]) for index in range(len(classes))]
    return Metrics(
        map=_mean(precision),
        map50=_mean(precision[_IOU_50]),
        per_class={label: ap for label, ap in zip(classes, by_class, strict=True) if ap is not None},
        images=len(records),
        instances=len(counted),
        map_interval=map_interval(evaluator) if with_interval else None,
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


RESAMPLES = 500
FEWEST_IMAGES = 10
COVERED_PCT = (2.5, 97.5)
_AT_ONCE = 2**20


def map_interval(evaluator: COCOeval, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """Percentiles 2.5 and 97.5 of the mAP over resampled images.

    The interval tells nothing of what another training on the same data would give. The same evaluation gives the
    same interval.

    Args:
        evaluator: After ``evaluate()``.
        resamples: How many sets of as many images to draw, with replacement.
        seed: Of the draw.

    Returns:
        Low and high in [0, 1]; None for fewer than ``FEWEST_IMAGES`` images, which say too little even of their own
        spread, and where nothing is annotated.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile interval.
    """
    images = len(evaluator.params.imgIds)
    if images < FEWEST_IMAGES:
        return None
    rng = np.random.default_rng(seed)
    found = resampled_map(evaluator, rng.multinomial(images, np.full(images, 1.0 / images), size=resamples))
    if not len(found):
        return None
    low, high = np.percentile(found, COVERED_PCT)
    return float(low), float(high)


def resampled_map(evaluator: COCOeval, times: np.ndarray) -> np.ndarray:
    """mAP of sets in which images occur several times.

    Args:
        evaluator: After ``evaluate()``; objects of all sizes and its largest number of detections count.
        times: ``[B, N]`` how often each image occurs in each set, in the order of the evaluator's image ids.

    Returns:
        ``[b]`` mAP in [0, 1] of the sets that hold any annotated box, averaged over the classes they hold.
    """
    recalls = np.asarray(evaluator.params.recThrs)
    total, classes = np.zeros(len(times)), np.zeros(len(times), dtype=int)
    for matches in _by_class(evaluator):
        for rows in _parts(len(times), len(matches.image)):
            ap, present = _average_precision(matches, times[rows], recalls)
            total[rows] += ap
            classes[rows] += present
    return total[classes > 0] / classes[classes > 0]


@dataclass(frozen=True)
class _Matches:
    """Detections of one class by falling score: ``[D]`` their image, ``[T, D]`` whether they are right or do not count
    at each IoU threshold; and ``[N]`` annotated boxes of each image."""

    image: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray


def _by_class(evaluator: COCOeval) -> Iterator[_Matches]:
    images, areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    for position in range(len(evaluator.params.catIds)):
        first = position * areas * images  # objects of all sizes come first
        found = [(n, e) for n, e in enumerate(evaluator.evalImgs[first : first + images]) if e is not None]
        boxes = np.zeros(images)
        for n, of_image in found:
            boxes[n] = np.count_nonzero(np.asarray(of_image["gtIgnore"]) == 0)
        if not boxes.any():
            continue
        scores = np.concatenate([e["dtScores"] for _, e in found])
        order = np.argsort(-scores, kind="mergesort")
        ignored = np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order].astype(bool)
        matched = np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] > 0
        image = np.repeat([n for n, _ in found], [len(e["dtScores"]) for _, e in found])[order]
        yield _Matches(image.astype(int), matched & ~ignored, ignored, boxes)


def _average_precision(matches: _Matches, times: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[b]`` AP over the IoU thresholds, 0 in sets without a box of the class; and ``[b]`` whether they hold one."""
    wanted = times @ matches.boxes
    drawn = times[:, matches.image].astype(float)
    always = not matches.ignored.any()
    seen = drawn.cumsum(axis=1)
    total = np.zeros(len(times))
    for right, ignored in zip(matches.right, matches.ignored, strict=True):
        at = np.flatnonzero(right)
        counted = seen if always else np.where(ignored, 0.0, drawn).cumsum(axis=1)
        found = drawn[:, at].cumsum(axis=1)
        precision = found / np.maximum(counted[:, at], 1.0)
        best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(recalls, found / np.maximum(wanted, 1.0)[:, None], side="right")
        total += (best_from_here * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(recalls)
    return np.where(wanted > 0, total / len(matches.right), 0.0), wanted > 0


def _parts(count: int, width: int) -> Iterator[slice]:
    """Rows that take a few MiB at a time."""
    size = max(1, _AT_ONCE // max(1, width))
    return (slice(start, start + size) for start in range(0, count, size))
