"""The comparison of annotations with what earlier rounds' models saw before them."""

from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.rounds import review
from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Ports
from ppal_backend.rounds.review import review_of
from ppal_backend.rounds.run import run_round
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.round import ModelRef
from tests.rounds.fakes import SPEC, FakeWorld, rank_spec

BOX, ELSEWHERE = (10.0, 10.0, 30.0, 30.0), (60.0, 10.0, 80.0, 30.0)


def detections(image_id, *rows):
    """From ``(box, class index, score)``."""
    return Detections(
        image_id,
        np.array([b for b, *_ in rows], np.float32).reshape(-1, 4),
        np.array([s for *_, s in rows], np.float32),
        np.array([c for _, c, _ in rows], np.int64),
        np.zeros((len(rows), 2), np.float32),
    )


def earlier_round(root, number, *found, labels=("cat", "dog"), kind="train"):
    """The folder of a round whose model saw this in the pool; no labels: there was no model."""
    folder = RoundFolder(root / str(number))
    spec = replace(SPEC, number=number)
    if kind == "rank":
        spec = rank_spec(ModelRef("tiny", "x.pth", labels) if labels else None)
    elif labels:
        folder.write("train/model.json", {"labels": list(labels)})
        folder.write("metrics.json", metrics_with(dict.fromkeys(labels, 0.5)))
    folder.write("spec.json", spec.as_dict())
    writer = DetectionsWriter(folder / "detections")
    for item in found:
        writer.add(item, {})
    writer.flush()


def metrics_with(classes, interval=(0.4, 0.6)):
    """What a round measured, with the AP of its classes."""
    measured = {"map": 0.5, "interval": interval, "classes": classes, "too_few": {}, "images": 20}
    return {"measured": measured, "image_set": "these"}


def labelled(*image_ids, boxes=(BOX,), label=1):
    rows = [(i, box) for i in image_ids for box in boxes]
    return CocoDataset(
        [CocoImage(i, f"/images/{i}.jpg", 100, 80) for i in image_ids],
        [CocoAnnotation(n, i, label, (x, y, X - x, Y - y)) for n, (i, (x, y, X, Y)) in enumerate(rows, start=1)],
        [CocoCategory(1, "cat"), CocoCategory(2, "dog")],
    )


def test_a_missing_box_is_found_and_told_in_full(tmp_path):
    earlier_round(tmp_path, 1, detections(7, (BOX, 0, 0.5), (ELSEWHERE, 0, 0.75)), detections(8, (BOX, 0, 0.5)))
    assert review_of(tmp_path / "2", labelled(5, 7, 8)) == {
        "labelled": 3,
        "compared": 2,
        "disputed": 1,
        "least_ap": 0.1,
        "left_out": [],
        "tasks": [
            {
                "task_id": 7,
                "round": 1,
                "annotator": None,
                "width": 100,
                "height": 80,
                "annotated": [{"box_xyxy": list(BOX), "label": "cat"}],
                "disputes": [
                    {
                        "kind": "overlooked",
                        "score": 0.25,
                        "annotated": None,
                        "box_xyxy": list(ELSEWHERE),
                        "label": "cat",
                        "confidence": 0.75,
                    }
                ],
            }
        ],
    }


def test_the_newest_round_before_this_one_speaks_and_later_ones_do_not(tmp_path):
    agreed, disputed = detections(7, (BOX, 0, 0.5)), detections(7, (BOX, 0, 0.5), (ELSEWHERE, 0, 0.9))
    earlier_round(tmp_path, 9, disputed)
    earlier_round(tmp_path, 10, agreed)
    earlier_round(tmp_path, 12, disputed)
    found = review_of(tmp_path / "11", labelled(7))
    assert (found["compared"], found["disputed"]) == (1, 0), "10 comes after 9, and 12 is to come"
    assert review_of(tmp_path / "10", labelled(7))["tasks"][0]["round"] == 9


def test_classes_are_matched_by_name_when_the_labels_have_changed(tmp_path):
    seen = detections(7, (BOX, 2, 0.5), (ELSEWHERE, 2, 0.75), ((40.0, 40.0, 60.0, 60.0), 0, 0.9))
    earlier_round(tmp_path, 1, seen, labels=("bird", "dog", "cat"))
    (task,) = review_of(tmp_path / "2", labelled(7))["tasks"]
    assert [(d["label"], d["confidence"]) for d in task["disputes"]] == [("cat", 0.75)], "there is no bird any more"


