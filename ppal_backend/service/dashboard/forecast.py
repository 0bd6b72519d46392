"""Does more labeling pay? A power law through the rounds so far, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_POINTS = 4
LEAST_SCATTER = 0.005
COVERED = 0.8
WIDENED = 1.75
HORIZON = 2
"""On the simulator's curves the interval of the curves held what came in 60 % of cases one round on, and in 44 % two
rounds on: learning is no exact power law. Widened it holds about 80 %. Nobody has tried it further ahead."""
_EXPONENTS = np.geomspace(0.05, 2.0, 40)
_DRAWS = 4000


@dataclass(frozen=True)
class Range:
    """A value in [0, 1] and the interval that holds ``COVERED`` of the curves."""

    low: float
    middle: float
    high: float

    def widened(self) -> Range:
        """As wide as forecasts have to be that hold what they promise (see ``WIDENED``)."""
        low, high = (self.middle + WIDENED * (end - self.middle) for end in (self.low, self.high))
        return Range(max(-1.0, low), self.middle, min(1.0, high))


class Forecast:
    """mAP as a - b * n^(-c) of the number n of labelled images, with 0 <= b and 0 <= a <= 1.

    Every curve counts by how well it explains the points: for each c of a grid the line through (n^(-c), mAP) with its
    usual uncertainty, weighted by its marginal likelihood. The prior is flat in the curve's values at the first and the
    last round, and in the logarithm of the scatter.
    Scatter below ``LEAST_SCATTER`` is taken as luck: trainings on the same data differ by as much. The same points
    give the same forecast.

    Args:
        images: ``[k]`` labelled images of each round, k >= ``FEWEST_POINTS``, at least as many different ones, > 0.
        values: ``[k]`` mAP in [0, 1].

    Raises:
        ValueError: There are too few points.

    Source: own; the power law is the usual one for error against training set size (Hestness et al., 2017).
    """

    def __init__(self, images: Sequence[float], values: Sequence[float]) -> None:
        if not can_forecast(images):
            raise ValueError(f"expected at least {FEWEST_POINTS} different numbers of images, got {len(set(images))}")
        n, y = np.asarray(images, float), np.asarray(values, float)
        self._scale = float(n.mean())  # n in units of about 1, for well-conditioned lines
        fits = [_line((n / self._scale) ** -c, y) for c in _EXPONENTS]
        weights = np.exp(np.array([f.log_evidence for f in fits]) - max(f.log_evidence for f in fits))
        rng = np.random.default_rng(0)
        chosen = rng.choice(len(fits), _DRAWS, p=weights / weights.sum())
        curves = np.concatenate([fits[i].draw(rng, int((chosen == i).sum())) for i in range(len(fits))])
        exponents = np.repeat(_EXPONENTS, [int((chosen == i).sum()) for i in range(len(fits))])
        possible = (curves[:, 1] <= 0) & (curves[:, 0] <= 1) & (curves[:, 0] >= 0)
        self._curves, self._exponents = curves[possible], exponents[possible]

    @property
    def is_growing(self) -> bool:
        """Whether enough curves with growing mAP fit the points to tell anything."""
        return len(self._curves) >= _DRAWS // 20

    def at(self, images: float) -> Range:
        """mAP to be expected with so many labelled images."""
        return _range(self._of(images))

    def gain(self, images: float, more: float) -> Range:
        """What mAP is expected to grow by when ``more`` images are labelled on top of ``images``."""
        return _range(self._of(images + more) - self._of(images))

    def _of(self, images: float) -> np.ndarray:
        return self._curves[:, 0] + self._curves[:, 1] * (images / self._scale) ** -self._exponents


def can_forecast(images: Sequence[float]) -> bool:
    """Whether there are points enough for a curve with three unknowns and some idea of the scatter."""
    return len(set(images)) >= FEWEST_POINTS and min(images) > 0


@dataclass(frozen=True)
class _Fit:
    """A line through the points, ``[2]`` intercept and slope, as a distribution."""

    coefficients: np.ndarray
    factor: np.ndarray  # [2, 2], times its transpose the covariance of the coefficients
    freedom: int
    log_evidence: float

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        normal = rng.standard_normal((count, 2)) @ self.factor.T
        return self.coefficients + normal / np.sqrt(rng.chisquare(self.freedom, (count, 1)) / self.freedom)


def _line(x: np.ndarray, y: np.ndarray) -> _Fit:
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    freedom = len(y) - 2
    residual = y - design @ coefficients
    squares = max(float(residual @ residual), freedom * LEAST_SCATTER**2)
    evidence = 0.5 * np.linalg.slogdet(inverse)[1] - 0.5 * freedom * np.log(squares) + np.log(np.ptp(x))
    return _Fit(coefficients, np.linalg.cholesky(inverse * squares / freedom), freedom, float(evidence))


def _range(values: np.ndarray) -> Range:
    low, middle, high = np.quantile(values, [(1 - COVERED) / 2, 0.5, (1 + COVERED) / 2])
    return Range(float(low), float(middle), float(high))
