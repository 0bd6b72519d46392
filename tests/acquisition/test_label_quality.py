"""Disputed annotations: a slow reading of the formulas, and the mistakes people make."""

import numpy as np
import pytest

from ppal_backend.acquisition.label_quality import Compared, disputes_of, sure_from

CAT, DOG = 0, 1
SURE = np.array([0.6, 0.6])


def reference_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inner = width * height
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def reference_sure(images, num_classes):
    agreed = {c: [] for c in range(num_classes)}
    for image in images:
        for box, c in zip(image.boxes, image.classes, strict=True):
            scores = [
                s
                for d, k, s in zip(image.detected, image.detected_classes, image.scores, strict=True)
                if k == c and reference_iou(box, d) >= 0.5
            ]
            if scores:
                agreed[int(c)].append(max(scores))
    return [sum(v) / len(v) if v else float("inf") for v in agreed.values()]


def reference_disputes(image, sure):
    """Detection by detection, the most confident first, in plain loops."""
    by_box, missing = {}, []

    def about(kind, a, d, score):
        if a not in by_box or score < by_box[a][1]:
            by_box[a] = (kind, score, a, d)

    people = list(enumerate(zip(image.boxes, image.classes, strict=True)))
    machine = list(enumerate(zip(image.detected, image.detected_classes, image.scores, strict=True)))
    backing = {a: [s for _, (d, k, s) in machine if k == c and reference_iou(box, d) >= 0.5] for a, (box, c) in people}
    settled = {
        a: any(k == c and s >= sure[k] / 2 and reference_iou(box, d) >= 0.5 for _, (d, k, s) in machine)
        for a, (box, c) in people
    }
    for row, (d, k, p) in sorted(machine, key=lambda item: (-item[1][2], item[0])):
        over = {a: reference_iou(box, d) for a, (box, _) in people}
        same = [a for a, (_, c) in people if c == k]
        if p < sure[k] / 2 or any(over[a] >= 0.5 for a in same):
            continue
        others = [a for a, (_, c) in people if c != k and over[a] >= 0.5]
        touched = [a for a in same if over[a] >= 0.1 and not settled[a]]
        if others:
            a = max(others, key=over.get)
            if p >= sure[k] and all(s < p for s in backing[a]):
                about("swapped", a, row, 1 - p * over[a])
        elif touched:
            a = max(touched, key=over.get)
            about("badly located", a, row, 1 - p * (1 - over[a]))
        elif p >= sure[k] and all(reference_iou(d, image.detected[e]) < 0.5 for *_, e in missing):
            nearest = max((over[a] for a in same), default=0.0)
            missing.append(("overlooked", 1 - p * (1 - nearest), None, row))
    return sorted([*by_box.values(), *missing], key=lambda found: found[1])


def image_of(people=(), machine=()):
    """From ``(box, class)`` and ``(box, class, confidence)``."""
    return Compared(
        np.array([box for box, _ in people], float).reshape(-1, 4),
        np.array([c for _, c in people], int),
        np.array([box for box, *_ in machine], float).reshape(-1, 4),
        np.array([c for _, c, _ in machine], int),
        np.array([p for *_, p in machine], float),
    )


