"""Eq. 6 and 7 as plain loops over objects in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ppal_backend.structures import Detections
from ppal_backend.structures.detections import to_numpy


def _objects(
    d: Detections, threshold: float, limit: int = 100
) -> list[tuple[np.ndarray, float, int, np.ndarray | None]]:
    scores = to_numpy(d.scores)
    rows = [k for k in range(len(scores)) if scores[k] >= threshold and scores[k] > 0]
    rows = sorted(sorted(rows, key=lambda k: (-scores[k], k))[:limit])
    probs = None if d.class_probs is None else to_numpy(d.class_probs).astype(float)
    return [
        (
            to_numpy(d.embeddings)[k].astype(float),
            float(scores[k]),
            int(to_numpy(d.class_indices)[k]),
            None if probs is None else probs[k],
        )
        for k in rows
    ]


def cosine_plus_one(f: np.ndarray, g: np.ndarray) -> float:
    norms = math.sqrt(float(f @ f)) * math.sqrt(float(g @ g))
    return 1.0 + (float(f @ g) / norms if norms > 0 else 0.0)


def kl_similarity(p: np.ndarray, q: np.ndarray) -> float:
    p, q = np.maximum(p, 1e-6), np.maximum(q, 1e-6)
    p, q = p / p.sum(), q / q.sum()
    both = sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return 2.0 * math.exp(-both / 2.0)


def directed(a: list, b: list, metric: str) -> float:
    """S'(O_a, O_b) of Eq. 7."""
    total = weight = 0.0
    for f, t, c, p in a:
        best = 0.0
        for g, _, other, q in b:
            if other == c:
                best = max(best, cosine_plus_one(f, g) if metric == "cosine" else kl_similarity(p, q))
        total += t * best
        weight += t
    return total / weight if weight > 0 else 0.0


def similarity(detections: Sequence[Detections], threshold: float = 0.05, metric: str = "cosine") -> np.ndarray:
    """S of every pair; 2 on the diagonal."""
    images = [_objects(d, threshold) for d in detections]
    result = np.zeros((len(images), len(images)))
    for i, a in enumerate(images):
        for j, b in enumerate(images):
            result[i, j] = 2.0 if i == j else 0.5 * (directed(a, b, metric) + directed(b, a, metric))
    return result