def test_ranking_rounds_use_the_labels_of_their_model_and_rounds_without_a_model_say_nothing(tmp_path):
    seen = detections(7, (BOX, 0, 0.5), (ELSEWHERE, 0, 0.75))
    earlier_round(tmp_path, 1, seen, kind="rank")
    RoundFolder(tmp_path / "0").write("metrics.json", metrics_with({"cat": 0.5}))
    earlier_round(tmp_path, 2, detections(7), detections(8), labels=(), kind="rank")
    earlier_round(tmp_path, 3, detections(7), labels=())
    found = review_of(tmp_path / "4", labelled(7, 8))
    assert (found["compared"], [t["round"] for t in found["tasks"]]) == (1, [1])


def test_a_damaged_round_is_left_out_and_told(tmp_path, caplog):
    seen = detections(7, (BOX, 0, 0.5), (ELSEWHERE, 0, 0.75))
    earlier_round(tmp_path, 1, seen)
    for number, damage in ((2, "detections/shard-00000.npz"), (3, "train/model.json"), (4, "spec.json")):
        earlier_round(tmp_path, number, seen)
        path = tmp_path / str(number) / damage
        path.write_bytes(path.read_bytes()[:100] if path.suffix == ".npz" else b"{}")
    found = review_of(tmp_path / "5", labelled(7))
    assert [t["round"] for t in found["tasks"]] == [1]
    assert caplog.text.count("cannot be read") == 3


def test_the_most_disputed_come_first_and_the_list_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(review, "MOST_LISTED", 2)
    scores = {7: 0.6, 8: 0.9, 9: 0.7}
    earlier_round(tmp_path, 1, *(detections(i, (BOX, 0, 0.5), (ELSEWHERE, 0, s)) for i, s in scores.items()))
    found = review_of(tmp_path / "2", labelled(7, 8, 9))
    assert [t["task_id"] for t in found["tasks"]] == [8, 9] and found["disputed"] == 3


@pytest.mark.parametrize("simulated", [False, True])
def test_rounds_leave_the_comparison_except_in_a_simulation(tmp_path, simulated):
    world = FakeWorld()
    if simulated:
        prepared = world.prepare(None, None)
        world.prepare = lambda folder, on_progress: replace(prepared, evaluation=prepared.labelled)
    earlier_round(tmp_path, 1, detections(3, (BOX, 0, 0.5)))
    folder = RoundFolder(tmp_path / "2")
    run_round(replace(SPEC, number=2), folder, Ports(world, world, world, world))
    assert (folder / "dataset/quality.json").is_file() is not simulated
    if not simulated:
        told = folder.read("dataset/quality.json")
        assert (told["labelled"], told["compared"]) == (20, 1)


def test_classes_that_are_measured_as_weak_or_not_at_all_doubt_nobody(tmp_path):
    seen = detections(7, (BOX, 0, 0.5), (ELSEWHERE, 0, 0.75))
    earlier_round(tmp_path, 1, seen)
    for classes, left_out in (
        ({"cat": 0.09, "dog": 0.1}, [{"label": "cat", "ap": 0.09}]),
        ({"dog": 0.4}, [{"label": "cat", "ap": None}]),
    ):
        RoundFolder(tmp_path / "1").write("metrics.json", metrics_with(classes))
        found = review_of(tmp_path / "2", labelled(7))
        assert (found["disputed"], found["left_out"]) == (0, left_out)
    RoundFolder(tmp_path / "1").write("metrics.json", metrics_with({"cat": 0.9}, None))
    assert [c["ap"] for c in review_of(tmp_path / "2", labelled(7))["left_out"]] == [None, None], "too few images"


def test_pictures_with_the_most_and_strongest_doubts_come_first_and_a_quarter_is_listed(tmp_path):
    third = (40.0, 50.0, 60.0, 70.0)
    agreed = [detections(i, (BOX, 0, 0.4)) for i in range(10, 90)]
    one = [detections(i, (BOX, 0, 0.4), (ELSEWHERE, 0, 0.8)) for i in range(100, 140)]
    two = detections(200, (BOX, 0, 0.4), (ELSEWHERE, 0, 0.7), (third, 0, 0.7))
    earlier_round(tmp_path, 1, *agreed, *one, two)
    found = review_of(tmp_path / "2", labelled(*range(10, 90), *range(100, 140), 200), {200: 5})
    assert (found["compared"], found["disputed"], len(found["tasks"])) == (121, 41, 30)
    assert [t["task_id"] for t in found["tasks"]] == [200, *range(100, 129)]
    assert [t["annotator"] for t in found["tasks"][:2]] == [5, None]
