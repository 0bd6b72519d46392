"""Typical images of large clusters: what to label before any detector exists.

Source: Hacohen, Dekel and Weinshall, "Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets",
ICML 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.comparisons import labelled_features, pool_features
from ppal_backend.acquisition.dcus import Scorer
from ppal_backend.acquisition.selection import Selection
from ppal_backend.structures import QueryContext

FEATURE = "global"
NEIGHBOURS = 20
MAX_CLUSTERS = 500
MIN_CLUSTER = 5
_EPSILON = 1e-5
_BLOCK = 2048
_MOST_ITERATIONS = 50


def k_means(features: torch.Tensor, k: int, rng: np.random.Generator) -> torch.Tensor:
    """Cluster rows.

    Args:
        features: ``[n, d]``, n >= k.
        k: Clusters, >= 1.
        rng: Draws the seeds.

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
    for _ in range(_MOST_ITERATIONS):
        found = _squared_distances(values, centers).argmin(1)
        if bool((found == labels).all()):
            break
        labels = found
        counts = torch.bincount(labels, minlength=k).double()
        sums = torch.zeros_like(centers).index_add_(0, labels, values)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1.0)[:, None], centers)
    return labels


def _squared_distances(values: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    cross = values @ centers.T
    return ((values**2).sum(1)[:, None] + (centers**2).sum(1)[None, :] - 2.0 * cross).clamp_(min=0.0)


def _seeds(values: torch.Tensor, k: int, rng: np.random.Generator) -> list[int]:
    seeds = [int(rng.integers(len(values)))]
    nearest = _squared_distances(values, values[seeds])[:, 0]
    while len(seeds) < k:
        total = float(nearest.sum())
        if total <= 0:
            taken = set(seeds)
            seeds += [i for i in range(len(values)) if i not in taken][: k - len(seeds)]
            break
        chance = (nearest / total).numpy()
        seeds.append(int(rng.choice(len(values), p=chance / chance.sum())))
        nearest = torch.minimum(nearest, _squared_distances(values, values[seeds[-1:]])[:, 0])
    return seeds


def typicality(features: torch.Tensor, neighbours: int = NEIGHBOURS) -> torch.Tensor:
    """Inverse mean distance to the nearest neighbours.

    Args:
        features: ``[n, d]``.
        neighbours: How many others to average over (fewer where n is small).

    Returns:
        ``[n]`` float64 values > 0 and finite; 1 for a single item.
    """
    count = min(neighbours, len(features) - 1)
    if count < 1:
        return torch.ones(len(features), dtype=torch.float64)
    means = []
    for start in range(0, len(features), _BLOCK):
        part = torch.cdist(features[start : start + _BLOCK], features)
        part[torch.arange(len(part)), start + torch.arange(len(part))] = torch.inf
        means.append(part.topk(count, dim=1, largest=False).values.double().mean(1))
    return 1.0 / (torch.cat(means) + _EPSILON)


def _normalised(features: torch.Tensor) -> torch.Tensor:
    values = features.float().cpu()
    return values / torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp(min=1e-12)


class TypicalityScorer(Scorer):
    """Typicality of each image among the whole pool."""

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` utilities > 0."""
        return np.asarray(typicality(_normalised(pool_features(context, FEATURE))).numpy())


class TypicalitySelector:
    """Cluster pool and labelled images together; take the most typical image of each large cluster without labels.

    Args:
        max_clusters: Clusters at most.
        min_cluster: Clusters of fewer images come last.
    """

    def __init__(self, max_clusters: int = MAX_CLUSTERS, min_cluster: int = MIN_CLUSTER) -> None:
        self._max_clusters, self._min_cluster = max_clusters, min_cluster

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Choose candidates."""
        if not candidates:
            return Selection([])
        mine = _normalised(pool_features(context, FEATURE))[torch.as_tensor(list(candidates))]
        others = labelled_features(context, FEATURE)
        known = mine[:0] if others is None else _normalised(others)
        everything = torch.cat([mine, known])
        clusters = min(len(known) + budget.limit, self._max_clusters, len(everything))
        labels = k_means(everything, clusters, rng)
        sizes = torch.bincount(labels[: len(mine)], minlength=clusters)
        order = self._walk(mine, labels[: len(mine)], torch.bincount(labels[len(mine) :], minlength=clusters))
        chosen = budget.take(candidates[k] for k in order)
        place = {position: k for k, position in enumerate(candidates)}
        return Selection(chosen, {p: int(sizes[labels[place[p]]]) for p in chosen})

    def _walk(self, features: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor) -> Iterator[int]:
        """All items: in turns over clusters with fewest labels, then largest, each giving its most typical item."""
        queues: dict[int, list[int]] = {}
        for c in torch.unique(labels).tolist():
            members = torch.nonzero(labels == c)[:, 0]
            typical = typicality(features[members], max(1, min(NEIGHBOURS, len(members) // 2)))
            queues[c] = members[torch.sort(typical, descending=True, stable=True).indices].tolist()
        given = {c: int(labelled[c]) for c in queues}
        while queues:
            turn = min(queues, key=lambda c: (len(queues[c]) < self._min_cluster, given[c], -len(queues[c]), c))
            yield queues[turn].pop(0)
            given[turn] += 1
            if not queues[turn]:
                del queues[turn]
