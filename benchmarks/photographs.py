"""How good a detector of the zoo gets on photographs that other people labelled, and how long that takes.

    python -m benchmarks.photographs --data DIR [--detector NAME] [--weights FILE] [--images N …] [--seeds K]
        [--slices CHOICE …] [--look TILE …] [--json]

``DIR`` holds ``images/``, ``pool.json`` and ``test.json`` (COCO). For every seed, ``N`` images of the pool are drawn at
random, as the start of a simulation is; the detector is trained on them as a round trains it, without images held out,
and its mAP is measured on the whole test set. A checkpoint lies in ``--work`` when that is given, and a run that was
cut off goes on from there.
``--slices`` trains on tiles, and ``--look`` measures each training again as if it had learned from tiles of that side
(or from whole images: ``off``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppal_backend.detector.infer.evaluation import evaluate
from ppal_backend.detector.train.request import TrainRequest
from ppal_backend.detector.train.training import train
from ppal_backend.detector.weights import load_checkpoint, save_final
from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.settings import as_slices
from ppal_backend.simulation.data import DataSource
from ppal_backend.simulation.replay import random_start


def measure(
    options: argparse.Namespace, images: int, seed: int, slices: int | str, work: Path
) -> Iterator[dict[str, Any]]:
    """Train once, and evaluate in every way of looking that is asked for."""
    tiles = "" if slices == "off" else f"-{slices}"
    folder = work / f"{options.data.name}-{options.detector}-{images}-{seed}{tiles}"
    folder.mkdir(parents=True, exist_ok=True)
    data = DataSource("folder", options.data).load(folder)
    classes, chosen = data.labels, random_start(data.pool.image_ids, images, seed)
    data.pool.subset(set(chosen)).write(folder / "train.json")
    data.test.write(folder / "test.json")
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
            slices=slices,
        )
    )
    for look in dict.fromkeys((result.slices or "off", *options.look)):
        checkpoint = looking_through(result.checkpoint, look, folder / "look.pth")
        started = time.monotonic()
        found = evaluate(options.detector, checkpoint, classes, folder / "test.json", zoo_root=options.zoo)
        yield {
            "data": options.data.name,
            "detector": options.detector,
            "images": len(chosen),
            "seed": seed,
            "slices": slices,
            "look": look,
            "steps": result.iterations,
            "map": found.map,
            "map50": found.map50,
            "map_small": found.map_small,
            "per_class": dict(found.per_class),
            "train_s": result.seconds,
            "test_images_a_second": found.images / (time.monotonic() - started),
        }


def looking_through(checkpoint: Path, look: int | str, target: Path) -> Path:
    """The same weights, as if they had learned from tiles of that side, or from whole images."""
    content = load_checkpoint(checkpoint)
    save_final(target, content["state_dict"], {**content["meta"], "slices": None if look == "off" else look})
    return target


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks photographs", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, pool.json and test.json")
    parser.add_argument("--detector", default="yolox_nano", help="name in the zoo (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="file of its initial weights, put in place first")
    parser.add_argument("--images", type=int, nargs="+", default=[45], help="sizes of the training set (default: 45)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--slices", type=as_slices, nargs="+", default=["off"], help="off, auto or the side of a tile")
    parser.add_argument("--look", type=as_slices, nargs="+", default=[], help="other tiles to look through, or off")
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
        for images, slices in itertools.product(options.images, options.slices):
            rows = []
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                for row in measure(options, images, seed, slices, work):
                    rows.append(row)
                    _tell(row, as_json=options.json)
            for look in {} if options.json else dict.fromkeys(row["look"] for row in rows):
                values = [row["map"] or 0.0 for row in rows if row["look"] == look]
                sys.stdout.write(
                    f"{options.data.name}, {options.detector}, {rows[0]['images']} images, trained with slices "
                    f"{slices}, looked at with {look}: mAP {np.mean(values):.3f} in the mean of {len(values)} seeds "
                    f"({min(values):.3f} to {max(values):.3f})\n"
                )


def _tell(row: dict[str, Any], *, as_json: bool) -> None:
    line = (
        json.dumps(row)
        if as_json
        else (
            f"  seed {row['seed']}, tiles {row['look']}: mAP {row['map'] or 0:.3f}, AP50 {row['map50'] or 0:.3f}, "
            f"of small boxes {row['map_small'] or 0:.3f}, {row['steps']} steps in {row['train_s']:.0f} s, "
            f"{row['test_images_a_second']:.0f} test images a second"
        )
    )
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
