"""How often people keep boxes of a confidence, counted by hand and held against a simulation."""

import numpy as np
import pytest

from ppal_backend.datasets.corrections import corrections_of
from ppal_backend.datasets.precision import ENOUGH_BOXES, ENOUGH_IMAGES, THRESHOLDS, measured, precision_of


def region(number, score=None, x=10.0, label="cat", **more):
    value = {"x": x, "y": 10.0, "width": 5.0, "height": 5.0, "rotation": 0, "rectanglelabels": [label]}
    made = {"id": f"r{number}", "type": "rectanglelabels", "from_name": "label", "value": value, **more}
    return made if score is None else {**made, "score": score}


def task(shown, submitted, version="ppal-r1", **annotation):
    prediction = {"model_version": version, "result": shown}
    return {"id": 1, "annotations": [{"id": 9, "result": submitted, "prediction": prediction, **annotation}]}


def at(tasks, threshold):
    (row,) = [p for p in measured(precision_of(corrections_of(tasks, "label"))) if p.threshold == threshold]
    return row


def test_boxes_count_from_their_confidence_on_and_only_untouched_ones_are_kept():
    shown = [region(1, 0.95), region(2, 0.85), region(3, 0.85), region(4, 0.65), region(5, 0.3)]
    submitted = [region(1), region(2, x=12.0), region(3, label="dog"), region(4)]  # the fifth is removed
    tasks = [task(shown, submitted), task([region(1, 0.99)], [region(1)])]
    found = {p.threshold: (p.boxes, p.kept, p.images) for p in measured(precision_of(corrections_of(tasks, "label")))}
    assert found == {0.5: (5, 3, 2), 0.6: (5, 3, 2), 0.7: (4, 2, 2), 0.8: (4, 2, 2), 0.9: (2, 2, 2), 0.95: (2, 2, 2)}


def test_images_count_as_untouched_only_where_every_box_was_sure_and_nothing_was_added():
    sure, unsure = [region(1, 0.9), region(2, 0.9)], [region(1, 0.9), region(2, 0.6)]
    tasks = [
        task(sure, [region(1), region(2)]),
        task(sure, [region(1), region(2), region(7)]),  # one was missing
        task(sure, [region(1)]),
        task(unsure, [region(1), region(2)]),
    ]
    assert (at(tasks, 0.8).whole, at(tasks, 0.8).untouched) == (3, 1)
    assert (at(tasks, 0.6).whole, at(tasks, 0.6).untouched) == (4, 2)


def test_what_nobody_was_shown_or_submitted_does_not_count():
    tasks = [
        {"id": 1, "annotations": []},
        task([region(1, 0.9)], [region(1)], was_cancelled=True),
        {"id": 2, "annotations": [{"id": 3, "result": [region(1)], "prediction": None}]},
        task([region(1)], [region(1)]),  # no score: made by somebody else
        task([region(1, True)], [region(1)]),
        task([region(1, 0.9, from_name="other")], [region(1)]),
        task([], [region(1)]),
        task([region(1, 0.9)], [region(1)], version=None),
    ]
    assert all(
        p.boxes == 0 and p.share is None and p.interval is None
        for p in measured(precision_of(corrections_of(tasks, "label")))
    )
    assert at(tasks, 0.8).missing_boxes == ENOUGH_BOXES and at(tasks, 0.8).missing_images == ENOUGH_IMAGES


def test_versions_are_added_up_and_it_says_what_is_missing():
    many = [
        task([region(k, 0.85) for k in range(5)], [region(k) for k in range(5)], f"ppal-r{n % 2}") for n in range(19)
    ]
    row = at(many, 0.8)
    assert (row.boxes, row.images, row.missing_boxes, row.missing_images) == (95, 19, 5, 1) and not row.is_measured
    row = at([*many, many[0]], 0.8)
    assert row.is_measured and row.share == 1.0 and 0.8 < row.interval[0] < row.interval[1] == 1.0
    assert not at([*many, many[0]], 0.9).is_measured
    assert set(precision_of(corrections_of(many, "label"))) == {"ppal-r0", "ppal-r1"}


def test_what_people_did_with_another_models_boxes_says_nothing_of_this_one():
    many = [task([region(k, 0.9) for k in range(5)], [region(k) for k in range(5)], "yolov8-production")
            for _ in range(24)]  # fmt: skip
    assert at(many, 0.8).boxes == 0 and not at(many, 0.8).is_measured


def test_boxes_of_one_image_that_fall_together_widen_the_interval():
    def keeping(pattern):
        return [
            task([region(k, 0.9) for k in range(5)], [region(k) for k in range(5) if pattern(n, k)]) for n in range(40)
        ]

    together, apart = keeping(lambda n, k: n % 5 > 0), keeping(lambda n, k: (n + k) % 5 > 0)
    wide, narrow = at(together, 0.8), at(apart, 0.8)
    assert wide.share == narrow.share == 0.8
    assert wide.interval[1] - wide.interval[0] > 2 * (narrow.interval[1] - narrow.interval[0])


@pytest.mark.parametrize("p", [0.8, 0.96])
def test_the_interval_holds_the_truth_as_often_as_it_says(p):
    rng, held = np.random.default_rng(5), 0
    for _ in range(150):
        shares = np.clip(rng.beta(20 * p, 20 * (1 - p), 60), 0, 1)  # images differ
        sums = {"boxes": 0, "kept": 0, "images": 0, "kept_kept": 0, "kept_boxes": 0, "boxes_boxes": 0,
                "whole": 0, "untouched": 0}  # fmt: skip
        for share in shares:
            boxes = int(rng.integers(1, 9))
            kept = int(rng.binomial(boxes, share))
            for name, value in zip(sums, (boxes, kept, 1, kept**2, kept * boxes, boxes**2), strict=False):
                sums[name] += value
        low, high = measured({"ppal-r1": {f"{t:g}": sums for t in THRESHOLDS}})[0].interval
        held += low <= p <= high
    assert held >= 0.9 * 150
