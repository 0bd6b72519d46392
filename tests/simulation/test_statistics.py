"""Figures against values worked out by hand."""

import itertools

import numpy as np
import pytest

from ppal_backend.simulation.statistics import (
    area_between,
    area_under_curve,
    first_reached,
    label_savings,
    mean_std,
    permutation_test,
    spearman,
)


def test_area_is_the_mean_height_over_the_range():
    assert area_under_curve([10, 20, 40], [0.0, 1.0, 1.0]) == pytest.approx((5 + 20) / 30)
    assert area_under_curve([3], [0.4]) == 0.4
    assert area_under_curve([3, 3], [0.2, 0.4]) == pytest.approx(0.3)


def test_area_between_uses_the_common_range():
    assert area_between([0, 10], [0.0, 1.0], 0, 5) == pytest.approx(0.25)
    assert area_between([0, 10], [0.0, 1.0], 10, 20) == pytest.approx(1.0), "flat beyond the end"


@pytest.mark.parametrize(("level", "where"), [(0.0, 10.0), (0.5, 15.0), (1.0, 20.0), (1.1, None)])
def test_first_reached_is_linear_between_rounds(level, where):
    assert first_reached([10, 20, 30], [0.0, 1.0, 0.5], level) == where


def test_label_savings_are_the_shares_not_needed():
    baseline = ([10, 20, 30, 40], [0.1, 0.2, 0.3, 0.4])
    saved = label_savings([10, 20, 30, 40], [0.1, 0.4, 0.5, 0.6], *baseline)
    assert saved == pytest.approx([0, 1 - (10 + 10 / 3) / 20, 1 - (10 + 20 / 3) / 30, 0.5])
    assert label_savings(*baseline, *baseline) == pytest.approx([0, 0, 0, 0])
    assert label_savings([10, 20], [0.1, 0.2], *baseline) == [0, 0, None, None]


def test_a_baseline_that_dips_saves_nothing_against_itself():
    baseline = ([10, 20, 30, 40], [0.1, 0.2, 0.4, 0.3])
    assert label_savings(*baseline, *baseline) == [0, 0, 0, 0], "it is at its last mAP with 25 labels, not with 40"
    assert label_savings([10, 20, 30], [0.1, 0.3, 0.4], *baseline)[-1] == pytest.approx(1 - 20 / 25)


def slow_permutation(values):
    signs = itertools.product((-1, 1), repeat=len(values))
    observed = abs(sum(values)) - 1e-9
    sums = [abs(sum(s * v for s, v in zip(row, values, strict=True))) for row in signs]
    return sum(total >= observed for total in sums) / len(sums)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 15, 16])
def test_permutation_test_is_exact_for_few_pairs(count):
    values = np.random.default_rng(count).normal(0.3, 1, count)
    assert permutation_test(values) == pytest.approx(slow_permutation(list(values)))


def test_permutation_test_on_clear_and_on_no_differences():
    assert permutation_test(np.full(15, 0.1)) == pytest.approx(2 / 2**15)
    assert permutation_test([0.0, 0.0]) == 1.0
    assert permutation_test([1.0, np.nan, 1.0]) == 0.5, "missing rounds are left out"
    assert permutation_test([]) is None
    many = permutation_test(np.random.default_rng(0).normal(0.0, 1, 60))
    assert 0.05 < many <= 1.0
    assert permutation_test(np.full(60, 0.1)) == pytest.approx(1 / 100_001)


def test_mean_and_deviation_over_what_is_there():
    mean, spread = mean_std([1.0, 3.0, np.nan])
    assert (mean, spread) == (2.0, pytest.approx(np.sqrt(2)))
    assert mean_std([2.0]) == (2.0, 0.0) and mean_std([np.nan]) is None


def test_curves_that_are_none_are_refused():
    for x, y in (([], []), ([1, 2], [1]), ([2, 1], [0, 0]), ([1, 2], [0, np.nan])):
        with pytest.raises(ValueError, match="expected"):
            area_under_curve(x, y)


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert spearman([1, 2], [1, 2]) is None and spearman([1, 1, 1], [1, 2, 3]) is None
