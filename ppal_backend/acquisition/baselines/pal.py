"""Uncertainty of whether a detection is right, learnt from labelled images, and image-level signals on top.

Source: "Portable Active Learning for Object Detection" (PAL), CVPR 2026. From the paper: per-class logistic classifiers
on the number of boxes before suppression and the confidence tell true from false positives, the entropy of their answer
is a box's uncertainty; images are refined by class-weighted entropy, rare classes and a similarity penalty that depends
on rank. The way the signals are scaled and joined, and CCMS as the similarity, are this project's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.clustering import RowSource
from ppal_backend.acquisition.dcus import ClassWeights
from ppal_backend.acquisition.selection import Compare, Neighbour, Selection
from ppal_backend.acquisition.uncertainty import BoxContributions, BoxFilter, binary_uncertainty
from ppal_backend.structures import Detections, QueryContext
from ppal_backend.structures.detections import to_numpy
from ppal_backend.structures.stream import without_embeddings

logger = logging.getLogger(__name__)

_MIN_EXAMPLES = 10
_RIDGE = 1.0
_NEWTON_STEPS = 50


def fit_logistic(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Logistic regression by Newton's method, with a ridge of 1 on all weights but the constant.

    Args:
        features: ``[n, f]``; a constant is added.
        targets: ``[n]`` bool.

    Returns:
        ``[f + 1]`` weights, the constant last.
    """
    design = np.hstack([features, np.ones((len(features), 1))])
    penalty = np.diag([_RIDGE] * features.shape[1] + [1e-6])
    weights = np.zeros(design.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30.0, 30.0)))
        gradient = design.T @ (p - targets) + penalty @ weights
        hessian = design.T @ (design * (p * (1.0 - p) + 1e-9)[:, None]) + penalty
        step = np.linalg.solve(hessian, gradient)
        weights -= step / max(1.0, float(np.abs(step).max()) / 5.0)
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _features(detections: Detections) -> np.ndarray:
    scores = to_numpy(detections.scores).astype(np.float64)
    counts = detections.pre_nms_counts
    support = np.zeros(len(scores)) if counts is None else np.log1p(to_numpy(counts).astype(np.float64))
    return np.stack([support, scores], 1)


class Calibration:
    """Probability that a detection is a true positive, by class.

    Classes with fewer than 10 true or 10 false positives share one classifier fitted on all classes. Without any
    labelled detections that know whether they are right, the score itself is taken (and that is logged).

    Args:
        labelled: Detections of labelled images; those without ``true_positive`` are left out.
        boxes: Which boxes count.
    """

    def __init__(self, labelled: Sequence[Detections], boxes: BoxFilter) -> None:
        known = [d for d in without_embeddings(labelled) if d.true_positive is not None and len(d)]
        rows = [boxes.valid_rows(d).cpu().numpy() for d in known]
        self._shared: np.ndarray | None = None
        self._by_class: dict[int, np.ndarray] = {}
        if not sum(len(r) for r in rows):
            logger.warning("no labelled detections marked true or false positive: scores are taken as calibrated")
            return
        features = np.concatenate([_features(d)[r] for d, r in zip(known, rows, strict=True)])
        right = np.concatenate([to_numpy(d.true_positive)[r] for d, r in zip(known, rows, strict=True)])
        classes = np.concatenate([to_numpy(d.class_indices)[r] for d, r in zip(known, rows, strict=True)])
        self._shared = fit_logistic(features, right)
        for cls in np.unique(classes):
            part = classes == cls
            if min(right[part].sum(), (~right[part]).sum()) >= _MIN_EXAMPLES:
                self._by_class[int(cls)] = fit_logistic(features[part], right[part])

    def probability(self, detections: Detections) -> np.ndarray:
        """``[n]`` probability of being right for every box of an image."""
        if self._shared is None:
            return to_numpy(detections.scores).astype(np.float64)
        design = np.hstack([_features(detections), np.ones((len(detections), 1))])
        shared = self._shared
        weights = [self._by_class.get(int(c), shared) for c in detections.class_indices]
        logits = (design * np.asarray(weights).reshape(len(detections), 3)).sum(1)
        return 1.0 / (1.0 + np.exp(-np.clip(logits, -30.0, 30.0)))


