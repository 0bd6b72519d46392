"""What people do in Label Studio's own pages: connect by the form, start a training, label in the queue's order."""

from pathlib import Path

import pytest

from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.demo.run import label_config_of
from ppal_backend.label_studio.publish import TAB_TITLE
from ppal_backend.rig.backend import Backend
from tests.e2e.pages import Pages

CHROMIUM = Path("/usr/bin/chromium")
PASSWORD = "a-long-password"
IMAGES, LABELLED = 20, 8
ROUND_TIMEOUT_S = 240
NO_BOXES = '<View><Text name="t" value="$t"/><Choices name="c" toName="t"><Choice value="A"/></Choices></View>'

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Debian's package chromium"),
]


@pytest.fixture(scope="module")
def guarded(label_studio, tmp_path_factory):
    """A backend that wants credentials and trains only when it is told to."""
    environment = {
        "BASIC_AUTH_USER": "label-studio",
        "BASIC_AUTH_PASS": PASSWORD,
        "PPAL_DETECTOR": "retinanet_tiny",
        "PPAL_MAX_ITERATIONS": "30",
        "PPAL_POLL_INTERVAL_S": "2",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "2",
    }
    with Backend(tmp_path_factory.mktemp("guarded"), label_studio.url, label_studio.token, environment) as running:
        yield running


@pytest.fixture(scope="module")
def pages(label_studio, tmp_path_factory):
    """A signed-in browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 850})
        pages = Pages(page, label_studio, tmp_path_factory.mktemp("pictures"))
        pages.sign_in()
        yield pages
        browser.close()


class Project:
    """A project with images, and what the backend and Label Studio's API say about it."""

    def __init__(self, label_studio, backend, truth):
        self.label_studio, self.backend = label_studio, backend
        self.id = label_studio.create_project("pages", label_config_of(truth.labels))
        tasks = label_studio.import_images(self.id, list(truth.paths().values())[:IMAGES])
        by_path = truth.truths_by_path()
        answers = {task: by_path[path] for task, path in tasks.items()}
        self.annotator = ScriptedAnnotator(label_studio.url, label_studio.token, self.id, answers)

    def version(self):
        return self.label_studio.session.get(f"/api/projects/{self.id}/")["model_version"]

    def queue(self):
        """Predictions of the version in force, the task to label first in front."""
        rows = self.label_studio.session.get("/api/predictions", params={"project": self.id})
        version = self.version()
        return sorted((row for row in rows if row["model_version"] == version), key=lambda row: row["score"])

    def annotations(self, task_id):
        return self.label_studio.session.get(f"/api/tasks/{task_id}/annotations/")


@pytest.fixture(scope="module")
def connected(label_studio, guarded, truth, pages):
    """A project that was connected by Label Studio's form and has its first queue."""
    project = Project(label_studio, guarded, truth)
    assert pages.connect(project.id, guarded.url, PASSWORD, '{"score_threshold": 0.15, "budget": 1000}') == 201
    project.card = pages.model_card()
    guarded.wait_for_round(project.id, 1, ROUND_TIMEOUT_S)
    return project


@pytest.fixture(scope="module")
def trained(connected, pages):
    """The same project after a training that somebody started by Label Studio's button."""
    connected.annotator.label(LABELLED)
    connected.said = pages.start_training(connected.id)
    connected.round = connected.backend.wait_for_round(connected.id, 2, ROUND_TIMEOUT_S)
    return connected


def test_the_form_connects_a_project(connected, guarded):
    assert connected.card.startswith("Connected PPAL") and guarded.url in connected.card
    stored = guarded.store.projects.get(connected.id)
    assert stored.options == {"score_threshold": 0.15, "budget": 1000}
    assert connected.version().startswith("ppal-r1-")


def test_start_training_is_accepted_and_brings_a_version(trained, guarded, pages):
    assert "Request Sent!" in trained.said
    assert (trained.round.kind, trained.round.reason) == ("train", "training was started by hand")
    assert trained.round.metrics["labelled_images"] == LABELLED
    assert trained.version() == trained.round.metrics["version"]
    listed = pages.versions(trained.id)
    assert listed.index(trained.version()) < listed.index("ppal-r1-"), "the newest version stands first"


