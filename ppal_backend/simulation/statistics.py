"""Figures that compare strategies: area under a curve, label saving, a paired permutation test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_EXACT_UP_TO = 20
_DRAWS = 100_000
_GRID = 201


def area_under_curve(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Mean height of a curve: its trapezoid area over the width of its range.

    Args:
        x: Rising positions (labelled images).
        y: Heights (mAP).

    Returns:
        The mean height; for a single point, or a range of width 0, the mean of ``y``.

    Raises:
        ValueError: Lengths differ, there is no point, or ``x`` falls.
    """
    a, b = _curve(x, y)
    width = a[-1] - a[0]
    return float(np.trapezoid(b, a) / width) if width > 0 else float(b.mean())


def area_between(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, low: float, high: float) -> float:
    """Mean height of a curve over ``[low, high]``, linear between its points and flat beyond its ends."""
    a, b = _curve(x, y)
    grid = np.linspace(low, high, _GRID)
    return area_under_curve(grid, np.interp(grid, a, b))


def first_reached(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float) -> float | None:
    """The first position at which a curve, linear between its points, is at ``level`` or above; None if never."""
    a, b = _curve(x, y)
    if b[0] >= level:
        return float(a[0])
    for k in range(1, len(a)):
        if b[k] >= level:
            share = (level - b[k - 1]) / (b[k] - b[k - 1])
            return float(a[k - 1] + share * (a[k] - a[k - 1]))
    return None


def label_saving(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    baseline_x: Sequence[float] | np.ndarray,
    baseline_y: Sequence[float] | np.ndarray,
) -> float | None:
    """Share of the baseline's labels that a strategy does without.

    Args:
        x: Labels of the strategy.
        y: Its mAP.
        baseline_x: Labels of the baseline.
        baseline_y: Its mAP.

    Returns:
        1 - n / N, where N is what the baseline used in all and n where the strategy first reaches the baseline's
        last mAP; None if it never does.
    """
    used, level = float(np.asarray(baseline_x)[-1]), float(np.asarray(baseline_y)[-1])
    reached = first_reached(x, y, level)
    return None if reached is None else 1.0 - reached / used


def permutation_test(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float | None:
    """Two-sided paired permutation test: how often random signs give a mean as far from 0 as the one observed.

    Exact for up to 20 differences, else 100,000 draws (the observed signs count as one of them).

    Args:
        differences: Paired differences; those that are NaN are left out.
        seed: Of the draws.

    Returns:
        p in (0, 1]; None without differences.
    """
    values = np.asarray(differences, np.float64).ravel()
    values = values[np.isfinite(values)]
    count = len(values)
    if not count:
        return None
    observed = abs(values.sum()) - 1e-12 * max(1.0, np.abs(values).sum())
    if count <= _EXACT_UP_TO:
        hits = sum(int((np.abs(part @ values) >= observed).sum()) for part in _all_signs(count))
        return hits / 2.0**count
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (_DRAWS, count), dtype=np.int8) * 2 - 1
    hits = int((np.abs(signs @ values) >= observed).sum())
    return (hits + 1) / (_DRAWS + 1)


def mean_std(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 for one value) of what is not NaN; None of nothing."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return None
    return float(kept.mean()), float(kept.std(ddof=1)) if len(kept) > 1 else 0.0


def _all_signs(count: int) -> list[np.ndarray]:
    """All rows of signs, in blocks."""
    block = min(count, 14)
    low = np.array([[1.0 if (k >> bit) & 1 else -1.0 for bit in range(block)] for k in range(1 << block)])
    rest = count - block
    return [
        np.hstack([low, np.tile([1.0 if (k >> bit) & 1 else -1.0 for bit in range(rest)], (len(low), 1))])
        for k in range(1 << rest)
    ]


def _curve(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"expected a curve of at least one point with as many x as y, got {a.shape} and {b.shape}")
    if (np.diff(a) < 0).any():
        raise ValueError(f"expected x that never falls, got {a.tolist()}; sort the points")
    if math.isnan(float(b.sum())):
        raise ValueError("expected heights without NaN; drop unfinished points first")
    return a, b
