"""The table of classes; its weights are those that rank the pool."""

from ppal_backend.service.dashboard.learning import class_rows


def test_hard_and_rare_classes_are_named_and_the_hardest_come_first():
    rows = class_rows(
        ["cat", "dog", "owl", "yak"],
        [0.3, 0.3, 0.6, 0.2],
        {"cat": 0.5, "owl": 0.1},
        {"cat": 100, "dog": 120, "owl": 90, "yak": 18},
        {"cat": 1.13, "owl": 1.17},
    )
    assert [(r.label, r.is_hard, r.is_rare) for r in rows] == [
        ("owl", True, False), ("cat", False, False), ("dog", False, False), ("yak", False, True)]  # fmt: skip
    assert rows[0].ap == 0.1 and rows[2].ap is None and rows[0].weight == 1.17 and rows[2].weight is None


def test_a_class_without_boxes_is_rare_and_few_boxes_are_however_few_others_have():
    rows = class_rows(["a", "b"], None, {}, {"a": 9}, None)
    assert [(r.label, r.boxes, r.is_rare) for r in rows] == [("a", 9, True), ("b", 0, True)]


def test_what_was_not_measured_stays_unknown():
    (row,) = class_rows(["a"], None, {}, None, None)
    assert (row.ap, row.difficulty, row.weight, row.boxes) == (None,) * 4 and not row.is_hard and not row.is_rare
