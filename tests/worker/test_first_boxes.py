"""Round 0 in its process: which spec it gets, which version it leaves, and what the rounds after it make of that."""

import pytest

from ppal_backend.worker.round_process import run_next_round
from tests.rounds.fakes import FakeWorld

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