def scene(seed, classes=3):
    """Boxes on a coarse grid, so that they meet often; detections near them, elsewhere, and of other classes."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 5, (count, 2)) * 8.0 + rng.uniform(-3, 3, (count, 2))
        return np.concatenate([corner, corner + rng.uniform(10, 22, (count, 2))], axis=1)

    n, m = rng.integers(0, 6), rng.integers(0, 8)
    people, near = boxes(n), rng.integers(0, max(n, 1), m)
    machine = boxes(m)
    if n:
        copied = rng.random(m) < 0.6
        machine[copied] = people[near[copied]] + rng.uniform(-5, 5, (int(copied.sum()), 4))
    return Compared(people, rng.integers(0, classes, n), machine, rng.integers(0, classes, m), rng.random(m))


def as_rows(disputes):
    return [(d.kind, d.score, d.annotated, d.detected) for d in disputes]


def test_thresholds_are_those_of_the_slow_reading():
    images = [scene(seed) for seed in range(60)]
    np.testing.assert_allclose(sure_from(images, 4), reference_sure(images, 4))
    assert sure_from(images, 4)[3] == np.inf, "a class that nobody agreed on"
    assert sure_from([], 2).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7])
def test_disputes_are_those_of_the_slow_reading(level):
    sure, kinds = np.array([level, level / 2, level + 0.1]), set()
    for seed in range(400):
        image = scene(seed)
        found, wanted = as_rows(disputes_of(image, sure)), reference_disputes(image, sure)
        assert [(k, a, d) for k, _, a, d in found] == [(k, a, d) for k, _, a, d in wanted], seed
        np.testing.assert_allclose([s for _, s, *_ in found], [s for _, s, *_ in wanted])
        kinds |= {k for k, *_ in found}
    assert kinds == {"overlooked", "badly located", "swapped"}, "the scenes are too tame"


BOX, ELSEWHERE, SHIFTED = (10, 10, 30, 30), (60, 60, 80, 80), (20, 10, 40, 30)


@pytest.mark.parametrize(
    ("people", "machine", "wanted"),
    [
        ([(BOX, CAT)], [(BOX, CAT, 0.9)], []),
        ([(BOX, CAT)], [(BOX, CAT, 0.9), (ELSEWHERE, CAT, 0.8)], [("overlooked", 0.2, None, 1)]),
        ([], [(BOX, DOG, 1.0)], [("overlooked", 0.0, None, 0)]),
        ([(BOX, CAT)], [(BOX, DOG, 0.9)], [("swapped", 0.1, 0, 0)]),
        ([(BOX, CAT)], [(BOX, DOG, 0.7), (BOX, CAT, 0.8)], []),
        ([(BOX, CAT)], [(SHIFTED, CAT, 0.9)], [("badly located", 1 - 0.9 * (2 / 3), 0, 0)]),
        ([(BOX, CAT)], [(SHIFTED, CAT, 0.9), (BOX, CAT, 0.7)], [("overlooked", 1 - 0.9 * (2 / 3), None, 0)]),
        ([(BOX, CAT)], [], []),
        ([], [], []),
    ],
    ids=["agreed", "a second one", "empty image", "wrong class", "right class is surer", "shifted", "two side by side",
         "nothing seen", "nothing at all"],
)  # fmt: skip
def test_what_people_get_wrong_is_told_apart(people, machine, wanted):
    found = as_rows(disputes_of(image_of(people, machine), SURE))
    assert [(k, a, d) for k, _, a, d in found] == [(k, a, d) for k, _, a, d in wanted]
    assert [s for _, s, *_ in found] == pytest.approx([s for _, s, *_ in wanted])


def test_an_unsure_detection_says_nothing_about_classes_and_missing_boxes_but_half_as_sure_about_places():
    unsure = image_of([(BOX, CAT)], [(BOX, DOG, 0.59), (ELSEWHERE, CAT, 0.59)])
    assert disputes_of(unsure, SURE) == []
    assert [d.kind for d in disputes_of(image_of([(BOX, CAT)], [(SHIFTED, CAT, 0.3)]), SURE)] == ["badly located"]
    assert disputes_of(image_of([(BOX, CAT)], [(SHIFTED, CAT, 0.29)]), SURE) == []


def test_a_class_without_agreement_disputes_nothing():
    image = image_of([(BOX, CAT)], [(ELSEWHERE, CAT, 1.0), (BOX, DOG, 1.0)])
    assert disputes_of(image, sure_from([image], 2)) == []


def test_one_missing_object_is_told_once_however_many_classes_see_it():
    found = disputes_of(image_of([], [(BOX, CAT, 0.8), (BOX, DOG, 0.9)]), SURE)
    assert [(d.kind, d.detected) for d in found] == [("overlooked", 1)]
