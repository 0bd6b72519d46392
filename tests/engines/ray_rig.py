"""A small trained detector and a pool to look at, for the tests on a real Ray cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.structures.round import ModelRef
from tests.detector.conftest import REPOSITORY, SMALL, ZOO
from tests.detector.shapes import CLASSES, write_set
from tests.rounds.fakes import SPEC

SMALL_SPEC = replace(SPEC, detector="small", device="auto", init_weights="random", max_iterations=6)
SMALL_STEPS = 60  # what its schedule makes of 12 images
SIZES = ((96, 96), (96, 48), (48, 96))  # resized to three shapes, so that the others in a batch matter


def make_zoo(folder):
    """A zoo with a detector of 64 px."""
    folder.mkdir(parents=True)
    (folder / "zoo.toml").write_text(ZOO)
    (folder / "small.py").write_text(SMALL.format(base=str(REPOSITORY / "model_zoo" / "retinanet_tiny" / "config.py")))
    return folder


def make_model(zoo, folder):
    """The small detector after 60 steps: not good, but with detections."""
    train_json = write_set(folder / "train", 12, empty_every=6)
    result = train(TrainRequest("small", CLASSES, train_json, None, folder / "model", 3, "cpu", "random", zoo_root=zoo))
    return ModelRef("small", str(result.checkpoint), CLASSES, result.difficulty)


def make_pool(folder, images=40):
    """Images in runs of six of one shape, so that some batches have one and some two; one image cannot be read."""
    kinds = [k // 6 % len(SIZES) for k in range(images)]
    entries = []
    for kind, size in enumerate(SIZES):
        count = kinds.count(kind)
        found = json.loads(write_set(folder / str(kind), count, kind, size, 1000 * (kind + 1)).read_text())["images"]
        entries.append([PoolEntry(i["id"], i["file_name"], i["width"], i["height"]) for i in found])
    pool = [entries[kind].pop(0) for kind in kinds]
    damaged = Path(pool[9].path)
    damaged.write_bytes(damaged.read_bytes()[:60])
    return pool


def assert_same(found, wanted):
    """All fields of two lists of ``Inferred`` agree to 1e-6, and there is something to compare."""
    assert [item.detections.image_id for item in found] == [item.detections.image_id for item in wanted]
    assert sum(len(item.detections) for item in wanted) > 50
    for one, other in zip(found, wanted, strict=True):
        mine, theirs = ({**vars(item.detections), **item.features} for item in (one, other))
        assert mine.keys() == theirs.keys() and {"embeddings", "class_probs", "levels", "global", "fpn"} <= mine.keys()
        for name, value in theirs.items():
            if isinstance(value, np.ndarray):
                assert mine[name].dtype == value.dtype and mine[name].flags.writeable
                np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-6, err_msg=name)
            else:
                assert mine[name] == value, name
