"""Boxes before the first label on a real Label Studio, with photographs and the weights of a small detector."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.files import read_json
from ppal_backend.rig.backend import Backend
from ppal_backend.structures.query import by_utility
from tests.e2e.test_loop import predictions_of, project_of, round_folder, wait_for_version

SHARED = Path(__file__).resolve().parents[3] / "shared"
AQUARIUM, WEIGHTS = SHARED / "data" / "aquarium", SHARED / "weights" / "yolox_nano_coco.pth"
IMAGES = 16
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">{}</RectangleLabels></View>'
)
BIRDS = CONFIG.format(
    '<Label value="fish"/><Label value="penguin" predicted_values="bird"/>'
    '<Label value="puffin" predicted_values="bird"/>'
)
PLAIN = CONFIG.format('<Label value="person"/><Label value="car"/><Label value="dog"/>')

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.shared,
    pytest.mark.skipif(not (AQUARIUM.is_dir() and WEIGHTS.is_file()), reason=f"needs {AQUARIUM} and {WEIGHTS}"),
]


@pytest.fixture(scope="module")
def backend(label_studio, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    place_weights(find_entry("yolox_nano"), WEIGHTS, cache / "weights")
    environment = {
        "PPAL_CACHE": str(cache),
        "PPAL_DETECTOR": "yolox_nano",
        "PPAL_POLL_INTERVAL_S": "5",
        "SCORE_THRESHOLD": "0.1",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with Backend(tmp_path_factory.mktemp("backend"), label_studio.url, label_studio.token, environment) as running:
        yield running


@pytest.fixture(scope="module")
def photographs():
    """Those with the most birds and people on them."""
    content = json.loads((AQUARIUM / "pool.json").read_text())
    birds = {c["id"] for c in content["categories"] if c["name"] in ("penguin", "puffin")}
    counts = {image["id"]: 0 for image in content["images"]}
    for row in content["annotations"]:
        counts[row["image_id"]] += row["category_id"] in birds
    chosen = sorted(content["images"], key=lambda image: (-counts[image["id"]], image["id"]))[:IMAGES]
    return [AQUARIUM / "images" / image["file_name"] for image in chosen]


def first_queue(label_studio, backend, photographs, title, config):
    """The project, its version, its published predictions in their order, and the labels of all boxes."""
    project_id = label_studio.create_project(title, config)
    tasks = label_studio.import_images(project_id, photographs)
    backend.connect(label_studio.session, project_id)
    version = wait_for_version(label_studio, backend, project_id, "ppal-r0-")
    stored = predictions_of(label_studio, project_id, version)
    assert sorted(p["task"] for p in stored) == sorted(tasks)
    assert [p["score"] for p in stored] == [position / 1e10 for position in range(1, IMAGES + 1)]
    labels = [label for p in stored for region in p["result"] for label in region["value"]["rectanglelabels"]]
    return project_id, version, stored, labels


def test_the_first_queue_brings_boxes_of_the_class_that_an_attribute_names(label_studio, backend, photographs):
    project_id, version, stored, labels = first_queue(label_studio, backend, photographs, "birds", BIRDS)
    assert len(labels) >= 5 and set(labels) == {"penguin"}, "one box a bird, under the first of the labels"
    assert project_of(label_studio, project_id)["model_version"] == version
    served = label_studio.session.get(f"/api/projects/{project_id}/next")
    assert served["id"] == stored[0]["task"]
    shown = [p for p in served["predictions"] if p["model_version"] == version]
    assert [p["result"] for p in shown] == [stored[0]["result"]]
    utilities = dict(read_json(round_folder(backend, project_id, 0) / "query_set.json")["utilities"])
    assert served["id"] == by_utility(utilities, utilities)[0], "of those not drawn for evaluation"
    assert utilities[served["id"]] > 0

    page = backend_page(backend, project_id)
    assert "<li>penguin, puffin: from `bird` (predicted_values)</li>" in page
    assert "<li>fish: trained from your first labels</li>" in page
    command = [sys.executable, "-m", "ppal_backend.cli", "status", str(project_id)]
    said = subprocess.run(command, env=backend._environment, capture_output=True, text=True, check=True).stdout
    assert "penguin, puffin: from `bird` (predicted_values)" in said


def test_labels_of_known_names_need_no_attribute(label_studio, backend, photographs):
    project_id, _, _, labels = first_queue(label_studio, backend, photographs, "people", PLAIN)
    assert labels.count("person") >= 5 and set(labels) <= {"person", "car", "dog"}
    record = backend.wait_for_round(project_id, 0, 60)  # published a moment before it has ended
    known = {"person": ["person"], "car": ["car"], "dog": ["dog"]}
    assert (record.number, record.kind, record.metrics["known"]) == (0, "rank", known)
    page = backend_page(backend, project_id)
    assert all(f"<li>{name}: from `{name}` (same name)</li>" in page for name in known)


def backend_page(backend, project_id):
    answer = requests.get(f"{backend.url}/ui/projects/{project_id}/", timeout=30)
    assert answer.status_code == 200
    return answer.text
