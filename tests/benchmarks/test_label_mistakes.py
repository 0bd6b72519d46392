"""Thresholds by class, which the benchmark of planted mistakes compares with the one that people set."""

from benchmarks.label_mistakes import NEVER, Threshold, thresholds_of
from ppal_backend.rounds.model_errors import Judged, Judgement


def detected(c, *right_by_score):
    return [Judged(1, "right" if right else "wrong", (0, 0, 9, 9), 81, c, None, s) for s, right in right_by_score]


def test_the_threshold_of_a_class_is_the_lowest_score_from_which_half_of_its_boxes_are_right():
    scores = [0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35]
    good = detected(0, *((s, True) for s in scores))
    early = detected(1, *zip(scores, [True, False, True, True] + [False] * 6, strict=True))
    bad = detected(2, *((s, False) for s in scores))
    few = detected(3, *((s, False) for s in scores[:9]))
    missed = [Judged(1, "missed", (0, 0, 9, 9), 81, None, 0)]
    found = thresholds_of(Judgement([*good, *early, *bad, *few, *missed]), ("a", "b", "c", "d"), 0.3)
    assert found == {
        "a": Threshold(0.3, 10, 10, 10),
        "b": Threshold(0.55, 3, 6, 10),
        "c": Threshold(NEVER, 0, 0, 10),
    }
