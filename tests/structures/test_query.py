"""Contexts, candidates, query sets and the queue."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from ppal_backend.structures import CandidatePool, Detections, Explanation, QueryContext, QuerySet


def one(image_id, cls=0):
    return Detections(
        image_id,
        np.array([[0, 0, 1, 1]], np.float32),
        np.array([0.5], np.float32),
        np.array([cls]),
        np.array([[1.0]], np.float32),
    )


def test_queue_is_query_set_then_candidates_then_tail():
    utilities = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.0, 5: 9.0, 6: 0.0, 7: 0.0}
    answer = QuerySet((2, 1), utilities, (1, 2, 3, 4))
    # 5 has the highest utility but is no candidate: it heads the tail. 99 came later: last. Ties by lowest id.
    assert answer.queue([7, 6, 5, 4, 3, 2, 1, 99]) == (2, 1, 3, 4, 5, 6, 7, 99)


def test_queue_drops_what_left_the_pool():
    answer = QuerySet((2, 1), {1: 1.0, 2: 0.5, 3: 0.1}, (1, 2, 3))
    assert answer.queue([1, 3, 3]) == (1, 3)
    assert answer.queue([]) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QueryContext([one(1), one(1)], 1), "unique image ids in pool"),
        (lambda: QueryContext([one(1)], 1, labelled=[one(1)]), r"disjoint, both hold \[1\]"),
        (lambda: QueryContext([one(1, cls=3)], 3), "class indices below num_classes=3, got 3 for image 1"),
        (lambda: QueryContext([one(1)], 0), "num_classes >= 1"),
        (lambda: QueryContext([one(1)], 2, difficulty=np.ones(3)), r"difficulty with shape \(2,\), got \(3,\)"),
        (lambda: QueryContext([one(1)], 1, difficulty=np.array([np.nan])), "difficulty in"),
        (lambda: QueryContext([one(1)], 1, difficulty=np.array([1.1])), "difficulty in"),
        (lambda: QueryContext([one(1)], 1, class_counts=np.array([-1])), "class_counts in"),
        (lambda: QueryContext([one(1)], 1, image_features={"fpn": np.ones((2, 3))}), r"shape \(1, d\), got \(2, 3\)"),
        (lambda: QueryContext([one(1)], 1, image_features={"fpn": np.full((1, 3), np.nan)}), "finite"),
        (
            lambda: QueryContext([one(1)], 1, labelled=[one(2)], labelled_features={"fpn": np.ones((2, 3))}),
            r"labelled_features\['fpn'\] with shape \(1, d\)",
        ),
        (lambda: CandidatePool((1, 1), {1: 0.0}), "unique"),
        (lambda: CandidatePool((1,), {2: 0.0}), r"utility for every candidate, got none for \[1\]"),
        (lambda: CandidatePool((1,), {1: float("nan")}), "finite utilities"),
        (lambda: QuerySet((1, 1), {1: 0.0}, (1,)), "unique"),
        (lambda: QuerySet((2,), {1: 0.0}, (1,)), r"among the candidates, got \[2\]"),
        (lambda: QuerySet((1,), {1: 0.0}, (1,), {2: Explanation(2, 0, 0.0, 0)}), "chosen images only"),
        (lambda: Explanation(1, -1, 0.0, 0), "ranks >= 0"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        CandidatePool((), {}).image_ids = (1,)
