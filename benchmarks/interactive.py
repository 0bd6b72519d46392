"""How fast a rough box becomes the detector's box: /predict with a context, as Label Studio sends it for every one.

    python -m benchmarks.interactive --json

writes a round of 20,000 images with 100 detections each, starts the service under gunicorn with its own configuration
and draws 600 rough boxes and clicks, one after the other, on images in random order. Milliseconds as the caller sees
them, over a connection of its own each; what Label Studio and the browser take comes on top.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.service import CONFIG, PROJECT, call, service
from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import load_settings
from ppal_backend.store import ModelVersion, open_store
from ppal_backend.structures.detections import Detections

WIDTH, HEIGHT, BOXES = 1280, 960, 100
TARGET_MS = 300.0


@dataclass(frozen=True)
class Report:
    """``first_ms`` is the very first answer, which looks at where each image lies; it is not among the others."""

    images: int
    drawn: int
    first_ms: float
    p50_ms: float
    p95_ms: float
    max_ms: float
    failed: int
    met: bool


def run(images: int = 20_000, drawn: int = 600) -> Report:
    """Measure once."""
    rng = random.Random(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        boxes = _write_round(folder, images)
        with service(folder) as (port, _):
            call(port, "POST", "/setup", {"project": PROJECT, "schema": CONFIG, "hostname": "http://localhost:8080"})
            _activate(folder)
            times, failed = [], 0
            for number in range(drawn + 1):
                body = _body(rng.randint(1, images), boxes, rng, number)
                start = time.perf_counter()
                failed += call(port, "POST", "/predict", body) != 200
                times.append((time.perf_counter() - start) * 1000)
    first, *rest = times
    p95 = statistics.quantiles(rest, n=20)[-1]
    return Report(
        images, drawn, round(first, 1), round(statistics.median(rest), 1), round(p95, 1), round(max(rest), 1), failed,
        p95 <= TARGET_MS,
    )  # fmt: skip


def _write_round(folder: Path, images: int) -> np.ndarray:
    """Detections of images 1 to ``images`` as a round leaves them; the corners that all images share."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, (WIDTH - 200, HEIGHT - 200), (BOXES, 2))
    boxes = np.hstack([low, low + rng.uniform(20, 200, (BOXES, 2))]).astype(np.float32)
    scores, classes = rng.uniform(0.02, 1, BOXES).astype(np.float32), rng.integers(0, 2, BOXES)
    embeddings = rng.normal(size=(BOXES, 64)).astype(np.float32)
    writer = DetectionsWriter(Rounds(load_settings(MODEL_DIR=folder)).path(7, 1) / "detections")
    for image_id in range(1, images + 1):
        writer.add(Detections(image_id, boxes, scores, classes, embeddings, image_size=(WIDTH, HEIGHT)), {})
    writer.flush()
    return boxes


def _activate(folder: Path) -> None:
    store = open_store(load_settings(MODEL_DIR=folder))
    store.versions.activate(ModelVersion(7, "ppal-7-r1", 1, "retinanet_tiny", "", ("Cat", "Dog"), None, {}))
    store.close()


def _body(task_id: int, boxes: np.ndarray, rng: random.Random, number: int) -> dict[str, Any]:
    x1, y1, x2, y2 = boxes[rng.randrange(BOXES)].tolist()
    slack = [rng.uniform(0, 0.15) * side for side in (x2 - x1, y2 - y1)]
    value: dict[str, Any] = {"x": (x1 - slack[0]) / WIDTH * 100, "y": (y1 - slack[1]) / HEIGHT * 100, "rotation": 0}
    kind = "rectanglelabels" if number % 2 else "keypointlabels"
    if number % 2:
        value |= {"width": (x2 - x1 + 2 * slack[0]) / WIDTH * 100, "height": (y2 - y1 + 2 * slack[1]) / HEIGHT * 100}
    else:
        value = {"x": (x1 + x2) / 2 / WIDTH * 100, "y": (y1 + y2) / 2 / HEIGHT * 100, "width": 0.3}
    region = {
        "id": f"r{number}", "type": kind, "from_name": "label" if number % 2 else "point", "to_name": "image",
        "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "value": {**value, kind: ["Cat"]},
    }  # fmt: skip
    task = {"id": task_id, "data": {"image": f"/data/upload/7/{task_id}.jpg"}, "annotations": [], "predictions": []}
    context = {"result": [region]}
    return {"tasks": [task], "project": PROJECT, "label_config": CONFIG, "params": {"context": context}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How fast a rough box becomes the detector's.")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="500 images, 40 boxes")
    options = parser.parse_args(arguments)
    report = run(500, 40) if options.quick else run()
    if options.json:
        sys.stdout.write(json.dumps(asdict(report), indent=1) + "\n")
        return
    sys.stdout.write(
        f"{report.drawn} boxes and clicks, {report.images} images: p50 {report.p50_ms} ms, p95 {report.p95_ms} ms, "
        f"longest {report.max_ms} ms, the first {report.first_ms} ms, {report.failed} failed; "
        f"target p95 <= {TARGET_MS:.0f} ms {'met' if report.met else 'missed'}\n"
    )


if __name__ == "__main__":
    main()
