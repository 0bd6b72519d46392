"""Eq. 1 to 5 as scalar loops."""

from __future__ import annotations

import math
from collections.abc import Sequence


def q(p: float, iou: float, xi: float) -> float:
    return 1.0 - p**xi * iou ** (1.0 - xi)


def ema(steps: Sequence[Sequence[tuple[int, float]]], classes: int, m0: float, absent: str) -> tuple[list, list]:
    d, m = [1.0] * classes, [m0] * classes
    for step in steps:
        for i in range(classes):
            mine = [value for c, value in step if c == i]
            if mine:
                d[i] = m[i] * d[i] + (1 - m[i]) * sum(mine) / len(mine)
                missed = absent == "drift" and sum(mine) / len(mine) >= 1.0  # the authors ask for mean quality > 0
                m[i] = m0 * m[i] if missed else m0
            else:
                if absent == "drift":
                    d[i] = m[i] * d[i] + (1 - m[i]) * 1.0
                m[i] = m0 * m[i]
    return d, m


def coefficient(d: float, alpha: float, beta: float) -> float:
    gamma = math.exp(1.0 / alpha) - 1.0
    return 1.0 + alpha * beta * math.log(1.0 + gamma * d)


def entropy(row: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def uncertainty(measure: str, row: Sequence[float]) -> float:
    top = sorted(row, reverse=True)
    return {"entropy": entropy(row), "posterior": 1 - top[0], "margin": 1 - (top[0] - top[1])}[measure]
