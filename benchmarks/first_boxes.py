"""How good the boxes are that a project gets before its first label.

    python -m benchmarks.first_boxes --data DIR [--named LABEL=CLASS,CLASS …] [--detector NAME] [--weights FILE]
        [--json]

``DIR`` holds ``images/`` and ``test.json`` (COCO). Labels are known by their own names or as ``--named`` says, which
stands for ``predicted_values``. Nothing is trained. Of every known label: AP50, how many of its boxes are found, and
how many of the boxes shown are right (IoU 0.5), at the score from which a project shows boxes. Labels that share a
class are measured together too: a detector that knows `bird` cannot tell a puffin from a penguin.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.detector.data import ImageRecord, read_coco
from ppal_backend.detector.infer.evaluation import coco_metrics
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.weights.initial import save_as_is
from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.detector.zoo.known_classes import match_classes
from ppal_backend.rounds.labelled import mark_true_positives
from ppal_backend.simulation.cost import SHOWN_FROM
from ppal_backend.structures.detections import Detections, to_numpy


def measure(
    detector: str, data: Path, named: Mapping[str, Sequence[str]], work: Path, weights_dir: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A row for every known label, and one for labels that share their classes."""
    truth = read_user_coco(data / "test.json", data / "images", keep_crowd=True).dataset
    truth.write(work / "test.json")
    labels = truth.labels
    records = read_coco(work / "test.json", labels)
    weights = find_entry(detector).weights
    found = match_classes(labels, named, () if weights is None else weights.classes)
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, names in found.sources.items():
        groups.setdefault(names, []).append(label)
    for names, sharing in groups.items():
        save_as_is(detector, ("known",), {"known": names}, work / "as_is.pth", None, weights_dir)
        inference = PoolInference(detector, work / "as_is.pth", ("known",), "auto")
        started = time.monotonic()
        boxes = {d.image_id: d for d in inference.run([PoolImage(r.image_id, r.path) for r in records])}
        rate = len(records) / (time.monotonic() - started)
        for some in [[label] for label in sharing] + ([sharing] if len(sharing) > 1 else []):
            wanted = {labels.index(label) for label in some}
            row = {"labels": some, "classes": list(names), **_quality(records, boxes, wanted)}
            yield {**row, "images_a_second": rate}


def _quality(records: Sequence[ImageRecord], found: Mapping[int, Detections], wanted: set[int]) -> dict[str, Any]:
    own = [
        replace(r, instances=tuple(replace(i, class_index=0) for i in r.instances if i.class_index in wanted))
        for r in records
    ]
    predictions = []
    shown = hits = there = 0
    for record in own:
        boxes, scores = (to_numpy(v) for v in (found[record.image_id].boxes_xyxy, found[record.image_id].scores))
        for (x1, y1, x2, y2), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            predictions.append({"image_id": record.image_id, "category_id": 1, "score": score, "iscrowd": 0, **size})
        truth = np.array([instance.box_xyxy for instance in record.instances], np.float64).reshape(-1, 4)
        marked = mark_true_positives(found[record.image_id], (truth, np.zeros(len(truth), np.int64)))
        kept = scores >= SHOWN_FROM
        hits += int(to_numpy(marked.true_positive)[kept].sum())
        shown, there = shown + int(kept.sum()), there + len(truth)
    metrics = coco_metrics(own, predictions, ("known",))
    return {"map50": metrics.map50, "map": metrics.map, "boxes": there, "shown": shown, "right": hits}


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks first_boxes", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and test.json")
    parser.add_argument("--named", nargs="+", default=[], metavar="LABEL=CLASS,CLASS", help="as predicted_values")
    parser.add_argument("--detector", default="yolox_nano", help="name in the zoo (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="file of its weights, put in place first")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(words)
    torch.set_flush_denormal(True)
    pairs = (item.partition("=") for item in options.named)
    named = {label: tuple(names.split(",")) for label, _, names in pairs}
    with tempfile.TemporaryDirectory() as temporary:
        work, weights_dir = Path(temporary), None
        if options.weights is not None:
            weights_dir = work / "weights"
            place_weights(find_entry(options.detector), options.weights, weights_dir)
        for row in measure(options.detector, options.data, named, work, weights_dir):
            sys.stdout.write((json.dumps(row) if options.json else _line(row)) + "\n")
            sys.stdout.flush()


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{' and '.join(row['labels'])} from {', '.join(row['classes'])}: AP50 {row['map50'] or 0:.3f}, mAP "
        f"{row['map'] or 0:.3f}; of {row['boxes']} boxes {row['right']} are found by {row['shown']} shown; "
        f"{row['images_a_second']:.0f} images a second"
    )


if __name__ == "__main__":
    main()
