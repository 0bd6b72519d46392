"""How long it takes to find the images of a pool that hold the most similar objects.

    python -m benchmarks.similar [--json] [--quick] [--images 200000]

writes the detections of 20,000 images as a round leaves them (30 boxes an image, ten of them sure enough to be shown,
embeddings of 256 numbers in half precision: 0.4 GB) into a temporary folder and looks for images like one image, like
one box, and like twenty images drawn round on the map; each once to warm the disk's cache, then three times. Processor
seconds stand beside those of the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.rounds.similar import most_similar, nearest_labelled, objects_of
from ppal_backend.structures.detections import Detections

IMAGES, BOXES, SURE, WIDTH, CLASSES = 20_000, 30, 10, 256, 20
LEAST, FOUND, CALLS = 0.3, 24, 3


def write_pool(folder: Path, images: int) -> None:
    """The detections of a pool."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([np.linspace(0.95, 0.35, SURE), np.linspace(0.25, 0.05, BOXES - SURE)]).astype(np.float32)
    boxes = np.tile(np.array([10, 10, 90, 90], np.float32), (BOXES, 1))
    writer = DetectionsWriter(folder)
    for image_id in range(1, images + 1):
        vectors = rng.standard_normal((BOXES, WIDTH), np.float32)
        writer.add(Detections(image_id, boxes, scores, rng.integers(0, CLASSES, BOXES), vectors), {})
    writer.flush()


def times(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each search, by the clock and of the processor; medians."""
    found = {}
    for name, chosen, box in (("image", [7], None), ("box", [7], 3), ("lasso of 20", list(range(1, 21)), None)):
        clock, processor = [], []
        for _ in range(CALLS + 1):
            started, used = time.perf_counter(), time.process_time()
            looked_for = objects_of(folder, chosen, LEAST, box)
            most_similar(folder, looked_for, LEAST, FOUND)
            nearest_labelled([(folder, range(1, 500))], looked_for, LEAST)
            clock.append(time.perf_counter() - started)
            processor.append(time.process_time() - used)
        medians = [round(statistics.median(of[1:]), 3) for of in (clock, processor)]
        found[name] = dict(zip(("seconds", "cpu_seconds"), medians, strict=True))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How long it takes to find similar images.")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    parser.add_argument("--quick", action="store_true", help="a pool of 1,000 images")
    parser.add_argument("--images", type=int, default=IMAGES, help="20 KB of disk each")
    options = parser.parse_args(arguments)
    images = 1000 if options.quick else options.images
    with tempfile.TemporaryDirectory() as folder:
        write_pool(Path(folder), images)
        found = times(Path(folder))
    if options.json:
        sys.stdout.write(
            json.dumps({"images": images, "searches": found, "torch_loaded": "torch" in sys.modules}) + "\n"
        )
        return
    for name, one in found.items():
        sys.stdout.write(f"{name}: {one['seconds']:.2f} s, of them {one['cpu_seconds']:.2f} computing ({images:,})\n")


if __name__ == "__main__":
    main()
