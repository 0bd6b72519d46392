"""Which labelled images are worth a second look: people's boxes against what an earlier model saw before them.

An image that is labelled now was in the pool of earlier rounds, and those left their model's detections on it. That
model had not learned from the image, which is what the comparison needs, and no image is looked at again for it.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.acquisition.label_quality import Compared, Dispute, disputes_of, sure_from
from ppal_backend.datasets.coco import CocoDataset, CocoImage
from ppal_backend.files import numbered_before, read_json
from ppal_backend.rounds.detections_store import Box, read_boxes
from ppal_backend.rounds.labelled import Truth, truth_by_image
from ppal_backend.structures.quality import Quality

log = logging.getLogger(__name__)

QUALITY = "dataset/quality.json"
LEAST_AP = 0.1
"""AP on the evaluation set from which a class's detections are held against people's boxes."""
LISTED_SHARE, FEWEST_LISTED, MOST_LISTED = 0.25, 12, 120


def review_of(folder: Path, labelled: CocoDataset, annotators: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Compare the labelled images with the newest earlier detections on them.

    Args:
        folder: The round's folder; those of earlier rounds lie beside it.
        labelled: All labelled images.
        annotators: Label Studio's id of the user who annotated it, by task id, where that is known.

    Returns:
        For JSON: how many images were ``labelled`` and ``compared`` and have something ``disputed``, and of those the
        most disputed ``tasks`` (a quarter of the compared ones) with their boxes (x1, y1, x2, y2 in px), the one with
        the most and strongest doubts first. ``left_out`` are the classes that are not held against people, with their
        AP, which is None where it is not measured.
    """
    labels = labelled.labels
    truth = truth_by_image(labelled, labels)
    pairs = {i: (number, _compared(truth[i], boxes)) for number, i, boxes in _earlier(folder, set(truth), labels)}
    sure = sure_from((compared for _, compared in pairs.values()), len(labels))
    measured = _measured_before(folder)
    left_out = [k for k, label in enumerate(labels) if measured.get(label, 0.0) < LEAST_AP]
    sure[left_out] = np.inf
    disputes = {i: found for i, (_, compared) in pairs.items() if (found := disputes_of(compared, sure))}
    order, images = strongest_first(disputes), {image.id: image for image in labelled.images}
    listed = min(MOST_LISTED, max(FEWEST_LISTED, round(LISTED_SHARE * len(pairs))))
    tasks = [_task(images[i], *pairs[i], disputes[i], labels) for i in order[:listed]]
    return {
        "labelled": len(labelled.images),
        "compared": len(pairs),
        "disputed": len(disputes),
        "least_ap": LEAST_AP,
        "left_out": [{"label": labels[k], "ap": measured.get(labels[k])} for k in left_out],
        "tasks": [{**task, "annotator": (annotators or {}).get(task["task_id"])} for task in tasks],
    }


def strongest_first(disputes: Mapping[int, Sequence[Dispute]]) -> list[int]:
    """Image ids, the one where the doubts weigh most together in front."""
    return sorted(disputes, key=lambda i: (-sum(1 - dispute.score for dispute in disputes[i]), i))


def _measured_before(folder: Path) -> Mapping[str, float]:
    """AP by label of the newest earlier training that measured enough to tell; empty without one."""
    for earlier in numbered_before(folder):
        path = earlier / "metrics.json"
        try:
            measured = Quality.of(read_json(path)).measured if path.is_file() else None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s); an earlier measurement is used", path, error)
            continue
        if measured is not None and measured.is_reportable:
            return measured.classes
    return {}


def _earlier(
    folder: Path, image_ids: Collection[int], labels: Sequence[str]
) -> Iterator[tuple[int, int, list[tuple[int, Box]]]]:
    """Round number, image id and boxes with their class index in ``labels``, from the newest round that has them."""
    left = set(image_ids)
    for earlier in numbered_before(folder):
        try:
            names = _labels_of(earlier)
            found: Mapping[int, Sequence[Box]] = read_boxes(earlier / "detections", left) if names and left else {}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read (%s); its detections are not compared with annotations", earlier, error)
            continue
        left -= found.keys()
        index = {position: labels.index(name) for position, name in enumerate(names) if name in labels}
        for image_id, boxes in found.items():
            yield int(earlier.name), image_id, [(index[b.class_index], b) for b in boxes if b.class_index in index]


def _labels_of(folder: Path) -> Sequence[str]:
    """Labels of the model that made a round's detections, by class index; none where there was no model."""
    spec, trained = folder / "spec.json", folder / "train" / "model.json"
    if not spec.is_file():
        return ()
    asked = read_json(spec)
    if asked["kind"] == "rank":
        return tuple((asked.get("model") or {}).get("labels") or ())
    return tuple(read_json(trained)["labels"]) if trained.is_file() else ()


def _compared(truth: Truth, boxes: Sequence[tuple[int, Box]]) -> Compared:
    return Compared(
        *truth,
        np.array([box.box_xyxy for _, box in boxes], np.float64).reshape(-1, 4),
        np.array([class_index for class_index, _ in boxes], np.int64),
        np.array([box.score for _, box in boxes], np.float64),
    )


def _task(
    image: CocoImage, number: int, compared: Compared, disputes: Sequence[Dispute], labels: Sequence[str]
) -> dict[str, Any]:
    boxes = zip(compared.boxes.tolist(), compared.classes.tolist(), strict=True)
    return {
        "task_id": image.id,
        "round": number,
        "width": image.width,
        "height": image.height,
        "annotated": [{"box_xyxy": box, "label": labels[class_index]} for box, class_index in boxes],
        "disputes": [
            {
                "kind": d.kind,
                "score": d.score,
                "annotated": d.annotated,
                "box_xyxy": compared.detected[d.detected].tolist(),
                "label": labels[int(compared.detected_classes[d.detected])],
                "confidence": float(compared.scores[d.detected]),
            }
            for d in disputes
        ],
    }
