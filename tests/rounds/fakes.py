"""Ports of a round that answer from memory, and count what they are asked."""

from dataclasses import replace

import numpy as np

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.errors import LeaseLost
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Inferred, NoSteering, PoolEntry, Ports, PreparedData, Trained
from ppal_backend.rounds.run import run_round
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.round import ModelRef, Progress, RoundSpec

SPEC = RoundSpec(
    project_id=1,
    project_key="1.1",
    number=1,
    kind="train",
    detector="retinanet_tiny",
    strategy="ppal",
    budget=5,
    delta=2.0,
    seed=0,
    score_threshold=0.3,
    holdout_fraction=0.0,
)
LABELS = ("cat", "dog")


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test may catch it."""


class FakeWorld:
    """Source, engine, publisher and observer in one; ``kill_in`` dies in that call, a training raises ``error``."""

    def __init__(self, labelled=20, pool=30, unreadable=()):
        self.labelled, self.pool_size, self.unreadable = labelled, pool, unreadable
        self.calls, self.kill_in, self.exported_ids, self.states = [], None, [], []
        self.published, self.stop, self.steps = [], False, []
        self.known, self.as_is_error = None, None
        self.infer_limit, self.has_weights, self.lost, self.problems = None, False, False, {}
        self.error, self.spec = None, None
        self.trained_weights = None  # what a training leaves; None: a text with the round's number
        self.steering, self.data = NoSteering(), {}

    def _call(self, name):
        self.calls.append(name)
        if self.kill_in == name:
            self.kill_in = None
            raise Killed(name)

    def ports(self, settings, store, project, spec, observer):
        """For ``run_next_round``, with its own observer."""
        self.spec = spec
        return Ports(self, self, self, observer, steering=self.steering)

    def run(self, path, spec=SPEC):
        """A round in a folder, as a round's process runs it."""
        folder = RoundFolder(path)
        folder.repair()
        return run_round(spec, folder, Ports(self, self, self, self, steering=self.steering))

    def export(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "annotated.json").write_text("[]")
        self._call("export")
        return list(range(1, self.labelled + 1))

    def prepare(self, folder, on_progress):
        self._call("prepare")
        images = [CocoImage(i, f"/images/{i}.jpg", 100, 80) for i in range(1, self.labelled + 1)]
        boxes = [CocoAnnotation(i, i, 1 + i % 2, (10.0, 10.0, 20.0, 20.0)) for i in range(1, self.labelled + 1)]
        coco = CocoDataset(images, boxes, [CocoCategory(1, "cat"), CocoCategory(2, "dog")])
        pool = [PoolEntry(1000 + i, f"/images/{1000 + i}.jpg", 100, 80) for i in range(self.pool_size)]
        return PreparedData(coco, pool, LABELS, {"removed_label_boxes": 0}, self.unreadable, data=self.data)

    def train(self, spec, labels, files, folder, on_progress, should_stop):
        if self.error is not None:
            raise self.error
        self._call("train")
        on_progress(Progress("train", 1, 2))
        folder.mkdir(exist_ok=True)
        (folder / "model.pth").write_bytes(self.trained_weights or b"weights of round %d" % spec.number)
        return Trained(ModelRef(spec.detector, str(folder / "model.pth"), labels, (0.2, 0.9)), {"iterations": 2})

    def untrained(self, spec, labels, folder):
        self._call("untrained")
        if not self.has_weights:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "untrained.pth").write_bytes(b"initial weights")
        return ModelRef(spec.detector, str(folder / "untrained.pth"), labels)

    def as_is(self, spec, labels, folder):
        self._call("as_is")
        if self.as_is_error is not None:
            raise self.as_is_error
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "as_is.pth").write_bytes(b"published weights")
        self.known = dict(spec.known)
        return ModelRef(spec.detector, str(folder / "as_is.pth"), labels)

    def evaluate(self, spec, model, ann_json, earlier=None, folder=None):
        self._call("evaluate")
        return {"map": 0.5, "map50": 0.8, "per_class": {"cat": 0.4, "dog": 0.6}}

    def infer(self, spec, model, images, on_progress, should_stop):
        self._call("infer")
        for n, entry in enumerate(images):
            if self.infer_limit is not None and n >= self.infer_limit:
                raise Killed("infer")
            yield Inferred(detections_of(entry.image_id), {"global": features_of(entry.image_id)})

    def publish(self, spec, model, queue, state, on_state):
        self.states.append(state)
        on_state({"version": "ppal-r1-x", "state": "importing"})
        self._call("publish")
        self.published.append((model, queue))
        return "ppal-r1-x"

    def report_problem(self, topic, problem):
        self.problems[topic] = problem

    def fence(self):
        if self.lost:
            raise LeaseLost("another process holds the round")

    def exported(self, ids):
        self.exported_ids = list(ids)

    def step_started(self, step):
        self.steps.append(step)

    def progress(self, progress):
        self.calls.append(f"progress {progress.step}")

    def should_stop(self):
        return self.stop


def detections_of(image_id):
    """Boxes that depend on the image id alone: more of them, and less certain, for higher ids."""
    rng = np.random.default_rng(image_id)
    n = image_id % 5
    corners = rng.uniform(0, 40, (n, 2)).astype(np.float32)
    return Detections(
        image_id,
        np.concatenate([corners, corners + 20], axis=1),
        rng.uniform(0.3, 0.9, n).astype(np.float32),
        rng.integers(0, 2, n),
        rng.normal(size=(n, 8)).astype(np.float32),
    )


def features_of(image_id):
    """Three kinds of images, of which the first is the most frequent and the last one is scattered."""
    kind = (0, 0, 0, 1, 1, 2)[image_id % 6]
    rng = np.random.default_rng(image_id)
    return (10.0 * np.eye(3)[kind] + (0.01, 0.01, 2.0)[kind] * rng.normal(size=3)).astype(np.float32)


def rank_spec(model=None):
    """A round that only orders."""
    return replace(SPEC, kind="rank", model=model)
