"""How good a detector of the zoo gets on photographs that other people labelled, and how long that takes.

    python -m benchmarks.photographs --data DIR [--detector NAME] [--weights FILE] [--images N …] [--seeds K] [--json]

``DIR`` holds ``images/``, ``pool.json`` and ``test.json`` (COCO). For every seed, ``N`` images of the pool are drawn at
random, the detector is trained on them as a round trains it (without images held out), and its mAP is measured on the
whole test set. A checkpoint lies in ``--work`` when that is given, and a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppal_backend.detector.infer.evaluation import evaluate
from ppal_backend.detector.train.request import TrainRequest
from ppal_backend.detector.train.training import train
from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.files import read_json, write_json


def absolute(source: Path, images: Path, target: Path, keep: Sequence[int] | None = None) -> tuple[str, ...]:
    """Write a COCO file with absolute paths, of all images or of some; the labels in the order of their ids."""
    content = read_json(source)
    chosen = {image["id"] for image in content["images"]} if keep is None else set(keep)
    rows = [
        {**image, "file_name": str((images / image["file_name"]).resolve())}
        for image in content["images"]
        if image["id"] in chosen
    ]
    boxes = [row for row in content["annotations"] if row["image_id"] in chosen]
    write_json(target, {"images": rows, "annotations": boxes, "categories": content["categories"]})
    return tuple(item["name"] for item in sorted(content["categories"], key=lambda item: item["id"]))


def measure(options: argparse.Namespace, images: int, seed: int, work: Path) -> dict[str, Any]:
    """Train once and evaluate."""
    folder = work / f"{options.data.name}-{options.detector}-{images}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    ids = sorted(image["id"] for image in read_json(options.data / "pool.json")["images"])
    chosen = np.random.default_rng(seed).permutation(ids)[:images].tolist()
    classes = absolute(options.data / "pool.json", options.data / "images", folder / "train.json", chosen)
    absolute(options.data / "test.json", options.data / "images", folder / "test.json")
    result = train(
        TrainRequest(
            options.detector,
            classes,
            folder / "train.json",
            None,
            folder / "work",
            seed=seed,
            max_iterations=options.steps,
            zoo_root=options.zoo,
            weights_dir=work / "weights",
        )
    )
    started = time.monotonic()
    found = evaluate(options.detector, result.checkpoint, classes, folder / "test.json", zoo_root=options.zoo)
    return {
        "data": options.data.name,
        "detector": options.detector,
        "images": len(chosen),
        "seed": seed,
        "steps": result.iterations,
        "map": found.map,
        "map50": found.map50,
        "per_class": dict(found.per_class),
        "train_s": result.seconds,
        "test_images_a_second": found.images / (time.monotonic() - started),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks photographs", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, pool.json and test.json")
    parser.add_argument("--detector", default="yolox_nano", help="name in the zoo (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="file of its initial weights, put in place first")
    parser.add_argument("--images", type=int, nargs="+", default=[45], help="sizes of the training set (default: 45)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="cap on the optimiser steps (default: the schedule's)")
    parser.add_argument("--zoo", type=Path, help="another zoo's folder")
    parser.add_argument("--work", type=Path, help="where trainings are kept (default: nowhere)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(words)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.weights is not None:
            place_weights(find_entry(options.detector, options.zoo), options.weights, work / "weights")
        for images in options.images:
            rows = []
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                rows.append(measure(options, images, seed, work))
                _tell(rows[-1], as_json=options.json)
            if not options.json:
                values = [row["map"] or 0.0 for row in rows]
                sys.stdout.write(
                    f"{options.data.name}, {options.detector}, {rows[0]['images']} images: mAP {np.mean(values):.3f} "
                    f"in the mean of {len(rows)} seeds ({min(values):.3f} to {max(values):.3f})\n"
                )


def _tell(row: dict[str, Any], *, as_json: bool) -> None:
    sys.stdout.write(
        json.dumps(row) + "\n"
        if as_json
        else f"  seed {row['seed']}: mAP {row['map'] or 0:.3f}, AP50 {row['map50'] or 0:.3f}, {row['steps']} steps in "
        f"{row['train_s']:.0f} s, {row['test_images_a_second']:.0f} test images a second\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
