"""What a person makes of pre-annotations, and that the counts of the page Quality see it."""

import pytest

from ppal_backend.datasets.corrections import agreement_of, corrections_of
from ppal_backend.demo.annotator import corrected, overlap


def region(name, x, y, width, height, label="cat", **more):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return {"id": name, "from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value, **more}


def told(result):
    """Id, origin, place and label of each region."""
    return [(r["id"], r.get("origin"), r["value"]["x"], r["value"]["rectanglelabels"][0]) for r in result]


def test_overlap_is_that_of_areas():
    box = {"x": 0, "y": 0, "width": 10, "height": 10}
    assert overlap(box, box) == 1.0 and overlap(box, {**box, "x": 10}) == 0.0
    assert overlap(box, {**box, "x": 5}) == pytest.approx(50 / 150)
    assert overlap({**box, "width": 0}, {**box, "width": 0}) == 0.0


def test_good_boxes_stay_others_are_moved_relabelled_removed_or_added():
    truth = [
        region("t0", 0, 0, 10, 10, origin="manual"),
        region("t1", 20, 0, 10, 10, origin="manual"),
        region("t2", 40, 0, 10, 10, "dog", origin="manual"),
        region("t3", 60, 0, 10, 10, origin="manual"),
    ]
    shown = [
        region("good", 0.5, 0, 10, 10, score=0.9),
        region("loose", 22, 0, 10, 10, score=0.8),
        region("wrong", 40, 0, 10, 10, "cat", score=0.7),
        region("nothing there", 80, 80, 5, 5, score=0.6),
    ]
    result = corrected(truth, shown)
    assert told(result) == [
        ("good", "prediction", 0.5, "cat"),
        ("loose", "prediction-changed", 20, "cat"),
        ("wrong", "prediction-changed", 40, "dog"),
        ("t3", "manual", 60, "cat"),
    ]
    assert result[0]["score"] == 0.9, "the editor keeps it"
    task = {"annotations": [{"id": 1, "result": result, "prediction": {"model_version": "v", "result": shown}}]}
    counts = {"tasks": 1, "kept": 1, "moved": 1, "relabelled": 1, "removed": 1, "added": 1}
    assert agreement_of(corrections_of([task], "label")) == {"v": counts}


def test_each_object_has_one_box_and_the_nearest_one_at_that():
    truth = [region("t0", 0, 0, 10, 10), region("t1", 4, 0, 10, 10)]
    shown = [region("a", 3.8, 0, 10, 10), region("b", 3.9, 0, 10, 10), region("c", 0.2, 0, 10, 10)]
    assert told(corrected(truth, shown)) == [("b", "prediction", 3.9, "cat"), ("c", "prediction", 0.2, "cat")]


def test_regions_of_other_controls_are_left_alone_and_empty_images_stay_empty():
    shown = [region("other", 0, 0, 10, 10, from_name="second"), {"type": "choices", "value": {}, "id": "x"}]
    truth = [region("t0", 0, 0, 10, 10)]
    assert corrected(truth, shown) == truth
    assert corrected([], [region("a", 0, 0, 10, 10)]) == [] and corrected(truth, []) == truth
