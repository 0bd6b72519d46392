"""One real Label Studio and one real backend for all tests here; every test has a project of its own."""

import pytest

from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.demo.run import label_config_of
from ppal_backend.rig.backend import Backend
from ppal_backend.synthetic.scenes import generate

BUDGET = 12
IMAGES = 48


@pytest.fixture(scope="session")
def backend(label_studio, tmp_path_factory):
    environment = {
        "START_TRAINING_EACH_N_UPDATES": str(BUDGET),
        "PPAL_DETECTOR": "retinanet_tiny",  # made for the generated scenes that tests label
        "PPAL_MAX_ITERATIONS": "30",
        "PPAL_POLL_INTERVAL_S": "5",
        "SCORE_THRESHOLD": "0.05",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "2",
    }
    with Backend(tmp_path_factory.mktemp("backend"), label_studio.url, label_studio.token, environment) as running:
        yield running


@pytest.fixture(scope="session")
def truth(tmp_path_factory):
    return read_user_coco(generate(tmp_path_factory.mktemp("data") / "set", images=IMAGES, seed=3))


@pytest.fixture
def make_project(label_studio, truth):
    """Returns (project id, annotator) of a fresh project with images; ``labels`` restricts its classes."""

    def make(title, labels=None):
        labels = tuple(labels or truth.labels)
        project_id = label_studio.create_project(title, label_config_of(labels))
        tasks = label_studio.import_images(project_id, list(truth.paths().values()))
        by_path = truth.truths_by_path()
        answers = {task_id: _restricted(by_path[path], labels) for task_id, path in tasks.items()}
        return project_id, ScriptedAnnotator(label_studio.url, label_studio.token, project_id, answers)

    return make


def _restricted(truth, labels):
    return type(truth)(truth.width, truth.height, tuple(box for box in truth.boxes if box[0] in labels))
