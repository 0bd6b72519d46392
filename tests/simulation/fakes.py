"""A small data set without pictures, and an engine that answers from memory and learns from what is labelled."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ppal_backend.acquisition.strategies import READS_COUNTS
from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.errors import DetectorError
from ppal_backend.files import read_json, write_json
from ppal_backend.rounds.ports import Inferred, Trained
from ppal_backend.simulation.data import Benchmark
from ppal_backend.simulation.folder import PLAN
from ppal_backend.simulation.plan import Plan
from ppal_backend.simulation.variants import parse_variants
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.round import ModelRef, Progress

LABELS = ("cat", "dog", "wolf")


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test may catch it."""


def boxes_of(image_id):
    """Images hold 0 to 4 boxes, higher ids of a five more."""
    return image_id % 5


def dataset(count, first=1, folder="/nowhere"):
    """Images of 100 x 80 px; classes follow the box number, so wolf is the rarest."""
    images = [CocoImage(i, f"{folder}/{i}.jpg", 100, 80) for i in range(first, first + count)]
    rows = []
    for image in images:
        for k in range(boxes_of(image.id)):
            category = 1 + (k + image.id // 5) % 2 if k < 3 else 3
            rows.append(CocoAnnotation(len(rows) + 1, image.id, category, (5.0 + 20 * k, 10.0, 15.0, 20.0)))
    return CocoDataset(images, rows, [CocoCategory(n, label) for n, label in enumerate(LABELS, start=1)])


def benchmark(pool=60, test=20):
    """Pool with groups of three near-duplicates."""
    return Benchmark(dataset(pool), dataset(test, 1001), {i: (i - 1) // 3 for i in range(1, pool + 1)}, "made up")


def make_plan(data, strategies="random,ppal", **changes):
    """A plan of two seeds and three rounds."""
    basic = dict(detector="retinanet_tiny", start=8, budget=6, rounds=3, seeds=(0, 1), retrieval_images=30)
    return Plan(
        variants=parse_variants(strategies),
        pool_images=len(data.pool.images),
        data_sha256=data.sha256,
        title="made up",
        **{**basic, **changes},
    )


def lay_out(root, data, plan):
    """What ``prepare`` leaves before the first task."""
    data.write(root / "data")
    write_json(root / PLAN, plan.as_dict())


class FakeEngine:
    """mAP grows with labelled boxes; detections depend on image and on what was trained on."""

    def __init__(self):
        self.calls = []
        self.kill_at = None  # (call, how many of them to let pass)
        self.fail_on = None  # exception to raise in training
        self.has_weights = True

    def _call(self, name):
        self.calls.append(name)
        if self.kill_at is not None and self.kill_at[0] == name:
            self.kill_at = (name, self.kill_at[1] - 1)
            if self.kill_at[1] < 0:
                self.kill_at = None
                raise Killed(name)

    def train(self, spec, labels, files, folder, on_progress, should_stop):
        self._call("train")
        if self.fail_on is not None:
            raise self.fail_on
        train = CocoDataset.read(files.train)
        skill = len([row for row in train.annotations if not row.iscrowd])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "weights.json", {"skill": skill, "ids": list(train.image_ids)})
        on_progress(Progress("train", 1, 2))
        shift = (spec.difficulty_options.get("xi", 0.6) - 0.6) / 2
        difficulty = tuple(0.3 + 0.6 * k / len(labels) + shift for k in range(len(labels)))
        return Trained(
            ModelRef(spec.detector, str(folder / "weights.json"), labels, difficulty), {"iterations": 2, "loss": 0.5}
        )

    def untrained(self, spec, labels, folder):
        self._call("untrained")
        if not self.has_weights:
            return None
        folder.mkdir(parents=True)
        write_json(folder / "weights.json", {"skill": 0, "ids": []})
        return ModelRef(spec.detector, str(folder / "weights.json"), labels)

    def evaluate(self, spec, model, ann_json):
        self._call("evaluate")
        test = CocoDataset.read(ann_json)
        assert min(test.image_ids) > 1000, "evaluation must be on the test set"
        level = 1 - np.exp(-read_json(Path(model.checkpoint))["skill"] / 60)
        per_class = {label: float(level * (0.9 - 0.6 * k / len(model.labels))) for k, label in enumerate(model.labels)}
        return {"map": float(np.mean(list(per_class.values()))), "map50": float(level), "per_class": per_class}

    def infer(self, spec, model, images, on_progress, should_stop):
        self._call("infer")
        skill = read_json(Path(model.checkpoint))["skill"]
        for entry in images:
            self._call("image")
            detections = detections_of(entry.image_id, skill, len(model.labels))
            if spec.strategy in READS_COUNTS:
                counts = 1 + np.arange(len(detections))
                detections = replace(detections, pre_nms_counts=counts.astype(np.int64))
            yield Inferred(detections, features_of(entry.image_id))


def detections_of(image_id, skill, classes):
    """The true boxes with scores that depend on the model."""
    rng = np.random.default_rng([image_id, skill])
    n = boxes_of(image_id)
    left = 5 + 20 * np.arange(n, dtype=np.float32)
    boxes = np.stack([left, np.full(n, 10), left + 15, np.full(n, 30)], axis=1).astype(np.float32)
    kinds = np.array([(k + image_id // 5) % 2 if k < 3 else 2 for k in range(n)], dtype=np.int64)
    kinds = np.minimum(kinds, classes - 1)
    embeddings = np.eye(classes, 8, dtype=np.float32)[kinds] + 0.1 * rng.normal(size=(n, 8)).astype(np.float32)
    return Detections(
        image_id,
        boxes.reshape(n, 4),
        rng.uniform(0.2, 0.9, n).astype(np.float32),
        kinds,
        embeddings.astype(np.float32),
        class_probs=rng.uniform(0, 0.5, (n, classes)).astype(np.float32),
    )


def features_of(image_id):
    """Global features that say nothing about the classes."""
    rng = np.random.default_rng(10_000 + image_id)
    return {name: rng.normal(size=6).astype(np.float32) for name in ("global", "fpn")}


def fake_engine(plan):
    """An engine for processes of their own."""
    return FakeEngine()


def broken_engine(plan):
    """An engine that cannot train."""
    engine = FakeEngine()
    engine.fail_on = DetectorError("no such luck")
    return engine
