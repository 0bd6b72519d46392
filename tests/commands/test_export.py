"""``ppal export``: annotations out of Label Studio, predictions out of the active version's round."""

import io
import json
from functools import partial
from pathlib import Path

import httpx
import pytest
from PIL import Image

from ppal_backend.label_studio.snapshot import take_snapshot
from ppal_backend.rounds.detections_store import read_boxes
from ppal_backend.store import ModelVersion


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def annotation(number, *boxes, **fields):
    result = [
        {
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "value": {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [label]},
        }
        for label, x, y, w, h in boxes
    ]
    return {"id": number, "result": result, "was_cancelled": False, "ground_truth": False} | fields


@pytest.fixture
def place(place, monkeypatch):
    place.label_studio.fault = lambda request: (
        httpx.Response(200, content=png(200, 100)) if request.url.path.startswith("/data/upload/1/1") else None
    )
    monkeypatch.setattr(
        "ppal_backend.label_studio.source.open_client", lambda settings, url="", hostname="": place.client
    )
    return place


@pytest.fixture
def run(run):
    return partial(run, "export")


def test_annotations_are_those_a_training_would_learn_from(run, place, tmp_path):
    tasks = place.label_studio
    tasks.add_task(1, [annotation(1, ("cat", 10, 20, 50, 40)), annotation(2, ("dog", 0, 0, 5, 5), was_cancelled=True)])
    tasks.add_task(11, [annotation(3)])
    tasks.add_task(12, [annotation(4, ("dog", 50, 50, 100, 100), ("cow", 1, 1, 9, 9))])
    done = run(1, "--out", "out", "--json")
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["boxes"], summary["left_out"]) == (3, 2, {"unknown_labels": {"cow": 1}})
    read = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert {i["id"]: i["file_name"] for i in read["images"]} == {1: "1.png", 11: "11.png", 12: "12.png"}
    assert [(a["image_id"], a["category_id"], a["bbox"]) for a in read["annotations"]] == [
        (1, 1, [20, 20, 100, 40]),
        (12, 2, [100, 50, 100, 50]),
    ]
    fetched = [path for path in tasks.paths("GET") if path.startswith("/data/upload/")]
    assert sorted(fetched) == [f"/data/upload/1/{i}.jpg" for i in (1, 11, 12)], "no image of the pool is fetched"


def test_images_come_along_and_text_tells_the_counts(run, place, tmp_path):
    place.label_studio.add_task(1, [annotation(1, ("cat", 10, 20, 50, 40), ("cow", 1, 1, 9, 9))])
    done = run(1, "--out", "out", "--format", "yolo", "--images")
    assert "out: 1 images, 1 boxes" in done.stdout and "unknown labels: {'cow': 1}" in done.stdout
    assert (tmp_path / "out" / "images" / "1.png").read_bytes() == png(200, 100)
    assert (tmp_path / "out" / "labels" / "1.txt").read_text() == "0 0.350000 0.400000 0.500000 0.400000\n"


def test_predictions_are_the_boxes_of_the_active_versions_round_above_the_threshold(run, place, tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_THRESHOLD", "0.6")
    record = place.round()
    detections = read_boxes(place.folder(record.number) / "detections", range(1000, 1030))
    wanted = {(i, 1 + b.class_index, b.score) for i, boxes in detections.items() for b in boxes if b.score >= 0.6}
    assert wanted and any(b.score < 0.6 for boxes in detections.values() for b in boxes), "nothing to leave out"
    for task_id, task in place.label_studio.tasks.items():
        task["data"]["image"] = f"/data/upload/1/0a1b2c3d-field-{task_id}.jpg"
    (place.folder(record.number) / "export").mkdir(exist_ok=True)
    take_snapshot(place.client, 1, place.folder(record.number) / "export", None)
    assert run(1, "--predictions", "--out", "out").exit_code == 0
    read = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert {(a["image_id"], a["category_id"], a["score"]) for a in read["annotations"]} == wanted
    named = {i["id"]: i["file_name"] for i in read["images"]}
    assert {i: Path(name).stem for i, name in named.items()} == {i: f"field-{i}" for i in range(1000, 1030)}
    by_id = {i["id"]: (i["width"], i["height"]) for i in read["images"]}
    assert all(
        a["bbox"][0] >= 0
        and a["bbox"][0] + a["bbox"][2] <= by_id[a["image_id"]][0]
        and a["bbox"][1] + a["bbox"][3] <= by_id[a["image_id"]][1]
        for a in read["annotations"]
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((7,), "project 7 is not connected"),
        ((7, "--predictions"), "project 7 is not connected"),
        ((1,), "expected annotated tasks in project 1, got none"),
        ((1, "--predictions"), "with a trained model, got no version; annotate tasks and start a round (ppal round 1)"),
    ],
)
def test_what_cannot_be_exported_is_told_and_leaves_no_folder(run, place, tmp_path, words, told):
    done = run(*words, "--out", "out")
    assert done.exit_code == 1 and told in done.stderr and not (tmp_path / "out").exists()


def test_annotated_tasks_without_images_are_told_apart_from_none(run, place):
    place.label_studio.add_task(2, [annotation(1, ("cat", 10, 20, 50, 40))])
    done = run(1, "--out", "out")
    assert done.exit_code == 1 and "got 1 whose images cannot be had" in done.stderr


def test_a_version_without_a_model_or_without_files_predicts_nothing(run, place):
    place.store.versions.activate(ModelVersion(1, "ppal-r1-a", 1, "", "", (), None, {}))
    assert "got ppal-r1-a, which has none" in run(1, "--predictions", "--out", "out").stderr
    place.store.versions.activate(ModelVersion(1, "ppal-r2-b", 2, "tiny", "gone.pth", ("cat", "dog"), None, {}))
    done = run(1, "--predictions", "--out", "out")
    assert done.exit_code == 1 and "they were removed; order the pool again (ppal round 1 --rank)" in done.stderr


def test_a_folder_with_files_and_an_unknown_format_are_refused(run, place, tmp_path):
    place.label_studio.add_task(1, [annotation(1, ("cat", 10, 20, 50, 40))])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = run(1, "--out", "out")
    assert done.exit_code == 1 and "which holds files; choose another one" in done.stderr
    assert run(1, "--out", "new", "--format", "csv").exit_code == 2