def test_the_tab_lists_the_queue_in_order(trained, pages):
    columns, rows = pages.tab(trained.id, TAB_TITLE)
    pages.picture("queue")
    assert columns == ["tasks:id", "tasks:predictions_model_versions", "tasks:data.image"]
    order = [str(row["task"]) for row in trained.queue()]
    shown = [cells[0] for cells in rows]
    assert len(shown) > 5 and shown == order[: len(shown)]
    assert all(trained.version() in cells[1] for cells in rows)


def test_the_place_in_the_queue_never_reads_as_a_confidence(trained, pages):
    queue = trained.queue()
    for row in (queue[0], queue[len(queue) // 2], queue[-1]):
        said = pages.predictions_of(trained.id, row["task"])
        assert [text for text in said if trained.version() in text and text.endswith("· 0.00%")], said
        assert not [text for text in said if "%" in text.replace("0.00%", "")]


def test_label_all_tasks_serves_the_queue_with_its_boxes(trained, guarded, pages):
    queue = trained.queue()
    before = guarded.store.ledger.new_count(trained.id)
    shown = [pages.label_all_tasks(trained.id)]
    pages.picture("labeling")
    for _ in range(3):
        shown.append(pages.submit())
    assert [task.id for task in shown] == [row["task"] for row in queue[:4]]
    for task, row in zip(shown, queue, strict=False):
        assert task.boxes == len(row["result"])
        boxes = [(r["value"]["rectanglelabels"][0], f"{r['score']:.2f}") for r in row["result"]]
        assert task.listed == boxes[: len(task.listed)]
    assert any(task.listed for task in shown), "no pre-annotation was seen"
    for task, row in zip(shown[:3], queue, strict=False):
        (annotation,) = trained.annotations(task.id)
        assert (annotation["parent_prediction"], len(annotation["result"])) == (row["id"], len(row["result"]))
        assert {region["origin"] for region in annotation["result"]} <= {"prediction"}
    guarded.wait_until(lambda: guarded.store.ledger.new_count(trained.id) == before + 3, 60, "three annotations")


PROBLEMS = {
    "wrong password": (
        {"password": "wrong"},
        "credentials are missing or wrong; give this backend's user name and password (BASIC_AUTH_USER and "
        "BASIC_AUTH_PASS; in Label Studio's form: Basic Authentication). for url",
    ),
    "no credentials": (
        {"password": ""},
        "credentials are missing or wrong; give this backend's user name and password",
    ),
    "unknown detector": (
        {"extra_params": '{"detector": "yolo99"}'},
        "got 'yolo99'; choose one. for url",
    ),
    "unknown parameter": (
        {"extra_params": '{"bugdet": 5}'},
        "extra parameters: 'bugdet' is unknown (known: detector, budget,",
    ),
    "no json": (
        {"extra_params": "budget: 5"},
        'expected the extra parameters, such as {"budget": 50}, to be valid JSON (line 1 column 1).',
    ),
}


@pytest.mark.parametrize(("changes", "told"), PROBLEMS.values(), ids=PROBLEMS)
def test_the_form_tells_what_is_wrong(label_studio, guarded, pages, changes, told):
    project_id = label_studio.create_project("mistakes", label_config_of(("Cat",)))
    assert pages.connect(project_id, guarded.url, **{"password": PASSWORD, **changes}) == 400
    assert told in pages.problem()
    pages.picture("refused")
    assert guarded.store.projects.find(project_id) is None


def test_the_form_tells_what_a_labeling_config_lacks(label_studio, guarded, pages):
    project_id = label_studio.create_project("no boxes", NO_BOXES)
    assert pages.connect(project_id, guarded.url, PASSWORD) == 400
    said = pages.problem()
    assert "expected a RectangleLabels on an Image, got only Choices; add Image name=" in said
    assert guarded.store.projects.find(project_id) is None
