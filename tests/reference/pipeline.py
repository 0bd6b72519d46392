"""PPAL from end to end, out of the other loops: what the fast strategies must answer."""

from __future__ import annotations

import math

import numpy as np

from ppal_backend.structures import QueryContext
from tests.reference import ccms, clustering, difficulty


def _distribution(detections, k: int) -> list[float]:
    """Of a box over classes and background, or of its score."""
    if detections.softmax:
        return [float(p) for p in detections.class_probs[k]]
    score = float(detections.scores[k])
    return [score, 1.0 - score]


def utility(detections, weights, measure: str = "entropy", threshold: float = 0.05) -> float:
    """Eq. 5."""
    total = 0.0
    for k, score in enumerate(detections.scores):
        if score >= np.float32(threshold):
            row = _distribution(detections, k)
            total += weights[int(detections.class_indices[k])] * difficulty.uncertainty(measure, row)
    return total


def gain(detections, weights, price: float, measure: str = "entropy", threshold: float = 0.05) -> float:
    """What an image teaches for what it costs: classes saturate, boxes take time."""
    mass: dict[int, float] = {}
    seconds = 5.0
    for k, score in enumerate(detections.scores):
        if score >= np.float32(threshold):
            row = _distribution(detections, k)
            largest = math.log(len(row)) if measure == "entropy" else 1.0
            cls = int(detections.class_indices[k])
            mass[cls] = mass.get(cls, 0.0) + difficulty.uncertainty(measure, row) / largest
            seconds += 7.0 * float(score)
    return sum(weights[c] * math.log(1.0 + m) for c, m in mass.items()) / seconds**price


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


def coverage(distances, far, weights, budget: int) -> list[int]:
    """Greedy picks for the largest weighted coverage, by looking at everything every time."""
    far, picks = list(far), []
    for _ in range(min(budget, len(weights))):
        gains = [
            -1.0 if x in picks else sum(w * max(0.0, far[j] - distances[j][x]) for j, w in enumerate(weights))
            for x in range(len(weights))
        ]
        best = max(range(len(gains)), key=lambda x: (round(gains[x], 9), -x))
        picks.append(best)
        far = [min(f, distances[j][best]) for j, f in enumerate(far)]
    return picks
