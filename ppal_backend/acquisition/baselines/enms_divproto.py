"""Entropy-based suppression inside images and class prototypes across them.

Source: Wu, Chen and Huang, "Entropy-based Active Learning for Object Detection with Progressive Diversity Constraint",
CVPR 2022, Sec. 3. Thresholds are the paper's. When both constraints leave budget unspent, this version takes the
rejected images by falling utility.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.selection import Selection
from ppal_backend.acquisition.uncertainty import BoxContributions, BoxFilter, contributions
from ppal_backend.structures import Detections, QueryContext


def _unit_rows(detections: Detections, rows: torch.Tensor) -> torch.Tensor:
    values = as_tensor(detections.embeddings)[rows].float().cpu()
    if len(rows) and values.shape[1] == 0:
        raise ValueError(
            f"expected embeddings with shape (n, d), d >= 1, got d = 0 for image {detections.image_id}; "
            f"ENMS and prototypes compare embeddings"
        )
    return values / torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp(min=1e-12)


def suppress(entropies: torch.Tensor, classes: torch.Tensor, unit: torch.Tensor, threshold: float) -> list[int]:
    """Keep the box of largest entropy, drop same-class boxes more similar than ``threshold``, repeat.

    Args:
        entropies: ``[n]``.
        classes: ``[n]`` integer.
        unit: ``[n, d]`` normalised embeddings.
        threshold: Cosine above which a box is redundant.

    Returns:
        Kept positions 0..n-1, in the order kept (falling entropy, ties to the lowest).
    """
    redundant = (unit @ unit.T > threshold) & (classes[:, None] == classes[None, :])
    alive = torch.ones(len(entropies), dtype=torch.bool)
    kept = []
    for k in torch.sort(entropies, descending=True, stable=True).indices.tolist():
        if alive[k]:
            kept.append(k)
            alive &= ~redundant[k]
            alive[k] = False
    return kept


class EnmsScorer:
    """Summed entropy of the boxes that survive entropy-based suppression.

    Args:
        boxes: Which boxes count.
        threshold: Cosine above which a same-class box of lower entropy is redundant.
    """

    def __init__(self, boxes: BoxFilter | None = None, threshold: float = 0.5) -> None:
        self.boxes, self.threshold = boxes or BoxFilter(), threshold

    def kept(self, detections: Detections) -> BoxContributions:
        """The surviving boxes and their entropies."""
        parts = contributions(detections, None, "entropy", self.boxes)
        rows, values = parts.rows.cpu(), parts.values.cpu()
        classes = as_tensor(detections.class_indices).cpu()[rows]
        keep = torch.as_tensor(
            suppress(values, classes, _unit_rows(detections, parts.rows), self.threshold), dtype=torch.long
        )
        return BoxContributions(rows[keep], values[keep])

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` summed entropies >= 0."""
        return np.asarray([float(self.kept(d).values.sum()) for d in context.pool], dtype=np.float64)

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """Entropy of each surviving box."""
        return [self.kept(context.pool[p]) for p in positions]


def prototypes(detections: Detections, parts: BoxContributions) -> dict[int, torch.Tensor]:
    """Entropy-weighted mean embedding per class, normalised."""
    if not len(parts.rows):
        return {}
    features = as_tensor(detections.embeddings).cpu()[parts.rows].float()
    classes = as_tensor(detections.class_indices).cpu()[parts.rows]
    weights = parts.values.float().clamp(min=1e-12)
    made = {}
    for cls in torch.unique(classes).tolist():
        part = classes == cls
        mean = (weights[part, None] * features[part]).sum(0) / weights[part].sum()
        made[cls] = mean / torch.linalg.vector_norm(mean).clamp(min=1e-12)
    return made


class PrototypeSelector:
    """Accept images by falling utility unless their prototypes are known or they add no minority class.

    Args:
        scorer: Which boxes form prototypes.
        intra: An image is rejected when each of its prototypes is more similar than this to an accepted one.
        inter: A class counts as shown by an image from this score on.
        minority: Share of classes, those with fewest labelled instances, that have a quota.
        quota: Share of the budget reserved for minority classes together.
    """

    def __init__(
        self, scorer: EnmsScorer, intra: float = 0.7, inter: float = 0.3, minority: float = 0.5, quota: float = 0.75
    ) -> None:
        self._scorer, self._intra, self._inter = scorer, intra, inter
        self._minority, self._quota = minority, quota

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Choose candidates."""
        wanted = self._quotas(context, budget)
        known: dict[int, list[torch.Tensor]] = {}
        accepted: list[int] = []
        rejected: list[int] = []
        spent = 0
        for position in candidates:
            detections = context.pool[position]
            made = prototypes(detections, self._scorer.kept(detections))
            shown = self._shown(detections)
            fits = budget.affordable(budget.costs[position], spent)
            if not fits or self._known(made, known) or (wanted and not shown & wanted.keys()):
                rejected.append(position)
                continue
            accepted.append(position)
            spent += budget.costs[position]
            for cls, vector in made.items():
                known.setdefault(cls, []).append(vector)
            for cls in shown & wanted.keys():
                wanted[cls] -= 1
                if wanted[cls] == 0:
                    del wanted[cls]
            if spent >= budget.limit:
                break
        return Selection(budget.take([*accepted, *rejected]))

    def _quotas(self, context: QueryContext, budget: Budget) -> dict[int, int]:
        """Images still wanted for each minority class; none without labelled class counts."""
        if context.class_counts is None:
            return {}
        counts = as_tensor(context.class_counts).double().cpu()
        size = max(1, math.floor(self._minority * context.num_classes))
        classes = torch.sort(counts, stable=True).indices[:size].tolist()
        return dict.fromkeys(classes, math.ceil(self._quota * budget.limit / size))

    def _shown(self, detections: Detections) -> set[int]:
        rows = self._scorer.boxes.valid_rows(detections)
        strong = as_tensor(detections.scores)[rows] >= self._inter
        return set(as_tensor(detections.class_indices)[rows][strong].tolist())

    def _known(self, made: dict[int, torch.Tensor], known: dict[int, list[torch.Tensor]]) -> bool:
        if not made:
            return False
        for cls, vector in made.items():
            if cls not in known or float((torch.stack(known[cls]) @ vector).max()) <= self._intra:
                return False
        return True
