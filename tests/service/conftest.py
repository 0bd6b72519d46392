"""The app with recording fakes in place of the job queue, the detector and Label Studio's images."""

import numpy as np
import pytest

from ppal_backend.datasets.images import ImageInfo
from ppal_backend.errors import ImageError
from ppal_backend.service.app import create_app
from ppal_backend.service.runtime import EXTENSION
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion
from ppal_backend.structures.detections import Detections

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Cat"/><Label value="Dog"/></RectangleLabels></View>'
)
OTHER_CONFIG = (
    '<View><Image name="pic" value="$url"/><RectangleLabels name="box" toName="pic">'
    '<Label value="Car"/></RectangleLabels></View>'
)
KEY = "7.1795336563"


class RecordingJobs:
    """A queue that only remembers; ``error`` makes it fail."""

    def __init__(self):
        self._synced = []
        self.notifiers = []
        self.error = None

    @property
    def synced(self):
        """Projects in the order of their jobs, once every notice has been passed on."""
        assert all(notifier.flush() for notifier in self.notifiers)
        return self._synced

    def sync(self, project_id):
        if self.error is not None:
            raise self.error
        self._synced.append(project_id)


class FakePredictor:
    """One box per image: class 1 with score 0.9 on the left half; classes and calls are remembered."""

    def __init__(self):
        self.calls = []
        self.error = None
        self.unreadable = set()
        self.class_index = 1

    def predict(self, model, images, timeout_s):
        self.calls.append((model, list(images), timeout_s))
        if self.error is not None:
            raise self.error
        return [self.box(image_id) for image_id, _ in images if image_id not in self.unreadable]

    def box(self, image_id):
        return Detections(
            image_id,
            np.array([[0, 0, 50, 80]], np.float32),
            np.array([0.9], np.float32),
            np.array([self.class_index]),
            np.zeros((1, 0), np.float32),
        )

    def close(self):
        pass


class FakeImages:
    """Images of 100 x 80 px; addresses in ``broken`` raise what is given there."""

    def __init__(self, root):
        self.root = root
        self.broken = {}
        self.asked = []

    def __call__(self, project):
        return self

    def get(self, task_id, url):
        self.asked.append((task_id, url))
        if url in self.broken:
            raise self.broken[url]
        if not url.endswith((".jpg", ".png")):
            raise ImageError(f"task {task_id}: expected an image, got another kind of file")
        return ImageInfo(task_id, self.root / f"{task_id}.jpg", 100, 80)


@pytest.fixture
def settings(tmp_path):
    return Settings(
        LABEL_STUDIO_API_KEY="secret-key-1", LABEL_STUDIO_URL="http://ls.example:8080", MODEL_DIR=tmp_path / "state"
    )


@pytest.fixture
def jobs():
    return RecordingJobs()


@pytest.fixture
def predictor():
    return FakePredictor()


@pytest.fixture
def images(tmp_path):
    return FakeImages(tmp_path)


@pytest.fixture
def make_app(settings, store, jobs, predictor, images):
    def make(**changes):
        chosen = settings.model_copy(update=changes)
        app = create_app(chosen, store=store, jobs=jobs, predictor=predictor, images=images)
        jobs.notifiers.append(app.extensions[EXTENSION].notifier)
        return app

    return make


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    return app.test_client()


def setup_payload(**changes):
    """What Label Studio 1.23 sends to /setup."""
    return {
        "project": KEY,
        "schema": CONFIG,
        "hostname": "http://localhost:8080",
        "access_token": "dead-legacy-token",
        "extra_params": None,
        **changes,
    }


def task(task_id, **changes):
    """A task as Label Studio 1.23 sends it to /predict."""
    return {
        "id": task_id,
        "data": {"image": f"/data/upload/7/{task_id}.jpg"},
        "meta": {},
        "annotations": [],
        "predictions": [],
        "project": 7,
        "is_labeled": False,
        **changes,
    }


def predict_payload(*tasks, **changes):
    """What Label Studio 1.23 sends to /predict."""
    return {
        "tasks": list(tasks),
        "project": KEY,
        "label_config": CONFIG,
        "params": {"login": None, "password": None, "context": None},
        **changes,
    }


def annotation_payload(annotation_id=31, task_id=5, action="ANNOTATION_CREATED", project=7, **annotation):
    """What Label Studio 1.23 sends when somebody submits, updates or skips."""
    return {
        "action": action,
        "annotation": {"id": annotation_id, "task": task_id, "was_cancelled": False, "result": [], **annotation},
        "task": {"id": task_id, "data": {"image": "x.jpg"}},
        "project": {"id": project, "title": "p", "label_config": CONFIG},
    }


@pytest.fixture
def connected(client, jobs):
    """Project 7, connected; the jobs of that are forgotten."""
    assert client.post("/setup", json=setup_payload()).status_code == 200
    jobs.synced.clear()
    return 7


def activate(
    store, project_id=7, version="ppal-7-r1", checkpoint="projects/7/rounds/1/model.pth", labels=("Cat", "Dog")
):
    measured = {"map": 0.5, "interval": [0.4, 0.6], "classes": {"Cat": 0.5}, "too_few": {}, "images": 40}
    metrics = {"map": 0.5, "measured": measured, "image_set": "a"}
    store.versions.activate(ModelVersion(project_id, version, 1, "retinanet_tiny", checkpoint, labels, None, metrics))
