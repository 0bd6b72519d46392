"""What a detector gets right and wrong on the evaluation set: matched as pycocotools matches, told box by box."""

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage, result_row
from ppal_backend.rounds.model_errors import judge

LABELS = ("cat", "dog", "emu")


def dataset(boxes, images=1, labels=LABELS):
    """``boxes`` are image, class index and x, y, width, height."""
    rows = [CocoAnnotation(n, i, c + 1, tuple(map(float, box))) for n, (i, c, box) in enumerate(boxes, start=1)]
    return CocoDataset(
        [CocoImage(i, f"/images/{i}.jpg", 300, 300) for i in range(1, images + 1)],
        rows,
        [CocoCategory(n, label) for n, label in enumerate(labels, start=1)],
    )


def predicted(boxes, images=1):
    """``boxes`` are image, class index, score and x, y, width, height."""
    found = {i: [] for i in range(1, images + 1)}
    for image, c, score, box in boxes:
        found[image].append((box, score, c))
    return {i: as_arrays(rows) for i, rows in found.items()}


def as_arrays(rows):
    boxes, scores, classes = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(classes, int)


def told(judgement):
    return [(item.kind, item.why, item.detected, item.labelled, item.score) for item in judgement.items]


def test_each_kind_of_mistake_is_told():
    truth = dataset(
        [(1, 0, (0, 0, 10, 10)), (1, 1, (50, 50, 20, 20)), (1, 2, (100, 100, 40, 40)), (1, 0, (200, 0, 9, 9))]
    )
    found = predicted(
        [
            (1, 0, 0.9, (0, 0, 10, 9)),
            (1, 0, 0.8, (0, 0, 10, 8)),
            (1, 0, 0.7, (50, 50, 20, 20)),
            (1, 2, 0.6, (120, 120, 40, 40)),
            (1, 1, 0.5, (250, 250, 30, 30)),
            (1, 1, 0.2, (50, 50, 20, 20)),
        ]
    )
    judged = judge(truth, found, LABELS, [0.3] * 3)
    assert told(judged) == [
        ("right", "", 0, 0, 0.9),
        ("wrong", "found already", 0, None, 0.8),
        ("wrong", "another label", 0, 1, 0.7),
        ("wrong", "out of place", 2, None, 0.6),
        ("wrong", "nothing there", 1, None, 0.5),
        ("missed", "", None, 2, None),
        ("missed", "", None, 0, None),
    ]
    assert (judged.weaker, judged.unseen, judged.other, judged.missed) == (1, 0, 0, 3)
    assert judged.confusion(3).tolist() == [[1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 1, 0]]
    assert judged.items[-2].box_xyxy == (100, 100, 140, 140) and judged.items[-2].annotated == 2


def test_a_detection_counts_from_the_score_of_its_class_on():
    truth = dataset([(1, 0, (0, 0, 10, 10)), (1, 1, (50, 50, 20, 20))])
    found = predicted([(1, 0, 0.5, (0, 0, 10, 10)), (1, 1, 0.5, (50, 50, 20, 20))])
    assert told(judge(truth, found, LABELS, [0.5, 0.51, 0.5])) == [
        ("right", "", 0, 0, 0.5),
        ("missed", "", None, 1, None),
    ]


def test_the_size_is_that_of_the_annotated_box_where_there_is_one():
    truth = dataset([(1, 0, (0, 0, 32, 32)), (1, 1, (100, 100, 96, 96)), (1, 1, (250, 250, 9, 9))])
    found = predicted([(1, 0, 0.9, (0, 0, 31, 31)), (1, 2, 0.8, (0, 200, 31, 33))])
    assert [i.size for i in judge(truth, found, LABELS, [0.0] * 3).items] == ["medium", "small", "large", "small"]


def test_what_is_left_out_is_counted():
    truth = dataset([(1, 0, (0, 0, 10, 10)), (2, 0, (0, 0, 10, 10)), (2, 2, (0, 0, 10, 10))], images=2)
    judged = judge(truth, {2: as_arrays([])}, ("cat", "dog"), [0.3, 0.3])
    assert (judged.unseen, judged.other) == (1, 1)
    assert told(judged) == [("missed", "", None, 0, None)]


@pytest.mark.parametrize("seed", range(8))
def test_right_wrong_and_missed_are_those_of_coco_s_evaluation(seed):
    rng = np.random.default_rng(seed)
    boxes, found = [], []
    for image in range(1, 31):
        for _ in range(rng.integers(0, 7)):
            c, box = int(rng.integers(3)), (*rng.uniform(0, 200, 2), *rng.uniform(10, 90, 2))
            boxes.append((image, c, box))
            for _ in range(rng.integers(0, 4)):
                other = c if rng.random() < 0.7 else int(rng.integers(3))
                found.append((image, other, float(rng.random()), tuple(np.array(box) + rng.normal(0, 6, 4))))
    found = [(i, c, s, (x, y, max(w, 1.0), max(h, 1.0))) for i, c, s, (x, y, w, h) in found]
    least = 0.3
    judged = judge(dataset(boxes, 30), predicted(found, 30), LABELS, [least] * 3)
    truth, results = COCO(), COCO()
    for index, rows in ((truth, [(i, c, 1.0, b) for i, c, b in boxes]), (results, [r for r in found if r[2] >= least])):
        index.dataset = {
            "images": [{"id": i} for i in range(1, 31)],
            "categories": [{"id": c} for c in (1, 2, 3)],
            "annotations": [
                {**result_row(i, np.array(b), s, c), "id": n} for n, (i, c, s, b) in enumerate(rows, start=1)
            ],
        }
        index.createIndex()
    evaluator = COCOeval(truth, results, "bbox")
    evaluator.evaluate()
    all_areas = [e for e in evaluator.evalImgs if e is not None and e["aRng"] == evaluator.params.areaRng[0]]
    right = sum(int((e["dtMatches"][0] > 0).sum()) for e in all_areas)
    wrong = sum(int((e["dtMatches"][0] == 0).sum()) for e in all_areas)
    missed = sum(int((e["gtMatches"][0] == 0).sum()) for e in all_areas)
    assert (judged.count("right"), judged.count("wrong"), judged.missed) == (right, wrong, missed)
    assert min(right, wrong, missed) > 10, "all kinds are in it"
    assert judged.confusion(3)[:, :3].sum() == len(boxes)
