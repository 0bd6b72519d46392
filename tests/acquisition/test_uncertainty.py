"""Uncertainty of boxes and images (Eq. 5) against loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppal_backend.acquisition.uncertainty import BoxFilter, box_uncertainty, contributions, image_uncertainty
from tests.acquisition.pools import image, random_image
from tests.reference import difficulty as reference


@given(st.integers(0, 10_000), st.sampled_from(["entropy", "posterior", "margin"]))
def test_softmax_image_is_eq_5(seed, measure):
    rng = np.random.default_rng(seed)
    d = random_image(rng, 1, 4, 9)
    w = rng.uniform(1, 1.2, 4)
    wanted = sum(
        w[c] * reference.uncertainty(measure, row)
        for c, s, row in zip(d.class_indices, d.scores, d.class_probs.astype(float), strict=True)
        if s >= np.float32(0.05)
    )
    assert image_uncertainty(d, w, measure) == pytest.approx(wanted, abs=1e-9)


@given(st.lists(st.floats(0.0625, 1, width=32), max_size=6))
def test_one_stage_image_uses_binary_entropy_of_the_score(scores):
    d = image(1, scores, [0] * len(scores))
    exact = [float(np.float32(s)) for s in scores]
    assert image_uncertainty(d, None) == pytest.approx(sum(reference.entropy([s, 1 - s]) for s in exact), abs=1e-9)
    assert image_uncertainty(d, None, "posterior") == pytest.approx(sum(1 - s for s in exact), abs=1e-9)
    assert image_uncertainty(d, None, "margin") == pytest.approx(sum(1 - abs(2 * s - 1) for s in exact), abs=1e-9)


def test_sigmoid_probabilities_do_not_replace_the_final_score():
    """FCOS and its like multiply class score and centerness: the final score feeds the entropy."""
    d = image(1, [0.5], [0], class_probs=np.array([[0.9, 0.8]], np.float32), softmax=False)
    assert image_uncertainty(d, None) == pytest.approx(math.log(2))


def test_aggregates():
    d = image(1, [0.5, 0.9], [0, 0])
    a, b = box_uncertainty(d).tolist()
    assert image_uncertainty(d, None, aggregate="sum") == pytest.approx(a + b)
    assert image_uncertainty(d, None, aggregate="mean") == pytest.approx((a + b) / 2)
    assert image_uncertainty(d, None, aggregate="max") == pytest.approx(a)


def test_image_without_detections_is_zero_in_every_way():
    d = image(1, [], [])
    for measure in ("entropy", "posterior", "margin"):
        for aggregate in ("sum", "mean", "max"):
            assert image_uncertainty(d, None, measure, aggregate=aggregate) == 0.0


def test_threshold_counts_equal_scores():
    d = image(1, [0.05, 0.049], [0, 0])
    assert contributions(d, None, boxes=BoxFilter(0.05)).rows.tolist() == [0]


def test_at_most_a_hundred_best_boxes_count():
    scores = np.linspace(0.1, 0.9, 120)
    rows = BoxFilter().valid_rows(image(1, scores, [0] * 120)).tolist()
    assert rows == list(range(20, 120))
    assert BoxFilter(max_detections=2).valid_rows(image(1, [0.5, 0.5, 0.5], [0] * 3)).tolist() == [0, 1]


def authors_keep(box, width, height):
    """The rule of the authors' sampler, on a box as x, y, w, h."""
    x, y, w, h = box
    if x > width or y > height:
        return False
    w, h = min(width, x + w) - x, min(height, y + h) - y
    return math.sqrt(w * h) > 16 and w / (h + 1e-10) < 5.0 and h / (w + 1e-10) < 5.0


def test_reference_filter_drops_small_and_long_boxes():
    boxes = [[0, 0, 16, 16], [0, 0, 17, 17], [0, 0, 101, 20], [0, 0, 100, 20], [0, 0, 0, 0], [7, 3, 27, 103]]
    d = image(1, [0.5] * 6, [0] * 6, boxes=boxes)
    assert BoxFilter().valid_rows(d).tolist() == [0, 1, 2, 3, 4, 5]
    assert BoxFilter.reference().valid_rows(d).tolist() == [1, 3, 5], "an aspect of exactly 5 stays"


@given(st.lists(st.tuples(*[st.integers(0, 130)] * 2, *[st.integers(1, 200)] * 2), max_size=8))
def test_reference_filter_is_the_authors(found):
    """Sizes and aspects are those of the box inside its image."""
    boxes = [[x, y, x + w, y + h] for x, y, w, h in found]
    d = image(1, [0.5] * len(found), [0] * len(found), boxes=boxes, image_size=(120, 90))
    wanted = [k for k, box in enumerate(found) if authors_keep(box, 120, 90)]
    assert BoxFilter.reference().valid_rows(d).tolist() == wanted
    assert BoxFilter.reference().shaped(d).boxes_xyxy.tolist() == d.boxes_xyxy[wanted].tolist()


def test_reference_filter_keeps_the_two_hundred_best():
    d = image(1, np.linspace(0.1, 0.9, 230), [0] * 230)
    assert BoxFilter.reference().valid_rows(d).tolist() == list(range(30, 230))


def test_weights_pick_the_predicted_class():
    d = image(1, [0.5, 0.5], [0, 2])
    assert image_uncertainty(d, np.array([1.0, 50.0, 3.0])) == pytest.approx(4 * math.log(2))


def test_tensors_give_the_same_value():
    d = random_image(np.random.default_rng(3), 1, 4, 9, least=5)
    assert image_uncertainty(d.to("cpu"), np.ones(4)) == pytest.approx(image_uncertainty(d, np.ones(4)), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: image_uncertainty(d, None, "surprise"), "measure"),
        (lambda d: image_uncertainty(d, None, aggregate="median"), "aggregate"),
        (lambda d: image_uncertainty(d, np.ones((2, 2))), r"shape \(C,\), got \(2, 2\)"),
        (lambda d: image_uncertainty(d, np.ones(1)), r"class indices up to 2, got \(1,\)"),
        (lambda d: image_uncertainty(d, np.array([1, np.nan, 1])), "finite coefficients"),
        (lambda d: image_uncertainty(d, np.array([1, -1.0, 1])), "coefficients >= 0"),
        (lambda d: image_uncertainty(d, None, score_threshold=1.5), "score_threshold"),
        (lambda d: BoxFilter(max_detections=0), "max_detections"),
        (lambda d: BoxFilter(max_aspect=0.5), "max_aspect"),
        (lambda d: BoxFilter(min_size_px=-1), "min_size_px"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(image(1, [0.5, 0.6], [0, 2]))
