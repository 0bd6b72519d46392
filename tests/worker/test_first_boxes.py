"""Round 0 in its process: which spec it gets, which version it leaves, and what the rounds after it make of that."""

import json
from pathlib import Path

import pytest

from ppal_backend.datasets.coco import CocoCategory, CocoDataset
from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.engines.local import LocalEngine
from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.rounds.ports import PoolEntry, Ports, PreparedData
from ppal_backend.worker.round_process import run_next_round
from tests.label_studio.fake import FakeLabelStudio
from tests.rounds.fakes import FakeWorld

SHARED = Path(__file__).resolve().parents[3] / "shared"
AQUARIUM, WEIGHTS = SHARED / "data" / "aquarium", SHARED / "weights" / "yolox_nano_coco.pth"

KNOWN_CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="cat"/><Label value="dog" predicted_values=""/></RectangleLabels></View>'
)


ZOO = """include_packaged = true
[published]
title = "a detector whose weights lie in place"
paper = ""
config = "config.py"
head_family = "anchor"
input_size = [64, 64]
[published.weights]
kind = "detector"
path = "published.pth"
licence = "MIT"
classes = "coco"
[published.schedule]
recipe = "ppal"
batch_size = 2
lr = 0.1
"""


@pytest.fixture
def settings(settings, tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, content in (("zoo.toml", ZOO), ("config.py", ""), ("published.pth", "weights")):
        (folder / name).write_text(content)
    return settings.model_copy(update={"model_zoo": folder})


def only(store):
    (record,) = store.rounds.of_project(1)
    return record


def known_project(store, config=KNOWN_CONFIG, **options):
    store.projects.connect(1, store.projects.get(1).key, config, "http://ls", {"detector": "published", **options})


def test_round_0_runs_the_detector_as_it_is_and_its_version_predicts(settings, store):
    known_project(store)
    store.rounds.request(1, "rank", "x", as_is=True)
    world = FakeWorld(labelled=0)
    assert run_next_round(settings, 1, world.ports)
    record, version = only(store), store.versions.active(1, with_model=True)
    assert (record.number, record.state, record.metrics["known"]) == (0, "done", {"cat": ["cat"]})
    assert version.checkpoint == "projects/1/rounds/0/adopt/as_is.pth" and version.detector == "published"
    assert not version.is_trained and version.labels == ("cat", "dog")


@pytest.mark.parametrize("init_weights", ["zoo", "last"])
def test_the_first_training_starts_from_the_zoo_with_the_rows_of_known_classes(settings, store, init_weights):
    known_project(store, init_weights=init_weights)
    for kind in ("rank", "train"):
        store.rounds.request(1, kind, "x", as_is=True)
        world = FakeWorld()
        run_next_round(settings, 1, world.ports)
    assert (world.spec.number, world.spec.kind, world.spec.known) == (1, "train", {"cat": ["cat"]})
    assert world.spec.model is None, "the published detector is no training to go on from"
    assert store.versions.active(1).is_trained


def test_a_ranking_before_any_training_takes_the_labels_as_they_are_now(settings, store):
    known_project(store)
    store.rounds.request(1, "rank", "x", as_is=True)
    run_next_round(settings, 1, FakeWorld(labelled=0).ports)
    known_project(store, KNOWN_CONFIG.replace(' predicted_values=""', ""))
    store.rounds.request(1, "rank", "x", as_is=True)
    world = FakeWorld(labelled=0)
    run_next_round(settings, 1, world.ports)
    assert (world.spec.number, world.spec.model, world.known) == (1, None, {"cat": ["cat"], "dog": ["dog"]})
    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, FakeWorld().ports)
    store.rounds.request(1, "rank", "x")
    world = FakeWorld()
    run_next_round(settings, 1, world.ports)
    assert world.spec.model.checkpoint.endswith("rounds/2/train/model.pth") and "as_is" not in world.calls


class Photographs(FakeWorld):
    """Pictures with birds as the pool, the real detector, and a Label Studio in memory that takes the queue."""

    def __init__(self, labels, config, weights_dir):
        super().__init__(labelled=0)
        content = json.loads((AQUARIUM / "test.json").read_text())
        birds = {c["id"] for c in content["categories"] if c["name"] in ("penguin", "puffin")}
        with_birds = {row["image_id"] for row in content["annotations"] if row["category_id"] in birds}
        self.images = [image for image in content["images"] if image["id"] in with_birds]
        self.labels, self.engine = labels, LocalEngine(weights_dir=weights_dir)
        self.label_studio = FakeLabelStudio(tasks=0)
        self.label_studio.project["label_config"] = config
        for image in self.images:
            self.label_studio.add_task(image["id"])

    def prepare(self, folder, on_progress):
        categories = [CocoCategory(number, name) for number, name in enumerate(self.labels, start=1)]
        pool = [
            PoolEntry(image["id"], str(AQUARIUM / "images" / image["file_name"]), image["width"], image["height"])
            for image in self.images
        ]
        return PreparedData(CocoDataset([], [], categories), pool, self.labels, {})

    def ports(self, settings, store, project, spec, observer):
        return Ports(self, self.engine, LabelStudioPublisher(self.label_studio.client()), observer)


@pytest.mark.shared
@pytest.mark.skipif(not (AQUARIUM.is_dir() and WEIGHTS.is_file()), reason=f"needs {AQUARIUM} and {WEIGHTS}")
@pytest.mark.parametrize(
    ("labels", "attribute", "told"),
    [
        (("fish", "penguin", "puffin"), ' predicted_values="bird"', {"penguin"}),
        (("person", "car", "dog"), "", {"person"}),
    ],
)
def test_photographs_are_published_with_boxes_of_known_labels(settings, store, tmp_path, labels, attribute, told):
    tags = f'<Label value="{labels[0]}"/>' + "".join(f'<Label value="{name}"{attribute}/>' for name in labels[1:])
    config = KNOWN_CONFIG[: KNOWN_CONFIG.index("<Label ")] + tags + "</RectangleLabels></View>"
    settings = settings.model_copy(update={"cache_dir": tmp_path / "cache", "model_zoo": None})
    place_weights(find_entry("yolox_nano"), WEIGHTS, settings.weights_dir)
    known_project(store, config, detector="yolox_nano", score_threshold=0.1)
    store.rounds.request(1, "rank", "x", as_is=True)
    world = Photographs(labels, config, settings.weights_dir)
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done", only(store).error
    published = world.label_studio.predictions
    assert world.label_studio.project["model_version"].startswith("ppal-r0-")
    assert sorted(p["task"] for p in published) == sorted(image["id"] for image in world.images)
    boxes = [label for p in published for region in p["result"] for label in region["value"]["rectanglelabels"]]
    assert len(boxes) >= 10 and told <= set(boxes) <= {*told, *(labels if not attribute else ())}
    first = min(published, key=lambda p: p["score"])
    assert first["result"], "the most uncertain picture has boxes"
