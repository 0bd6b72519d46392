"""Classes: how hard the model finds them, how well it knows them, how often they were labelled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

FEW_BOXES = 10
RARE_SHARE = 0.2
HARD_ABOVE_MEAN = 0.1


@dataclass(frozen=True)
class ClassRow:
    """One class. ``ap`` and ``difficulty`` in [0, 1], ``weight`` w of Eq. 4; None where nobody measured it."""

    label: str
    ap: float | None
    difficulty: float | None
    weight: float | None
    boxes: int | None
    is_rare: bool = False
    is_hard: bool = False


def class_rows(
    labels: Sequence[str],
    difficulty: Sequence[float] | None,
    per_class: Mapping[str, float],
    boxes: Mapping[str, int] | None,
    weights: Mapping[str, float] | None,
) -> list[ClassRow]:
    """Classes by falling difficulty, those without one last, in the order of the labels among equals.

    Args:
        labels: in the order of the class indices.
        difficulty: ``[C]`` class difficulties in the same order, or None.
        per_class: AP by label.
        boxes: labelled boxes by label, or None.
        weights: what the round that ranked the pool gave each label (Eq. 4), or None.
    """
    hard_from = fmean(difficulty) + HARD_ABOVE_MEAN if difficulty else math.inf
    counts = list(boxes.values()) if boxes else []
    rare_below = max(FEW_BOXES, RARE_SHARE * median(counts)) if counts else 0
    rows = []
    for index, label in enumerate(labels):
        d = difficulty[index] if difficulty else None
        count = boxes.get(label, 0) if boxes else None
        rows.append(
            ClassRow(
                label=label,
                ap=per_class.get(label),
                difficulty=d,
                weight=(weights or {}).get(label),
                boxes=count,
                is_rare=count is not None and count < rare_below,
                is_hard=d is not None and d >= hard_from,
            )
        )
    return sorted(rows, key=lambda row: (row.difficulty is None, -(row.difficulty or 0.0)))
