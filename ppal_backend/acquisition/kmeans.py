"""Lloyd's k-means with k-means++ seeding, for image features."""

from __future__ import annotations

import numpy as np
import torch


def k_means(features: torch.Tensor, k: int, rng: np.random.Generator, max_iterations: int = 50) -> torch.Tensor:
    """Cluster rows.

    Args:
        features: ``[n, d]``, n >= k.
        k: Clusters, >= 1.
        rng: Draws the seeds.
        max_iterations: Rounds at most.

    Returns:
        ``[n]`` int64 cluster of each row, 0..k-1; clusters may be empty when rows coincide.

    Raises:
        ValueError: k is not in 1..n.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    n = len(features)
    if not 1 <= k <= n:
        raise ValueError(f"expected k in 1..{n}, got {k}")
    values = features.double()
    centers = values[_seeds(values, k, rng)]
    labels = torch.full((n,), -1, dtype=torch.long)
    for _ in range(max_iterations):
        found = _squared(values, centers).argmin(1)
        if bool((found == labels).all()):
            break
        labels = found
        counts = torch.bincount(labels, minlength=k).double()
        sums = torch.zeros_like(centers).index_add_(0, labels, values)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1.0)[:, None], centers)
    return labels


def _squared(values: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    cross = values @ centers.T
    return ((values**2).sum(1)[:, None] + (centers**2).sum(1)[None, :] - 2.0 * cross).clamp_(min=0.0)


def _seeds(values: torch.Tensor, k: int, rng: np.random.Generator) -> list[int]:
    seeds = [int(rng.integers(len(values)))]
    nearest = _squared(values, values[seeds])[:, 0]
    while len(seeds) < k:
        total = float(nearest.sum())
        if total <= 0:
            taken = set(seeds)
            seeds += [i for i in range(len(values)) if i not in taken][: k - len(seeds)]
            break
        chance = (nearest / total).numpy()
        seeds.append(int(rng.choice(len(values), p=chance / chance.sum())))
        nearest = torch.minimum(nearest, _squared(values, values[seeds[-1:]])[:, 0])
    return seeds
