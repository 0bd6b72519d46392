"""A training that goes on until it is killed, as niced as a round: the load beside which others are measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ppal_backend.engines.cpu import yield_while_waiting


def main(folder: Path) -> None:
    """Train retinanet_tiny on generated images; prints "training" when the first step is done."""
    yield_while_waiting()
    os.nice(5)  # as a round's process
    from ppal_backend.datasets.coco import CocoDataset
    from ppal_backend.demo.ground_truth import load_truth
    from ppal_backend.demo.scenes import generate
    from ppal_backend.detector.training import TrainRequest, train

    dataset: CocoDataset = load_truth(generate(folder / "data", images=80)).dataset
    train_json = dataset.write(folder / "train.json")
    told = False

    def on_progress(_progress: object) -> None:
        nonlocal told
        if not told:
            told = True
            sys.stdout.write("training\n")
            sys.stdout.flush()

    while True:
        work_dir = folder / f"training-{os.urandom(3).hex()}"
        train(TrainRequest("retinanet_tiny", dataset.labels, train_json, None, work_dir), on_progress)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
