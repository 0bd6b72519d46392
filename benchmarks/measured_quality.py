"""Whether the interval that a page shows holds the mAP of all images, over many small projects.

    python -m benchmarks.measured_quality [--data DIR …] [--projects 200] [--json]

``DIR`` holds ``pool.json`` and ``test.json`` (COCO); only annotations are read, no image and no model is needed. A
detector is made of noise, as good as ``QUALITIES`` say: it misses hard images and small boxes together, misplaces boxes
the more the less sure it is, takes classes for others and invents boxes. All images of a set are the truth; a project
labels 30 to 300 of them, drawn with replacement. Without ``--data`` the images are random boxes.

Beside what is shown today stands the old way: a tenth of the labelled images, percentiles of the plain bootstrap, all
classes that have a box.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.detector.data import ImageRecord, Instance, read_coco
from ppal_backend.detector.infer.bootstrap import Evaluated
from ppal_backend.detector.infer.evaluation import _evaluated, coco_truth
from ppal_backend.files import read_json
from ppal_backend.structures.quality import FEWEST_IMAGES

QUALITIES = {"weak": -0.5, "fair": 1.0, "good": 2.5}
SHARE, FULL, OLD_SHARE = 0.2, 40, 0.1


def records_of(folder: Path) -> tuple[list[ImageRecord], int]:
    """The annotated images of a set, numbered anew, and how many classes it has."""
    labels = [c["name"] for c in sorted(read_json(folder / "test.json")["categories"], key=lambda c: c["id"])]
    found = [r for name in ("test.json", "pool.json") for r in read_coco(folder / name, labels)]
    return [ImageRecord(n, "", r.width, r.height, r.instances) for n, r in enumerate(found, start=1)], len(labels)


def random_records(images: int = 800) -> tuple[list[ImageRecord], int]:
    """Images with random boxes of three classes, of which one is rare."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(1, images + 1):
        boxes = []
        for _ in range(int(rng.integers(0, 6))):
            (x, y), size = rng.uniform(0, 500, 2), rng.uniform(20, 130)
            boxes.append(Instance((x, y, x + size, y + size), int(rng.choice(3, p=[0.55, 0.4, 0.05])), False))
        made.append(ImageRecord(number, "", 640, 640, tuple(boxes)))
    return made, 3


def detect(
    records: Sequence[ImageRecord], classes: int, quality: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """What a detector of that quality predicts, as COCO results."""
    of_class, found = rng.normal(0, 0.8, classes), []
    for record in records:
        of_image = rng.normal(0, 0.8)
        for item in record.instances:
            x1, y1, x2, y2 = item.box_xyxy
            width, height = x2 - x1, y2 - y1
            small = 0.3 * np.log(width * height / (record.width * record.height) + 1e-4)
            ease = quality + of_class[item.class_index] + of_image + small + 1.5
            if rng.random() < _share(ease):
                spread = 0.18 * np.exp(-0.25 * ease)
                dx, dy = rng.normal(0, spread, 2) * (width, height)
                wide, high = np.exp(rng.normal(0, spread, 2)) * (width, height)
                right = rng.random() < _share(ease + 2.5)
                label = item.class_index if right else int(rng.integers(classes))
                score = _share(0.6 * ease + rng.normal(0, 1.0))
                found.append(_result(record, label, (x1 + dx, y1 + dy, wide, high), score))
        for _ in range(rng.poisson(rng.gamma(1.0, 3.0))):
            wide, high = rng.uniform(0.05, 0.4, 2) * (record.width, record.height)
            x, y = rng.uniform(0, record.width - wide), rng.uniform(0, record.height - high)
            label, score = int(rng.integers(classes)), _share(-1.2 + rng.normal(0, 1.0))
            found.append(_result(record, label, (x, y, wide, high), score))
    return found


def _share(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def _result(record: ImageRecord, label: int, bbox: Sequence[float], score: float) -> dict[str, Any]:
    box = [float(value) for value in bbox]
    return {"image_id": record.image_id, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            "score": score}  # fmt: skip


def projects(whole: Evaluated, count: int) -> Mapping[str, Any]:
    """Shown and held intervals of many projects, as they are now and as they were."""
    once = np.ones((1, whole.images), dtype=int)
    truth = whole.average_precision(once)[0]
    everything = float(np.nanmean(truth))
    rows: dict[str, list[tuple[bool, bool, float]]] = {"now": [], "before": []}
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels = int(rng.integers(30, 301))
        images = min(FULL, int(SHARE * labels))
        if images >= FEWEST_IMAGES:
            found = whole.drawn(rng.integers(0, whole.images, images))
            ap = found.average_precision(np.ones((1, images), dtype=int))[0]
            shown = found.interval(ap, found.resampled(0), found.halved(0))
            if shown is not None:
                wanted = float(truth[found.measured].mean())
                rows["now"].append((_holds(shown, wanted), _holds(shown, everything), shown[1] - shown[0]))
        held_out = int(OLD_SHARE * labels)
        if held_out >= FEWEST_IMAGES:
            found = whole.drawn(rng.integers(0, whole.images, held_out))
            low, high = np.nanpercentile(np.nanmean(found.resampled(0), axis=1), [2.5, 97.5])
            rows["before"].append((_holds((low, high), everything),) * 2 + (float(high - low),))
    figures = {
        way: {
            "shown": len(found),
            "held_pct": round(100 * float(np.mean([row[0] for row in found])), 1),
            "held_all_classes_pct": round(100 * float(np.mean([row[1] for row in found])), 1),
            "width": round(float(np.mean([row[2] for row in found])), 3),
        }
        for way, found in rows.items()
        if found
    }
    return {"map": round(everything, 3), **figures}


def _holds(interval: Sequence[float], value: float) -> bool:
    return bool(interval[0] <= value <= interval[1])


def run(folders: Sequence[Path], count: int) -> list[dict[str, Any]]:
    """Every set with every quality of detector."""
    sets = [(folder.name, *records_of(folder)) for folder in folders] or [("random boxes", *random_records())]
    rows = []
    for name, records, classes in sets:
        for quality, value in QUALITIES.items():
            predictions = detect(records, classes, value, np.random.default_rng(2))
            whole = Evaluated(_evaluated(records, coco_truth(records), predictions, classes))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                rows.append({"set": name, "detector": quality, "projects": count, **projects(whole, count)})
    return rows


def main(arguments: Sequence[str]) -> int:
    """Entry of ``python -m benchmarks.measured_quality``."""
    parser = argparse.ArgumentParser(prog="benchmarks.measured_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders with pool.json and test.json")
    parser.add_argument("--projects", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = run(options.data, options.projects)
    text = json.dumps(rows, indent=1) if options.json else as_table(rows)
    sys.stdout.write(text + "\n")
    return 0


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For docs/benchmarks.md."""
    lines = ["| set | detector | mAP | now: shown | holds | width | before: shown | holds | width |", "|---" * 9 + "|"]
    for row in rows:
        now, before = row["now"], row["before"]
        lines.append(
            f"| {row['set']} | {row['detector']} | {row['map']:.3f} | {now['shown']} | {now['held_pct']} % "
            f"({now['held_all_classes_pct']} %) | {now['width']:.3f} | {before['shown']} | {before['held_pct']} % | "
            f"{before['width']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
