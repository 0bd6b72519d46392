"""Annotations to COCO: one annotation per task, percent to pixels, and a count for everything left out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ppal_backend.datasets.images import ImageInfo
from ppal_backend.datasets.label_studio_json import annotations_to_coco, choose_annotation, region_to_box
from ppal_backend.label_studio.schema import ImageAddress, LabelSchema

SCHEMA = LabelSchema("boxes", "img", ImageAddress("$image"), ("c1", "Bus"), aliases={"Car": "c1"})
SIZE = (200, 100)


def region(x, y, w, h, labels=("c1",), rotation=0, **changes):
    value = {"x": x, "y": y, "width": w, "height": h, "rotation": rotation, "rectanglelabels": list(labels)}
    return {"type": "rectanglelabels", "from_name": "boxes", "to_name": "img", "value": value} | changes


def annotation(result, number=1, **fields):
    return {"id": number, "result": result, "was_cancelled": False, "ground_truth": False} | fields


def convert(*tasks):
    images = {task["id"]: ImageInfo(task["id"], Path(f"/c/{task['id']}.jpg"), *SIZE) for task in tasks}
    return annotations_to_coco(tasks, SCHEMA, images)


def boxes_of(*regions):
    dataset, report = convert({"id": 1, "annotations": [annotation(list(regions))]})
    return [(row.category_id, tuple(round(v, 6) for v in row.bbox_xywh)) for row in dataset.annotations], report


def reference_hull(x, y, w, h, degrees, width, height):
    """Corners by complex numbers: a turn is a multiplication (image y points down, so clockwise is positive)."""
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    origin = complex(x / 100 * width, y / 100 * height)
    corners = [origin + turn * complex(a * w / 100 * width, b * h / 100 * height) for a in (0, 1) for b in (0, 1)]
    xs, ys = [c.real for c in corners], [c.imag for c in corners]
    return min(xs), min(ys), max(xs), max(ys)


def test_percent_of_width_and_height_are_different_lengths():
    boxes, report = boxes_of(region(10, 10, 20, 30))
    assert boxes == [(1, (20, 10, 40, 30))]
    assert (report.boxes, report.images, report.negatives) == (1, 1, 0)


def test_quarter_turn_is_clockwise_about_the_top_left_in_pixels():
    boxes, _ = boxes_of(region(50, 20, 10, 20, rotation=90))
    assert boxes == [(1, (80, 20, 20, 20))], "20 x 20 px turned clockwise lies to the left of its corner"
    boxes, _ = boxes_of(region(50, 20, 20, 10, rotation=90))
    assert boxes == [(1, (90, 20, 10, 40))]


@pytest.mark.parametrize("degrees", [0, 13, 45, 90, 123.4, 180, 270, 359.9, -30])
def test_any_turn_against_the_reference(degrees):
    value = region(40, 30, 15, 25, rotation=degrees)["value"]
    assert region_to_box(value, 640, 480) == pytest.approx(reference_hull(40, 30, 15, 25, degrees, 640, 480))


def test_image_rotation_in_the_editor_is_ignored():
    boxes, _ = boxes_of(region(10, 10, 20, 30, image_rotation=90, original_width=5, original_height=5))
    assert boxes == [(1, (20, 10, 40, 30))]


def test_boxes_are_clipped_to_the_image():
    boxes, report = boxes_of(region(-10, -10, 30, 30), region(90, 90, 30, 30), region(100, 0, 10, 10))
    assert boxes == [(1, (0, 0, 40, 20)), (1, (180, 90, 20, 10))]
    assert report.degenerate == 1


def test_boxes_of_less_than_a_pixel_are_counted_not_kept():
    boxes, report = boxes_of(region(10, 10, 0.4, 50), region(10, 10, 0, 0), region(10, 10, 0.5, 1))
    assert boxes == [(1, (20, 10, 1, 1))]
    assert report.degenerate == 2


def test_alias_value_and_several_labels():
    boxes, report = boxes_of(region(0, 0, 10, 10, labels=["Car"]), region(0, 0, 10, 10, labels=["c1", "Bus", "c1"]))
    assert [category for category, _ in boxes] == [1, 1, 2]
    assert report.unknown_labels == {}


def test_removed_labels_are_counted_by_name():
    boxes, report = boxes_of(
        region(0, 0, 9, 9, ["Tram"]),
        region(0, 0, 9, 9, ["Tram", "Bus"]),
        region(90, 90, 30, 30, ["X"], rotation=5),
        region(0, 0, 0, 0, ["Bus"], rotation=5),
    )
    assert [category for category, _ in boxes] == [2]
    assert report.unknown_labels == {"Tram": 2, "X": 1}
    assert (report.rotated, report.clipped, report.degenerate) == (0, 0, 1), "left out once, not learned otherwise"


def test_other_types_and_controls_are_counted_by_type():
    other = [
        {"type": "choices", "from_name": "boxes", "value": {"choices": ["a"]}},
        {"type": "polygonlabels", "from_name": "poly", "value": {"points": []}},
        {"type": "rectangle", "from_name": "boxes", "value": {"x": 0, "y": 0, "width": 5, "height": 5}},
        region(0, 0, 9, 9, from_name="second"),
    ]
    boxes, report = boxes_of(*other, region(0, 0, 9, 9))
    assert len(boxes) == 1
    assert report.other_regions == {"choices": 1, "polygonlabels": 1, "rectangle": 1, "rectanglelabels": 1}


@pytest.mark.parametrize(
    "bad",
    [
        5,
        None,
        {"type": "rectanglelabels", "from_name": "boxes"},
        {"type": "rectanglelabels", "from_name": "boxes", "value": None},
        region(None, 0, 1, 1),
        region("1", 0, 1, 1),
        region(float("nan"), 0, 1, 1),
        region(True, 0, 1, 1),
        region(0, 0, 9, 9, labels=()),
        region(0, 0, 9, 9, rotation="x"),
    ],
)
def test_malformed_regions_cost_only_themselves(bad):
    boxes, report = boxes_of(bad, region(0, 0, 9, 9))
    assert len(boxes) == 1
    assert report.malformed == 1


@pytest.mark.parametrize("result", [[], None, "x"])
def test_empty_submit_is_a_true_negative(result):
    dataset, report = convert({"id": 3, "annotations": [annotation(result)]})
    assert dataset.image_ids == (3,)
    assert dataset.annotations == ()
    assert report.negatives == 1


def test_skipped_drafted_and_bare_tasks_are_left_out():
    box = [region(0, 0, 9, 9)]
    dataset, report = convert(
        {"id": 1, "annotations": [annotation(box, was_cancelled=True)]},
        {"id": 2, "annotations": [], "drafts": [annotation(box)]},
        {"id": 3},
        {"id": 4, "annotations": [annotation(box)]},
    )
    assert dataset.image_ids == (4,)
    assert (report.tasks, report.unannotated) == (4, 3)


def test_choice_among_several():
    early, late = "2026-01-01T00:00:00.000000Z", "2026-02-01T00:00:00.000000Z"
    old = annotation([], 1, created_at=early, updated_at=early)
    new = annotation([], 2, created_at=late, updated_at=late)
    assert choose_annotation({"annotations": [new, old]}) is new
    revised = old | {"updated_at": "2026-03-01T00:00:00.000000Z"}
    assert choose_annotation({"annotations": [revised, new]}) is revised
    truth = old | {"ground_truth": True}
    assert choose_annotation({"annotations": [new, truth]}) is truth
    assert choose_annotation({"annotations": [truth | {"was_cancelled": True}, new]}) is new
    assert choose_annotation({"annotations": [annotation([], 5), annotation([], 9), annotation([], 7)]})["id"] == 9
    assert choose_annotation({"annotations": None}) is None


def test_times_with_and_without_fraction_or_zone_compare():
    a = annotation([], 1, updated_at="2026-01-01T00:00:00Z")
    b = annotation([], 2, updated_at="2026-01-01T00:00:00.000001+00:00")
    c = annotation([], 3, updated_at="2025-01-01T00:00:00")
    d = annotation([], 4, updated_at="yesterday")
    assert choose_annotation({"annotations": [a, b, c, d]}) is b


def test_images_that_could_not_be_had_are_counted():
    tasks = [{"id": i, "annotations": [annotation([region(0, 0, 9, 9)])]} for i in (1, 2)]
    dataset, report = annotations_to_coco(tasks, SCHEMA, {2: ImageInfo(2, Path("/c/2.png"), *SIZE)})
    assert dataset.images[0].file_name == "/c/2.png"
    assert (dataset.image_ids, report.missing_images) == ((2,), 1)


def test_order_of_tasks_does_not_matter_and_ids_are_unique():
    tasks = [{"id": i, "annotations": [annotation([region(i, 0, 9, 9)] * 2)]} for i in (3, 1, 2)]
    forward, backward = convert(*tasks)[0], convert(*tasks[::-1])[0]
    assert forward == backward
    assert [row.id for row in forward.annotations] == [1, 2, 3, 4, 5, 6]
    assert [row.image_id for row in forward.annotations] == [1, 1, 2, 2, 3, 3]


def test_no_tasks():
    dataset, report = convert()
    assert (dataset.images, dataset.annotations, report.tasks) == ((), (), 0)
    assert dataset.labels == ("c1", "Bus")


def test_tasks_are_read_once_as_a_stream():
    images = {1: ImageInfo(1, Path("/c/1.jpg"), *SIZE)}
    dataset, _ = annotations_to_coco(iter([{"id": 1, "annotations": [annotation([])]}]), SCHEMA, images)
    assert dataset.image_ids == (1,)


def test_report_is_json_ready():
    _, report = boxes_of(region(0, 0, 9, 9, labels=["Tram"]))
    assert report.as_dict()["unknown_labels"] == {"Tram": 1}