class CalibratedScorer:
    """Summed entropy of the calibrated true-positive probability, under class weights if given."""

    def __init__(self, boxes: BoxFilter | None = None, weights: ClassWeights | None = None) -> None:
        self._boxes, self._weights = boxes or BoxFilter(), weights

    def _values(self, context: QueryContext, images: Iterable[Detections]) -> Iterator[BoxContributions]:
        calibration = Calibration(context.labelled, self._boxes)
        weights = self._weights(context) if self._weights else None
        for d in images:
            rows = self._boxes.valid_rows(d).cpu()
            values = binary_uncertainty(calibration.probability(d), "entropy")[rows]
            if weights is not None:
                values = values * weights.double().cpu()[as_tensor(d.class_indices).cpu()[rows].long()]
            yield BoxContributions(rows, values)

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` utilities >= 0."""
        values = self._values(context, without_embeddings(context.pool))
        return np.asarray([float(c.values.sum()) for c in values], dtype=np.float64)

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """Weighted entropy of each box that counts."""
        return list(self._values(context, [context.pool[p] for p in positions]))


def _scaled(values: np.ndarray) -> np.ndarray:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


class SignalSelector:
    """Greedy choice by utility rank, class-weighted entropy and rare classes, less a similarity penalty.

    Each signal is scaled to [0, 1] over the candidates. The penalty is the largest similarity to an earlier pick,
    scaled to [0, 1], times ``penalty`` times the candidate's relative utility rank: the most uncertain images are
    hardly held back, the least uncertain fully.
    """

    def __init__(self, compare: Compare, boxes: BoxFilter, penalty: float = 1.0) -> None:
        self._compare, self._boxes, self._penalty = compare, boxes, penalty

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Choose candidates."""
        if not candidates:
            return Selection([])
        comparison = self._compare(context, candidates)
        top = comparison.self_similarity or 1.0
        count = len(candidates)
        base = torch.from_numpy(self._signals(context, candidates)).to(comparison.distances.device)
        rank = torch.arange(count, device=base.device) / max(1, count - 1)
        similarity = torch.zeros(count, dtype=torch.float64, device=base.device)
        owner = torch.full((count,), -1, dtype=torch.long, device=base.device)
        rows = RowSource(comparison.distances)
        chosen: list[int] = []
        neighbours: dict[int, Neighbour] = {}
        spent = 0
        open_ = torch.ones(count, dtype=torch.bool, device=base.device)
        while spent < budget.limit and bool(open_.any()):
            value = torch.where(open_, base - self._penalty * rank * similarity / top, -torch.inf)
            pick = int(torch.argmax(value))
            open_[pick] = False
            position = candidates[pick]
            if not budget.affordable(budget.costs[position], spent):
                continue
            near = int(owner[pick])
            if near >= 0:
                s = float(similarity[pick])
                neighbours[position] = Neighbour(context.pool_ids[candidates[near]], top - s, s)
            chosen.append(position)
            spent += budget.costs[position]
            row = top - rows.row(pick, value.clamp(min=-1e30)).double()
            closer = (row > similarity) | (owner < 0)
            owner.masked_fill_(closer, pick)
            similarity = torch.where(closer, row, similarity)
        return Selection(chosen, {}, neighbours)

    def _signals(self, context: QueryContext, candidates: Sequence[int]) -> np.ndarray:
        share = np.zeros((len(candidates), context.num_classes))
        for k, position in enumerate(candidates):
            d = context.pool[position]
            rows = self._boxes.valid_rows(d).cpu().numpy()
            np.add.at(share[k], to_numpy(d.class_indices)[rows], to_numpy(d.scores)[rows].astype(np.float64))
        rarity = self._rarity(context, share)
        present = share > 0
        share = share / np.maximum(share.sum(1, keepdims=True), 1e-12)
        entropy = -(rarity * share * np.log(np.where(present, share, 1.0))).sum(1)
        rank = 1.0 - np.arange(len(candidates)) / max(1, len(candidates) - 1)
        return rank + _scaled(entropy) + _scaled((rarity * present).sum(1))

    def _rarity(self, context: QueryContext, share: np.ndarray) -> np.ndarray:
        """1 - count / largest count of each class: labelled instances, or predicted mass where unknown."""
        counts = share.sum(0) if context.class_counts is None else to_numpy(context.class_counts).astype(np.float64)
        return np.asarray(1.0 - counts / max(float(counts.max()), 1e-12))
