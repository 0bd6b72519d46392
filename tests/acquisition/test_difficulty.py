"""Difficulty (Eq. 1 to 4) against scalar loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppal_backend.acquisition.difficulty import DifficultyEMA, difficulty_coefficients, training_difficulty
from tests.reference import difficulty as reference

unit = st.floats(0, 1)
steps = st.lists(st.lists(st.tuples(st.integers(0, 3), unit), max_size=6), max_size=12)


@given(st.lists(st.tuples(unit, unit), max_size=8), unit)
def test_training_difficulty_is_eq_1(pairs, xi):
    p, iou = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    wanted = [reference.q(a, b, xi) for a, b in pairs]
    np.testing.assert_allclose(training_difficulty(p, iou, xi), wanted, atol=1e-12)


def test_difficulty_of_a_perfect_and_of_a_missed_prediction():
    np.testing.assert_array_equal(training_difficulty(np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0])), [0, 1, 1])


def test_kind_in_is_kind_out():
    assert isinstance(training_difficulty(np.ones(2), np.ones(2)), np.ndarray)
    assert isinstance(training_difficulty(torch.ones(2), torch.ones(2)), torch.Tensor)
    assert isinstance(difficulty_coefficients(np.ones(2)), np.ndarray)
    assert isinstance(difficulty_coefficients(torch.ones(2)), torch.Tensor)


@given(steps, st.floats(0, 1), st.sampled_from(["keep", "drift"]))
def test_ema_is_eq_2_and_3(history, m0, absent):
    ema = DifficultyEMA(4, m0, absent)
    for step in history:
        ema.update(np.array([c for c, _ in step], dtype=np.int64), np.array([v for _, v in step]))
    d, m = reference.ema(history, 4, m0, absent)
    np.testing.assert_allclose(ema.difficulty, d, atol=1e-10)
    np.testing.assert_allclose(ema.momentum, m, atol=1e-10)


def test_absent_class_keeps_its_difficulty_and_weighs_more_next_time():
    ema = DifficultyEMA(2, 0.9)
    ema.update(torch.tensor([0, 1]), torch.tensor([0.2, 0.4]))
    kept = float(ema.difficulty[1])
    for _ in range(5):
        ema.update(torch.tensor([0]), torch.tensor([0.2]))
    assert float(ema.difficulty[1]) == kept
    assert float(ema.momentum[1]) == pytest.approx(0.9**6)
    drifting = DifficultyEMA(2, 0.9, absent="drift")
    drifting.update(torch.tensor([0, 1]), torch.tensor([0.2, 0.4]))
    drifting.update(torch.tensor([0]), torch.tensor([0.2]))
    assert float(drifting.difficulty[1]) > kept


def test_drift_takes_a_class_that_was_always_missed_for_absent():
    """The authors' test is ``mean quality > 0``: with every box missed the momentum goes on falling."""
    ema = DifficultyEMA(2, 0.9, absent="drift")
    ema.update(torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 0.5]))
    np.testing.assert_allclose(ema.momentum, [0.81, 0.9])
    kept = DifficultyEMA(2, 0.9)
    kept.update(torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 0.5]))
    np.testing.assert_allclose(kept.momentum, [0.9, 0.9])


def test_sums_of_two_processes_equal_one_step():
    together, split = DifficultyEMA(3), DifficultyEMA(3)
    classes, q = np.array([0, 1, 1, 0]), np.array([0.1, 0.5, 0.9, 0.3])
    together.update(classes, q)
    a, b = split.sums_and_counts(classes[:2], q[:2]), split.sums_and_counts(classes[2:], q[2:])
    split.update_from_sums(a[0] + b[0], a[1] + b[1])
    np.testing.assert_allclose(split.difficulty, together.difficulty)


def test_state_survives_a_restart_and_is_a_copy():
    ema = DifficultyEMA(3, 0.8)
    ema.update(np.array([0, 2]), np.array([0.3, 0.6]))
    state = ema.state_dict()
    before = state["difficulty"].clone()
    ema.update(np.array([0]), np.array([0.0]))
    torch.testing.assert_close(state["difficulty"], before)
    again = DifficultyEMA(3, 0.8)
    again.load_state_dict(state)
    again.update(np.array([0]), np.array([0.0]))
    torch.testing.assert_close(again.difficulty, ema.difficulty)
    torch.testing.assert_close(again.momentum, ema.momentum)
    with pytest.raises(ValueError, match=r"expected difficulty with shape \(2,\), got \(3,\)"):
        DifficultyEMA(2).load_state_dict(state)


@given(st.lists(unit, min_size=1, max_size=6), st.floats(0.05, 3), st.floats(0, 2))
def test_coefficients_are_eq_4_and_monotone(values, alpha, beta):
    values = sorted(values)
    weights = difficulty_coefficients(np.array(values), alpha, beta)
    np.testing.assert_allclose(weights, [reference.coefficient(d, alpha, beta) for d in values], atol=1e-9)
    assert np.all(np.diff(weights) >= 0)
    assert weights.min() >= 1 and weights.max() <= 1 + beta


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_coefficients_are_exact_at_the_ends(dtype):
    assert difficulty_coefficients(np.array([0, 1], dtype=dtype), 0.3, 0.2).tolist() == pytest.approx(
        [1.0, 1.2], abs=1e-7
    )
    ends = difficulty_coefficients(np.array([0.0, 1.0]), 0.3, 0.2)
    assert ends[0] == 1.0 and ends[1] == 1.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training_difficulty(np.ones(2), np.ones(3)), r"one shape, got \(2,\) and \(3,\)"),
        (lambda: training_difficulty(np.array([np.nan]), np.ones(1)), "finite p"),
        (lambda: training_difficulty(np.array([1.5]), np.ones(1)), r"p in \[0.0, 1.0\]"),
        (lambda: training_difficulty(np.ones(1), np.ones(1), xi=2), "xi"),
        (lambda: difficulty_coefficients(np.array([1.2])), "difficulty in"),
        (lambda: difficulty_coefficients(np.ones(1), alpha=0), "alpha > 0"),
        (lambda: DifficultyEMA(0), "num_classes >= 1"),
        (lambda: DifficultyEMA(2, absent="forget"), "absent"),
        (lambda: DifficultyEMA(2, momentum=1.5), "momentum"),
        (lambda: DifficultyEMA(2).update(np.array([2]), np.array([0.5])), r"class_indices in 0..1, got 2..2"),
        (lambda: DifficultyEMA(2).update(np.array([0, 1]), np.array([0.5])), r"\(2,\) and \(1,\)"),
        (lambda: DifficultyEMA(2).update(np.array([0]), np.array([np.inf])), "finite q"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_nan_changes_nothing():
    ema = DifficultyEMA(2)
    with pytest.raises(ValueError, match="finite q"):
        ema.update(np.array([0, 1]), np.array([0.5, np.nan]))
    assert ema.difficulty.tolist() == [1.0, 1.0]
