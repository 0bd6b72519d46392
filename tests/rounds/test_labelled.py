"""Labelled images: which detections on them are right, and that a round hands these on."""

from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.rounds.detections_store import read_detections
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.labelled import labelled_entries, mark_true_positives, truth_by_image
from ppal_backend.rounds.ports import Ports
from ppal_backend.rounds.run import run_round
from ppal_backend.structures.detections import Detections
from tests.rounds.fakes import SPEC, FakeWorld


def detections(boxes, scores, classes):
    n = len(scores)
    return Detections(
        1,
        np.array(boxes, np.float32).reshape(n, 4),
        np.array(scores, np.float32),
        np.array(classes, np.int64),
        np.zeros((n, 2), np.float32),
    )


TRUTH = (np.array([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]), np.array([0, 1]))


def test_a_detection_is_right_when_it_overlaps_a_box_of_its_class():
    found = detections(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 4], [20, 0, 30, 6]], [0.9, 0.8, 0.7, 0.6], [0, 1, 1, 1]
    )
    assert mark_true_positives(found, TRUTH).true_positive.tolist() == [True, False, False, True]


def test_a_box_is_taken_once_by_the_highest_score():
    found = detections([[0, 0, 10, 8], [0, 0, 10, 10]], [0.3, 0.9], [0, 0])
    assert mark_true_positives(found, TRUTH).true_positive.tolist() == [False, True]


def test_overlap_of_exactly_the_limit_counts():
    found = detections([[0, 0, 10, 5]], [0.9], [0])
    assert mark_true_positives(found, TRUTH, iou=0.5).true_positive.tolist() == [True]
    assert mark_true_positives(found, TRUTH, iou=0.51).true_positive.tolist() == [False]


@pytest.mark.parametrize("truth", [TRUTH, (np.zeros((0, 4)), np.zeros(0, np.int64))])
def test_nothing_detected_or_annotated_is_no_error(truth):
    assert mark_true_positives(detections([], [], []), truth).true_positive.shape == (0,)
    assert not mark_true_positives(detections([[90, 90, 99, 99]], [0.5], [0]), truth).true_positive.any()


def dataset():
    rows = [
        CocoAnnotation(1, 1, 7, (1.0, 2.0, 3.0, 4.0)),
        CocoAnnotation(2, 1, 3, (5.0, 5.0, 5.0, 5.0)),
        CocoAnnotation(3, 1, 3, (0.0, 0.0, 9.0, 9.0), iscrowd=1),
    ]
    images = [CocoImage(1, "/a.jpg", 40, 30), CocoImage(2, "/b.jpg", 40, 30)]
    return CocoDataset(images, rows, [CocoCategory(7, "dog"), CocoCategory(3, "cat")])


def test_truth_is_in_the_models_order_of_classes_without_crowds():
    boxes, classes = truth_by_image(dataset(), ("dog", "wolf"))[1]
    assert boxes.tolist() == [[1, 2, 4, 6], [5, 5, 10, 10]] and classes.tolist() == [0, -1]
    assert truth_by_image(dataset(), ("dog",))[2][0].shape == (0, 4)
    assert [entry.image_id for entry in labelled_entries(dataset())] == [1, 2]


def test_a_round_that_asks_looks_at_its_labelled_images(tmp_path):
    world = FakeWorld()
    spec = replace(SPEC, look_at_labelled=True, strategy="ppal+labelled", holdout_fraction=0.2)
    run_round(spec, RoundFolder(tmp_path / "a"), Ports(world, world, world, world))
    seen = [d.image_id for d, _ in read_detections(tmp_path / "a" / "labelled_detections")]
    held_out = RoundFolder(tmp_path / "a").facts("dataset")["held_out_images"]
    assert len(seen) == 20 - held_out and world.calls.count("infer") == 2
    nearest = RoundFolder(tmp_path / "a").read("query_set.json")["explanations"].values()
    assert any((e["nearest_chosen"] or 0) in seen for e in nearest), "labelled images are centres too"
    plain = FakeWorld()
    run_round(SPEC, RoundFolder(tmp_path / "b"), Ports(plain, plain, plain, plain))
    assert plain.calls.count("infer") == 1 and not (tmp_path / "b" / "labelled_detections").exists()


def test_options_of_strategy_and_evaluation_set_reach_their_steps(tmp_path):
    class World(FakeWorld):
        def prepare(self, folder, on_progress):
            return replace(super().prepare(folder, on_progress), evaluation=dataset())

    world = World()
    spec = replace(SPEC, strategy_options={"delta": 3.0, "first": "random"}, holdout_fraction=0.0)
    run_round(spec, RoundFolder(tmp_path), Ports(world, world, world, world))
    folder = RoundFolder(tmp_path)
    assert CocoDataset.read(tmp_path / "dataset" / "val.json").image_ids == (1, 2)
    assert len(CocoDataset.read(tmp_path / "dataset" / "train.json").images) == 20
    assert len(folder.read("query_set.json")["candidate_ids"]) == 15
