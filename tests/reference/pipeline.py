"""PPAL from end to end, out of the other loops: what the fast strategies must answer."""

from __future__ import annotations

import math

import numpy as np

from ppal_backend.structures import QueryContext
from tests.reference import ccms, clustering, difficulty


def utility(detections, weights, measure: str = "entropy", threshold: float = 0.05) -> float:
    """Eq. 5."""
    total = 0.0
    for k, score in enumerate(detections.scores):
        if score >= np.float32(threshold):
            row = (
                [float(p) for p in detections.class_probs[k]]
                if detections.softmax
                else [float(score), 1.0 - float(score)]
            )
            total += weights[int(detections.class_indices[k])] * difficulty.uncertainty(measure, row)
    return total


def candidates(context: QueryContext, budget: int, weights, delta: float = 4.0) -> list[int]:
    """Positions of the candidate pool."""
    u = [utility(d, weights) for d in context.pool]
    order = sorted(range(len(u)), key=lambda k: (-u[k], context.pool[k].image_id))
    return order[: math.ceil(delta * budget)]


def diverse(distances: np.ndarray, budget: int) -> list[int]:
    """k-Center-Greedy, k-medoids, farthest-first from the most uncertain (the lowest number)."""
    if budget >= len(distances):
        centers = list(range(len(distances)))
    else:
        centers = sorted(clustering.k_medoids(distances, clustering.k_center_greedy(distances, budget, 0))[0])
    order = clustering.k_center_greedy(distances[np.ix_(centers, centers)], len(centers), 0)
    return [centers[k] for k in order]


def ppal(context: QueryContext, budget: int) -> list[int]:
    """Image ids in labeling order."""
    weights = [difficulty.coefficient(float(d), 0.3, 0.2) for d in context.difficulty]
    chosen = candidates(context, budget, weights)
    similarity = ccms.similarity([context.pool[p] for p in chosen])
    return [context.pool[chosen[k]].image_id for k in diverse(2.0 - similarity, budget)]


def ppal_labelled(context: QueryContext, budget: int) -> list[int]:
    """The same beside labelled images, of a pool of which four budgets are candidates."""
    weights = [difficulty.coefficient(float(d), 0.3, 0.2) for d in context.difficulty]
    chosen = candidates(context, budget, weights)
    s = ccms.similarity([*(context.pool[p] for p in chosen), *context.labelled])
    count = len(chosen)
    distances, gap = 2.0 - s[:count, :count], (2.0 - s[:count, count:]).min(1)
    start = clustering.farthest_first(distances, gap, budget, 0)
    centers = sorted(clustering.k_medoids_beside(distances, gap, start)[0])
    order = clustering.farthest_first(distances[np.ix_(centers, centers)], gap[centers], budget, 0)
    return [context.pool[chosen[centers[k]]].image_id for k in order]
