"""CCMS as one would first write it: for every pair of images one small dense computation. The benchmark's yardstick."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppal_backend.structures import Detections


def plain_similarity(pool: Sequence[Detections], score_threshold: float = 0.05) -> np.ndarray:
    """``[N, N]`` similarity of numpy detections, pair by pair: all objects against all, masked by class.

    Args:
        pool: N images, each with at least one valid detection.
        score_threshold: Lowest score that counts.
    """
    images = []
    for d in pool:
        embeddings, scores, classes = (torch.as_tensor(v) for v in (d.embeddings, d.scores, d.class_indices))
        keep = scores >= score_threshold
        f = embeddings[keep]
        images.append((f / f.norm(dim=1, keepdim=True), scores[keep], classes[keep]))
    result = torch.zeros(len(pool), len(pool))
    for i, (f, t, c) in enumerate(images):
        for j, (g, u, e) in enumerate(images):
            cosine = (f @ g.T + 1.0) * (c[:, None] == e[None, :])
            if not cosine.numel():
                continue
            there = (t * cosine.max(1).values).sum() / t.sum()
            back = (u * cosine.max(0).values).sum() / u.sum()
            result[i, j] = 0.5 * (there + back)
    return result.fill_diagonal_(2.0).numpy()
